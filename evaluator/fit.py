"""`evaluator fit`: good photographs -> a model with a threshold that keeps a promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from evaluator import __version__
from evaluator.backbones import open_backbone, parse_spec
from evaluator.errors import EvaluatorError
from evaluator.fit_check import CheckSet, calibrate, read_check_set
from evaluator.fit_photographs import FitOptions, split_photographs
from evaluator.model import (
    JSON_FILE,
    LEAST_STD,
    LayerRecord,
    PadimModel,
    TensorsFile,
    backbone_tensors,
    is_dual,
    library_versions,
    make_scorer,
    save_model,
    table_tensors,
    tensors_file,
    tree_of,
)
from evaluator.networks import Network
from evaluator.out_folder import prepare_out
from evaluator.padim import draw_dims
from evaluator.photographs import decoded_batches, stacked
from evaluator.protocols import protocol_sha256
from evaluator.report import BackboneRecord
from evaluator.scorer import Scorer
from evaluator.whitening import TILE_BYTES, Tree, make_tables, table_shapes

LARGEST_FLOAT16 = 65504.0
BORDER_NOTE = (
    "The protocol cuts the border off: defects there are not seen; --protocol full sees all."
)


@dataclass(frozen=True)
class Fitted:
    """A model that is written, what to print of it, and what --check still has to score."""

    record: PadimModel
    scorer: Scorer
    lines: str
    check: CheckSet | None


def fit(options: FitOptions) -> Fitted:
    """Fit, choose the threshold, write the model."""
    split = split_photographs(options)
    check = read_check_set(options, split)
    prepare_out(options.out)
    network, backbone = _opened(options)
    layers = _layer_records(network, draw_dims(network.channels, backbone.dims, options.seed))
    tree, fitted = tree_of(layers), len(split.fitted)
    dual = is_dual(fitted, backbone.dims)
    _check_memory(options, tree, [len(layers[lv.layer].dims) for lv in tree.levels], fitted, dual)
    features = extract(network, layers, split.fitted, options, np.float16 if dual else np.float32)
    by_level = [features[level.layer] for level in tree.levels]
    tables = make_tables(tree, by_level, options.protocol.epsilon, dual)
    scorer = make_scorer(network, layers, options.protocol, dual, tables)
    calibration = calibrate(scorer, split.held_out, options)
    tensors = {f"backbone.{key}": value for key, value in backbone_tensors(network).items()}
    if dual:
        tensors |= {f"features.{k}": torch.from_numpy(x) for k, x in enumerate(features)}
    tensors |= table_tensors("features" if dual else "factors", tree, tables)
    record = PadimModel(
        format="semiformula-padim",
        format_version=1,
        evaluator_version=__version__,
        versions=library_versions(),
        protocol=options.protocol,
        protocol_sha256=protocol_sha256(options.protocol),
        seed=options.seed,
        backbone=backbone,
        layers=layers,
        form="features" if dual else "factors",
        photographs=split.record,
        calibration=calibration,
        tensors=TensorsFile(file=tensors_file("0" * 64), bytes=8, sha256="0" * 64),
    )
    record = save_model(options.out, record, tensors)
    return Fitted(record, scorer, _fitted_lines(options, record), check)


def _opened(options: FitOptions) -> tuple[Network, BackboneRecord]:
    network, backbone = open_backbone(
        parse_spec(options.spec),
        options.weights_defaults,
        options.layers_and_dims,
        options.protocol.size_px,
        options.device,
    )
    if min(backbone.std) < LEAST_STD:
        raise EvaluatorError(
            f"backbone {backbone.name!r}: std is {min(backbone.std):g}, expected {LEAST_STD:g} or "
            "more; pixels are in [0, 1]"
        )
    return network, backbone


def _layer_records(network: Network, dims: Sequence[int]) -> list[LayerRecord]:
    records, start = [], 0
    for name, (channels, height, width) in zip(network.layers, network.shapes, strict=True):
        chosen = [dim - start for dim in dims if start <= dim < start + channels]
        start += channels
        if not chosen:
            raise EvaluatorError(
                f"--dims {len(dims)}: none of the drawn dimensions is in layer {name!r}; raise "
                "--dims, change --seed, or leave the layer out of --layers"
            )
        records.append(
            LayerRecord(name=name, channels=channels, height=height, width=width, dims=chosen)
        )
    return records


def _check_memory(
    options: FitOptions, tree: Tree, dims: Sequence[int], fitted: int, dual: bool
) -> None:
    """Print the predicted peak beside the network's own; EvaluatorError above --max-memory."""
    values = sum(
        int(np.prod(shape)) for shapes in table_shapes(tree, dims, fitted, dual) for shape in shapes
    )
    features = sum(level.cells * size for level, size in zip(tree.levels, dims, strict=True))
    peak = 4 * values + (2 if dual else 4) * fitted * features + TILE_BYTES
    if peak > options.max_memory_bytes:
        raise EvaluatorError(
            f"--max-memory: {fitted} photographs x {sum(dims)} dimensions need "
            f"{peak / 2**30:.2f} GiB, allowed are {options.max_memory_bytes / 2**30:.2f}; raise it "
            "or lower --dims"
        )
    click.echo(
        f"{fitted} photographs to fit on, {sum(dims)} dimensions: {peak / 2**30:.2f} GiB beside "
        "the network's own"
    )


@torch.inference_mode()
def extract(
    network: Network,
    layers: Sequence[LayerRecord],
    paths: Sequence[Path],
    options: FitOptions,
    dtype: type[np.float16] | type[np.float32],
) -> list[npt.NDArray[np.floating]]:
    """The chosen channels of every layer at its own resolution: [images, cells, dims] each.

    Raises EvaluatorError for a photograph that cannot be read, and for features that are not
    finite or do not fit `dtype`.
    """
    features = [
        np.empty((len(paths), layer.height * layer.width, len(layer.dims)), dtype)
        for layer in layers
    ]
    mean = torch.tensor(network.mean, device=network.device).view(1, 3, 1, 1)
    std = torch.tensor(network.std, device=network.device).view(1, 3, 1, 1)
    done = 0
    with tqdm(total=len(paths), desc="features", unit="img", disable=None) as bar:
        for batch in decoded_batches(paths, options.protocol, options.batch_size):
            pixels = torch.from_numpy(stacked(batch)).to(network.device).permute(0, 3, 1, 2)
            normal = (pixels.float() / 255 - mean) / std
            outputs = network.extractor(normal.contiguous(memory_format=torch.channels_last))
            for layer, values in zip(layers, features, strict=True):
                chosen = outputs[layer.name][:, layer.dims].float().flatten(2).mT.cpu().numpy()
                _check_range(network, batch[0].path, chosen, dtype)
                values[done : done + len(batch)] = chosen
            done += len(batch)
            bar.update(len(batch))
    return features


def _check_range(
    network: Network, path: Path, values: npt.NDArray[np.float32], dtype: type[np.floating]
) -> None:
    largest = float(np.abs(values).max())
    if not np.isfinite(largest):
        raise EvaluatorError(
            f"backbone {network.name!r}: features of {path} or its neighbours are not finite; "
            "wrong --input-norm, or damaged weights?"
        )
    if dtype is np.float16 and largest > LARGEST_FLOAT16:
        raise EvaluatorError(
            f"backbone {network.name!r}: features of {path} or its neighbours reach "
            f"{largest:.3g}, a model holds {LARGEST_FLOAT16:g}; wrong --input-norm?"
        )


def _fitted_lines(options: FitOptions, record: PadimModel) -> str:
    photographs, calibration = record.photographs, record.calibration
    above = sum(score > calibration.threshold for score in calibration.scores)
    copies = f" (copies left out: {photographs.duplicates})" if photographs.duplicates else ""
    size = record.tensors.bytes + (options.out / JSON_FILE).stat().st_size
    rate = calibration.false_reject_rate
    return "\n".join(
        [
            f"{options.out}: {size / 1e6:.1f} MB; fitted on {photographs.fitted} photographs, "
            f"{photographs.held_out} held out{copies}",
            f"A part is rejected when its score is above {calibration.threshold:.6g}.",
            f"A good part is rejected with a probability of at most {100 * rate:g} %: on average "
            "over such fits, for good parts photographed as these were.",
            *([BORDER_NOTE] if record.protocol.crop_px else []),
            f"Of the {photographs.held_out} held out, {above} lie above it "
            f"({100 * above / photographs.held_out:.1f} %).",
        ]
    )
