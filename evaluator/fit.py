"""`evaluator fit`: good photographs -> a model with a threshold that keeps a promise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from evaluator import __version__, conformal
from evaluator.artifacts import remove_leftovers
from evaluator.backbones import LayersAndDims, WeightsDefaults, open_backbone, parse_spec
from evaluator.errors import EvaluatorError
from evaluator.images import read_file
from evaluator.model import (
    JSON_FILE,
    TENSORS_FILE,
    Calibration,
    LayerRecord,
    PadimModel,
    Photographs,
    TensorsFile,
    backbone_tensors,
    is_dual,
    library_versions,
    make_scorer,
    save_model,
    score,
    table_tensors,
    tree_of,
)
from evaluator.networks import Network
from evaluator.padim import draw_dims
from evaluator.photographs import decoded_batches, find_photographs, stacked
from evaluator.protocols import Protocol, protocol_sha256
from evaluator.scorer import Scorer
from evaluator.whitening import TILE_BYTES, Tree, make_tables, table_shapes

MIN_FITTED = 2  # a covariance with ddof 1
LARGEST_FLOAT16 = 65504.0
BORDER_NOTE = (
    "The protocol cuts the border off: defects there are not seen; --protocol full sees all."
)
UNLIKELY = 0.01
SPLIT_STREAM = 1  # beside the stream of the dimensions, which is the seed alone


@dataclass(frozen=True)
class FitOptions:
    """The command line of `fit`."""

    normals: Path
    check: Path | None
    out: Path
    spec: str
    weights_defaults: WeightsDefaults
    layers_and_dims: LayersAndDims
    protocol: Protocol
    seed: int
    false_reject_rate: float
    held_out: float
    device: torch.device
    batch_size: int
    max_memory_bytes: int


@dataclass(frozen=True)
class Split:
    """Photographs to fit on, and to choose the threshold with."""

    fitted: list[Path]
    held_out: list[Path]
    record: Photographs
    digests: frozenset[str]


def fit(options: FitOptions) -> str:
    """Fit, choose the threshold, write the model; returns what to print."""
    split = split_photographs(options)
    network, backbone = open_backbone(
        parse_spec(options.spec),
        options.weights_defaults,
        options.layers_and_dims,
        options.protocol.size_px,
        options.device,
    )
    layers = _layer_records(network, draw_dims(network.channels, backbone.dims, options.seed))
    tree, fitted = tree_of(layers), len(split.fitted)
    dual = is_dual(fitted, backbone.dims)
    _check_memory(options, tree, [len(layers[lv.layer].dims) for lv in tree.levels], fitted, dual)
    remove_leftovers(options.out)
    features = extract(network, layers, split.fitted, options, np.float16 if dual else np.float32)
    by_level = [features[level.layer] for level in tree.levels]
    tables = make_tables(tree, by_level, options.protocol.epsilon, dual)
    scorer = make_scorer(network, layers, options.protocol, dual, tables)
    scores = sorted(score_files(scorer, split.held_out, options, "held out"))
    calibration = Calibration(
        false_reject_rate=options.false_reject_rate,
        threshold=conformal.threshold(scores, options.false_reject_rate),
        scores=scores,
    )
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
        tensors=TensorsFile(file=TENSORS_FILE, bytes=8, sha256="0" * 64),
    )
    record = save_model(options.out, record, tensors)
    lines = [_fitted_lines(options, record)]
    if options.check is not None:
        lines.append(_check_line(scorer, options, split, record))
    return "\n".join(lines)


def split_photographs(options: FitOptions) -> Split:
    """List --normals, leave copies out, and hold a seeded share back.

    Raises EvaluatorError when too few are left to fit on or for the false-reject rate.
    """
    folder, rate = options.normals, options.false_reject_rate
    paths = find_photographs(folder)
    first: dict[str, Path] = {}
    for path in tqdm(paths, desc="reading", unit="img", disable=None, leave=False):
        first.setdefault(hashlib.sha256(read_file(path)).hexdigest(), path)
    distinct = sorted(first.values())
    held_out = round(options.held_out * len(distinct))
    needed = conformal.least_held_out(rate)
    if held_out < needed or len(distinct) - held_out < MIN_FITTED:
        in_all = next(
            n
            for n in range(needed + MIN_FITTED, 10**9)
            if round(options.held_out * n) >= needed and n - round(options.held_out * n) >= 2
        )
        raise EvaluatorError(
            f"{folder}: {len(distinct)} different photographs; a false-reject rate of {rate:g} "
            f"needs {needed} held out, so {in_all} in all at --held-out {options.held_out:g}; "
            "photograph more good parts, or raise --false-reject-rate"
        )
    words = np.random.Philox(key=[options.seed, SPLIT_STREAM]).random_raw(len(distinct))
    chosen = set(np.argsort(words, kind="stable")[:held_out].tolist())
    digest = hashlib.sha256()
    for sha256, path in sorted(first.items(), key=lambda item: item[1]):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{sha256} {name}\n".encode(errors="surrogateescape"))
    record = Photographs(
        fitted=len(distinct) - held_out,
        held_out=held_out,
        duplicates=len(paths) - len(distinct),
        sha256=digest.hexdigest(),
    )
    return Split(
        [path for i, path in enumerate(distinct) if i not in chosen],
        [path for i, path in enumerate(distinct) if i in chosen],
        record,
        frozenset(first),
    )


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


def score_files(
    scorer: Scorer, paths: Sequence[Path], options: FitOptions, what: str
) -> list[float]:
    """The scores of photographs, in order; EvaluatorError for one that cannot be read."""
    scores: list[float] = []
    with tqdm(total=len(paths), desc=what, unit="img", disable=None) as bar:
        for batch in decoded_batches(paths, options.protocol, options.batch_size):
            scores += score(scorer, stacked(batch), options.device)[1].tolist()
            bar.update(len(batch))
    return scores


def _fitted_lines(options: FitOptions, record: PadimModel) -> str:
    photographs, calibration = record.photographs, record.calibration
    above = sum(score > calibration.threshold for score in calibration.scores)
    copies = f" (copies left out: {photographs.duplicates})" if photographs.duplicates else ""
    size = sum((options.out / name).stat().st_size for name in (JSON_FILE, TENSORS_FILE))
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


def _check_line(scorer: Scorer, options: FitOptions, split: Split, record: PadimModel) -> str:
    """How many of --check are rejected, with an interval; those of --normals are left out."""
    assert options.check is not None
    found = find_photographs(options.check)
    paths = [p for p in found if hashlib.sha256(read_file(p)).hexdigest() not in split.digests]
    known = f" ({len(found) - len(paths)} that the model knows left out)"
    if not paths:
        raise EvaluatorError(f"{options.check}: no photographs to check with{known}")
    scores = score_files(scorer, paths, options, "check")
    rejected = sum(score > record.calibration.threshold for score in scores)
    low, high = conformal.clopper_pearson(rejected, len(paths))
    calibration = record.calibration
    chance = conformal.chance(
        rejected, len(paths), len(calibration.scores), calibration.false_reject_rate
    )
    line = (
        f"Of {len(paths)} in {options.check}{known if len(paths) < len(found) else ''}, {rejected} "
        f"are rejected ({100 * rejected / len(paths):.1f} %; 95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f} %)."
    )
    if chance >= UNLIKELY:
        return line
    return (
        f"{line}\nSo many have a probability of {chance:.1e} where photographs are like --normals: "
        "these differ from them, and the promise does not hold for such ones. Photograph good "
        "parts as they will be inspected, and fit again."
    )
