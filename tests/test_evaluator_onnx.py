"""`evaluator export-onnx`: the graph says what our own scorer says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluator import onnx as export_module
from evaluator.errors import EvaluatorError
from evaluator.images import load_image
from evaluator.model import load_model
from evaluator.onnx import compared
from tests.inspection_models import fit, run, write_parts

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
DIMS = {"factors": 12, "features": 20}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"), 20)


@pytest.fixture(scope="module")
def models(parts, tmp_path_factory) -> Path:
    """A model of either form, and its graph where the packages are there. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    for form, dims in DIMS.items():
        assert fit(parts, folder / form, "--dims", dims).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def graphs(models):
    """The graphs of both models, as onnxruntime's sessions."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    sessions = {}
    for form in DIMS:
        path = models / f"{form}.onnx"
        result = run("export-onnx", models / form, "--out", path)
        assert result.exit_code == 0, result.output
        assert "largest relative difference from our own scorer" in result.stdout
        sessions[form] = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return sessions


@pytest.mark.parametrize("form", DIMS)
def test_graph_equals_the_scorer(graphs, models, parts, form):
    model = load_model(models / form, CPU)
    assert model.record.form == form
    for path in sorted(parts.iterdir())[:2]:
        pixels = np.stack([load_image(path, model.record.protocol)])
        image = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 255
        found = graphs[form].run(["map", "score"], {"image": image})
        for one, expected in zip(found, model(pixels), strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-4)


def test_graph_says_how_to_use_it(graphs, models):
    facts = graphs["factors"].get_modelmeta().custom_metadata_map
    model = load_model(models / "factors", CPU)
    assert float(facts["threshold"]) == model.threshold
    assert json.loads(facts["protocol"])["name"] == "paper"
    assert json.loads(facts["mean"]) == [0.5, 0.5, 0.5]
    assert [(i.name, i.shape) for i in graphs["factors"].get_inputs()] == [
        ("image", [1, 3, 224, 224])
    ]


def test_graph_of_another_model_is_refused(graphs, models):
    model = load_model(models / "factors", CPU)
    with pytest.raises(EvaluatorError, match="not written, onnxruntime gives maps that differ"):
        compared(graphs["features"], model, Path("a.onnx"))


def test_graph_beyond_2_gib_is_one_line(graphs, models, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "LARGEST_GRAPH_BYTES", 1000)
    result = run("export-onnx", models / "factors", "--out", tmp_path / "model.onnx")
    assert result.exit_code == 1
    assert "an ONNX file holds 2; fit with lower --dims" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_one_line(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = run("export-onnx", models / "factors", "--out", tmp_path / "model.onnx")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: onnx is not installed; pip install 'semiformula[onnx]' brings all it needs\n"
    )
