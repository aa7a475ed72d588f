"""`evaluator export-onnx`: network, whitening, upsampling, blur and maximum as one ONNX graph."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evaluator.artifacts import write_bytes
from evaluator.errors import EvaluatorError
from evaluator.model import Inspector, load_model

OPSET = 18
LARGEST_GRAPH_BYTES = 2**31 - 2**20  # protobuf's limit, with room for the nodes
MAX_DEVIATION = 1e-3  # relative, of maps and scores
CHECKED_IMAGES = 3
INPUT, MAP, SCORE = "image", "map", "score"


def export(folder: Path, out: Path) -> str:
    """Write the graph of the model in `folder` and compare it with our own scorer first.

    Raises EvaluatorError when a package is missing, when the graph would pass protobuf's 2 GiB,
    and when onnxruntime's results deviate by more than 1e-3, relative; nothing is written then.
    """
    onnx, runtime = _packages()
    model = load_model(folder, torch.device("cpu"))
    size_bytes = sum(
        value.numel() * value.element_size()
        for value in (*model.scorer.parameters(), *model.scorer.buffers())
    )
    if size_bytes > LARGEST_GRAPH_BYTES:
        raise EvaluatorError(
            f"{out}: the graph would hold {size_bytes / 2**30:.2f} GiB, an ONNX file holds 2; fit "
            "with lower --dims"
        )
    graph = _graph(model)
    _describe(onnx, graph, model)
    data = graph.SerializeToString()
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    deviation = compared(session, model, out)
    write_bytes(out, data)
    return (
        f"{out}: {len(data) / 1e6:.1f} MB, opset {OPSET}; largest relative difference from our own "
        f"scorer {deviation:.1e}"
    )


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter wants it
    except ModuleNotFoundError as error:
        raise EvaluatorError(
            f"{error.name} is not installed; pip install 'semiformula[onnx]' brings all it needs"
        ) from None
    return onnx, onnxruntime


def _graph(model: Inspector) -> Any:
    """The graph for one photograph: float32 [1, 3, size, size] in [0, 1]."""
    size_px = model.record.protocol.size_px
    example = torch.zeros(1, 3, size_px, size_px)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            model.scorer,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[MAP, SCORE],
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _describe(onnx: Any, graph: Any, model: Inspector) -> None:
    """What a user of the file must know, as strings in its metadata."""
    record = model.record
    facts = {
        "format": record.format,
        "format_version": record.format_version,
        "threshold": repr(model.threshold),
        "false_reject_rate": repr(record.calibration.false_reject_rate),
        "protocol": json.dumps(record.protocol.model_dump(mode="json")),
        "input": "float32 [1, 3, size, size], RGB / 255; resized and cropped as protocol says",
        "normalisation": "inside the graph: (image - mean) / std",
        "mean": json.dumps(record.backbone.mean),
        "std": json.dumps(record.backbone.std),
        "model_sha256": record.tensors.sha256,
    }
    onnx.helper.set_model_props(graph, {key: str(value) for key, value in facts.items()})


def compared(session: Any, model: Inspector, out: Path) -> float:
    """The largest relative difference of maps and scores from our own, on noise of several kinds.

    Raises EvaluatorError above `MAX_DEVIATION`.
    """
    rng = np.random.default_rng(0)
    size_px = model.record.protocol.size_px
    worst = []
    for k in range(CHECKED_IMAGES):
        grain = 4**k  # px
        cells = size_px // grain + 1
        noise = rng.integers(0, 256, (1, cells, cells, 3), np.uint8)
        pixels = noise.repeat(grain, 1).repeat(grain, 2)[:, :size_px, :size_px].copy()
        image = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 255
        found = session.run([MAP, SCORE], {INPUT: image})
        worst += [_relative(a, b) for a, b in zip(found, model(pixels), strict=True)]
    deviation = float(np.max(worst))  # not-a-number, where there is one
    if not deviation <= MAX_DEVIATION:
        raise EvaluatorError(
            f"{out}: not written, onnxruntime gives maps that differ by {deviation:.1e}, relative, "
            f"from our own; allowed are {MAX_DEVIATION:g}"
        )
    return deviation


def _relative(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float((np.abs(found - expected) / np.maximum(np.abs(expected), 1e-30)).max())
