"""The packages agree through their files alone: what one writes, the next one opens or refuses."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import builder
from builder import index
from evaluator.backbones import LayersAndDims, WeightsDefaults, open_backbone, parse_spec
from evaluator.errors import EvaluatorError
from trainer.dataset import read_dataset

SHARDS_PAGE = Path(builder.__file__).with_name("SHARDS.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder of the trainer. Not to be changed."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = ["pretrain", "--data", str(dataset), "--out", str(out), "--loss", "direct"]
    words += ["--arch", "resnet18", "--size", "32", "--batch-size", "4", "--steps", "2"]
    words += ["--device", "cpu", "--workers", "0"]
    subprocess.run([sys.executable, "-m", "trainer", *words], check=True, capture_output=True)
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The exported files alone, to be damaged."""
    for name in ("backbone.json", "backbone.safetensors"):
        shutil.copy(run / name, tmp_path)
    return tmp_path


def opened(folder: Path):
    """The run folder as the evaluator opens it: (network, record)."""
    spec = parse_spec(f"ours={folder}")
    return open_backbone(spec, WeightsDefaults(), LayersAndDims(), 32, torch.device("cpu"))


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(EvaluatorError, match=pattern) as caught:
        opened(folder)
    assert "\n" not in caught.value.message


def change(folder: Path, **values: object) -> None:
    path = folder / "backbone.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_dataset_of_the_builder_is_read_by_the_trainer(dataset):
    written = index.Dataset.model_validate_json((dataset / "dataset.json").read_bytes())
    read = read_dataset(dataset)
    assert read.content_sha256 == written.content_sha256
    assert read.recipe_sha256 == written.recipe_sha256
    assert (read.samples, read.theta.length) == (20, 271)


def test_example_on_the_page_of_shards_is_read_by_the_trainer(tmp_path):
    example = SHARDS_PAGE.split("```json\n")[1].split("```")[0]
    (tmp_path / "dataset.json").write_text(example)
    read = read_dataset(tmp_path)
    assert [shard.samples for shard in read.shards] == [2, 1]
    index.Dataset.model_validate_json(example)


def test_export_of_the_trainer_is_opened_by_the_evaluator(run, dataset):
    network, record = opened(run)
    weights = run / "backbone.safetensors"
    assert record.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (record.kind, record.arch, record.ignored_keys) == ("export", "resnet18", [])
    assert (record.layers, record.dims) == (["layer1", "layer2", "layer3"], 100)
    assert record.mean == record.std == (0.5, 0.5, 0.5)
    assert record.export is not None
    assert record.export.dataset.content_sha256 == read_dataset(dataset).content_sha256
    held, stored = network.extractor.state_dict(), load_file(weights)
    assert "layer3.1.bn2.running_var" in held
    assert all(torch.equal(held[key], stored[key]) for key in held)


def test_export_of_another_version_is_refused(copy):
    change(copy, format_version=3)
    refused(copy, "backbone.json: format_version is 3, this version reads 1 and 2")


def test_export_with_a_flipped_byte_is_refused(copy):
    path = copy / "backbone.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(copy, "backbone.safetensors: sha256 is .* expects .* damaged")


@pytest.mark.parametrize("arch", ["resnet50", "mobilenet_v2"])
def test_export_that_names_another_architecture_is_refused(copy, arch):
    change(copy, arch=arch)
    refused(copy, f"is it a {arch} with torchvision's key names")
