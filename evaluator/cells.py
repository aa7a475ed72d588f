"""One cell: one backbone on one category. Computed once, kept on disk, reused by its hash."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from evaluator.artifacts import canonical_json, read_json, sha256_of, write_bytes, write_json
from evaluator.curve import by_metric, learning_curve
from evaluator.datasets import Category
from evaluator.errors import EvaluatorError
from evaluator.features import FeatureCache
from evaluator.gaussians import LayerSource
from evaluator.images import load_mask
from evaluator.metrics import CURVE_FPR, curves, image_pixel_auroc, measure, region_scores
from evaluator.networks import Network
from evaluator.padim import Scored, anomaly_maps, score
from evaluator.plan import Plan, make_plan
from evaluator.protocols import Protocol
from evaluator.ranks import good_false_positive_levels, label_regions
from evaluator.report import Cell, CellConfig, Curves, ImageScore, Scores, StoredFile
from evaluator.statistics import Statistics, load_statistics, save_statistics, statistics

SHOWN = 150  # maps kept per category for the pages
SHOWN_GOOD = 8
SHOWN_PIXELS = 64 * 10**6  # and their pixels together, what image readers take without a warning


@dataclass(frozen=True)
class Resources:
    """What changes no number beyond rounding (1e-6): room, speed, and where files go."""

    out: Path
    features: FeatureCache
    batch_size: int
    max_memory_bytes: int
    cores: int


@dataclass(frozen=True)
class Truth:
    """The ground truth of a category's test images in the crop.

    `regions` int32 [test images, size, size], 0 = none, or None without masks; `image` [regions],
    the test image of each; `defective` bool [test images].
    """

    regions: npt.NDArray[np.int32] | None
    image: npt.NDArray[np.int64]
    defective: npt.NDArray[np.bool_]


def ground_truth(category: Category, protocol: Protocol) -> Truth:
    """Read all masks of a category."""
    defective = np.array([image.defective for image in category.test])
    if not category.has_masks:
        return Truth(None, np.empty(0, np.int64), defective)
    masks = np.zeros((len(category.test), protocol.size_px, protocol.size_px), np.bool_)
    for index, image in enumerate(category.test):
        if image.masks:
            masks[index] = load_mask(image.masks, protocol)
    regions, region_image = label_regions(masks)
    return Truth(regions, region_image, defective)


def choose_shown(category: Category, size_px: int) -> list[int]:
    """The test images whose maps are kept: defective ones, and a few good ones, evenly spaced.

    No look at any score; the same for every backbone.
    """
    defective = [i for i, image in enumerate(category.test) if image.defective]
    good = [i for i, image in enumerate(category.test) if not image.defective]
    most = max(2, min(SHOWN, SHOWN_PIXELS // size_px**2))
    some_good = min(SHOWN_GOOD, most // 2)
    return sorted(_spaced(defective, most - some_good) + _spaced(good, some_good))


def _spaced(items: list[int], most: int) -> list[int]:
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def cell_path(out: Path, category: str, arch: str, config_sha256: str) -> Path:
    """Where a cell lives; the hash makes it unique, the rest is for people."""
    readable = re.sub(r"[^\w.+-]", "_", f"{category}--{arch}")
    short = readable.encode()[:100].decode(errors="ignore")  # file names end at 255 bytes
    return out / "cells" / f"{short}--{config_sha256[:16]}.json"


def finished_cell(out: Path, path: Path, config: CellConfig, backbone: str) -> Cell | None:
    """The cell at `path` if it is there, whole, and of this configuration; else None.

    It carries the name `backbone`, whatever the run that computed it called the same weights.
    """
    if not path.is_file():
        return None
    try:
        cell = read_json(Cell, path)
        for stored in [*cell.scores.statistics, cell.scores.maps]:
            read_stored(out, stored)
    except EvaluatorError as error:
        click.echo(f"computing again: {error.message}", err=True)
        return None
    if cell.config_sha256 != sha256_of(canonical_json(config)):
        return None
    renamed = cell.scores.model_copy(update={"backbone": backbone})
    return cell.model_copy(update={"scores": renamed})


def read_stored(out: Path, stored: StoredFile) -> bytes:
    """The bytes of a file beside the report; EvaluatorError unless they are those recorded."""
    path = out / stored.file
    try:
        size = path.stat().st_size
        if size != stored.bytes:
            raise EvaluatorError(f"{path}: {size} bytes, recorded are {stored.bytes}; is it cut?")
        data = path.read_bytes()
    except OSError as error:
        raise EvaluatorError(f"{path}: cannot be read ({error.strerror})") from None
    if sha256_of(data) != stored.sha256:
        raise EvaluatorError(f"{path}: sha256 is not the recorded one; evaluate again")
    return data


def cell_statistics(out: Path, scores: Scores) -> list[Statistics]:
    """The sufficient statistics of a cell, one per seed."""
    return [
        load_statistics(read_stored(out, stored), str(out / stored.file))
        for stored in scores.statistics
    ]


def shown_levels(out: Path, scores: Scores) -> npt.NDArray[np.uint8]:
    """The kept maps of a cell: uint8 [shown, size, size], see `good_false_positive_levels`."""
    data = read_stored(out, scores.maps)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        tall = np.asarray(picture.convert("L"))
    size_px = tall.shape[1]
    if tall.shape[0] != size_px * len(scores.shown):
        raise EvaluatorError(f"{out / scores.maps.file}: {tall.shape[0]} rows are not its maps'")
    return tall.reshape(len(scores.shown), size_px, size_px)


def compute_cell(
    path: Path,
    network: Network,
    category: Category,
    truth: Truth,
    config: CellConfig,
    resources: Resources,
    on_images: Callable[[int], object],
) -> Cell:
    """Run PaDiM for one backbone on one category, all seeds, and write the cell to `path`."""
    photographs = [*category.train, *(image.path for image in category.test)]
    started = time.perf_counter()
    with resources.features.features(
        network,
        config.weights_sha256,
        config.arch,
        [(photograph, category.image_sha256[photograph]) for photograph in photographs],
        config.protocol,
        config.feature_dtype,
        resources.batch_size,
        on_images,
    ) as features:
        features_s = time.perf_counter() - started
        plan, scored = _score(features.layers, category, config, resources, network)
        curve = learning_curve(features.layers, category, truth, config, resources, network.device)
    shown = choose_shown(category, config.protocol.size_px)
    seeds = _seeds(path, config, truth, scored, shown)
    scores = Scores(
        category=category.name,
        backbone=network.name,
        metrics=by_metric([measure(one) for one in seeds.found]),
        curves=_curves(seeds.found[0]),
        images=_image_scores(seeds.found, truth, scored),
        learning_curve=curve,
        statistics=seeds.stored,
        maps=_store(path, ".maps.png", _tall_png(seeds.levels)),
        shown=shown,
        form=plan.form,
        extracted=features.computed,
        features_s=features_s,
        scoring_s=time.perf_counter() - started - features_s,
        device=network.device.type,
    )
    cell = Cell(
        format="semiformula-report-cell",
        format_version=2,
        config_sha256=sha256_of(canonical_json(config)),
        scores=scores,
    )
    write_json(path, cell)  # last: a cell without its files does not exist
    return cell


def _score(
    layers: Sequence[LayerSource],
    category: Category,
    config: CellConfig,
    resources: Resources,
    network: Network,
) -> tuple[Plan, Scored]:
    dims = [draw.indices for draw in config.dims]
    train, test = len(category.train), len(category.test)
    plan = make_plan(
        network.shapes,
        dims,
        train,
        test,
        resources.max_memory_bytes,
        resources.cores,
        split_seeds=1,
    )
    scored = score(
        layers,
        dims,
        range(train),
        range(train, train + test),
        config.protocol.epsilon,
        plan,
        network.device,
        split_seeds=1,
    )
    return plan, scored


@dataclass(frozen=True)
class _Seeds:
    """What the maps of all seeds gave; `levels` are the first seed's."""

    found: list[Statistics]
    stored: list[StoredFile]
    levels: npt.NDArray[np.uint8]


def _seeds(
    path: Path, config: CellConfig, truth: Truth, scored: Scored, shown: list[int]
) -> _Seeds:
    """Count and store the maps of every seed, one at a time."""
    stored: list[StoredFile] = []
    found: list[Statistics] = []
    levels = np.empty(0, np.uint8)
    for seed, distance in zip(config.seeds, scored.distance, strict=True):
        maps = anomaly_maps(distance, config.protocol)
        one = statistics(maps, truth.regions, truth.defective)
        stored.append(_store(path, f".seed{seed}.npz", save_statistics(one)))
        if not found:
            levels = good_false_positive_levels(maps[shown], maps[~truth.defective])
        found.append(one)
    return _Seeds(found, stored, levels)


def _store(path: Path, suffix: str, data: bytes) -> StoredFile:
    file = path.with_name(path.stem + suffix)
    write_bytes(file, data)
    return StoredFile(
        file=f"{path.parent.name}/{file.name}", bytes=len(data), sha256=sha256_of(data)
    )


def _tall_png(levels: npt.NDArray[np.uint8]) -> bytes:
    """All maps below one another: uint8 [maps, size, size] as one grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(levels.reshape(-1, levels.shape[-1])).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _curves(one: Statistics) -> Curves | None:
    if not one.has_masks:
        return None
    tpr, pro = curves(one, CURVE_FPR)
    return Curves(fpr=list(CURVE_FPR), tpr=tpr.tolist(), pro=pro.tolist())


def image_scores(
    found: Sequence[Statistics], region_image: npt.NDArray[np.int64]
) -> list[ImageScore]:
    """Per test image, without the layers' shares, which the statistics do not hold."""
    first = found[0]
    per_region = region_scores(first, 0.3) if first.has_masks else np.empty(0)
    pixel = image_pixel_auroc(first) if first.has_masks else np.full(len(first.image_score), np.nan)
    return [
        ImageScore(
            score=[float(one.image_score[index]) for one in found],
            pixel_auroc=None if np.isnan(pixel[index]) else float(pixel[index]),
            regions_aupro_30=per_region[region_image == index].tolist(),
            layer_shares=[],
        )
        for index in range(len(first.image_score))
    ]


def _image_scores(found: Sequence[Statistics], truth: Truth, scored: Scored) -> list[ImageScore]:
    """Per test image, with the layers' shares of the squared distance at its highest position."""
    distance = scored.distance[0].reshape(len(scored.distance[0]), -1)
    highest = distance.argmax(axis=1)
    shares = scored.shares[0].reshape(*scored.shares[0].shape[:2], -1)
    result = []
    for index, record in enumerate(image_scores(found, truth.image)):
        parts = shares[:, index, highest[index]].astype(np.float64)
        total = float(parts.sum())
        layers = (parts / total).tolist() if total > 0 else [0.0] * len(parts)
        result.append(record.model_copy(update={"layer_shares": layers}))
    return result
