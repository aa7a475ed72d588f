"""One cell: one backbone on one category. Computed once, kept on disk, reused by its hash."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from evaluator.artifacts import canonical_json, read_json, sha256_of, write_bytes, write_json
from evaluator.errors import EvaluatorError
from evaluator.features import extract, feature_store
from evaluator.inspection import Category, load_mask
from evaluator.metrics import auroc, rarity, share_thresholds
from evaluator.networks import Network
from evaluator.padim import (
    LayerFeatures,
    anomaly_maps,
    distance_tiles,
    finest_grid,
    plan_tiles,
    usable_workers,
)
from evaluator.report import Cell, CellConfig, DimsOfSeed, HeatMaps, Protocol, Scores

EXAMPLES = 4  # defective test images per category on the page of heat maps


@dataclass(frozen=True)
class Resources:
    """What does not change the numbers: room, speed, and where files go."""

    out: Path
    batch_size: int
    max_memory_bytes: int


def ground_truth(category: Category, protocol: Protocol) -> npt.NDArray[np.bool_]:
    """All test masks of a category: bool [test images, size, size], False on good images."""
    size_px = protocol.crop_px or protocol.resize_px
    masks = np.zeros((len(category.test), size_px, size_px), np.bool_)
    for index, image in enumerate(category.test):
        if image.mask is not None:
            masks[index] = load_mask(image.mask, protocol.resize_px, protocol.crop_px)
    return masks


def choose_examples(category: Category, masks: npt.NDArray[np.bool_]) -> list[int]:
    """Up to `EXAMPLES` test images to show: kinds of defect in turn, each by its middle one.

    The middle one by defective area in the crop, then its neighbours: neither the easiest nor the
    hardest, and no look at any score.
    """
    queues = []
    for defect in category.defects:
        found = [i for i, image in enumerate(category.test) if image.defect == defect]
        found.sort(key=lambda i: (int(masks[i].sum()), i))
        middle = len(found) // 2
        queues.append(sorted(found, key=lambda i: abs(found.index(i) - middle)))
    order: list[int] = []
    for turn in range(EXAMPLES):
        order += [queue[turn] for queue in queues if turn < len(queue)]
    return order[:EXAMPLES]


def cell_path(out: Path, category: str, arch: str, config_sha256: str) -> Path:
    """Where a cell lives; the hash makes it unique, the rest is for people."""
    readable = re.sub(r"[^\w.+-]", "_", f"{category}--{arch}")
    return out / "cells" / f"{readable}--{config_sha256[:16]}.json"


def finished_cell(path: Path, config: CellConfig, backbone: str) -> Cell | None:
    """The cell at `path` if it is there, whole, and of this configuration; else None.

    It carries the name `backbone`, whatever the run that computed it called the same weights.
    """
    if not path.is_file():
        return None
    try:
        cell = read_json(Cell, path)
        heat_maps(path, cell)
    except EvaluatorError as error:
        click.echo(f"computing again: {error.message}", err=True)
        return None
    if cell.config_sha256 != sha256_of(canonical_json(config)):
        return None
    renamed = cell.scores.model_copy(update={"backbone": backbone})
    return cell.model_copy(update={"scores": renamed})


def heat_maps(path: Path, cell: Cell) -> npt.NDArray[np.uint8]:
    """The example maps of a cell: uint8 [examples, size, size], see `metrics.rarity`."""
    file = path.parent / cell.heat_maps.file
    try:
        data = file.read_bytes()
    except OSError as error:
        raise EvaluatorError(f"{file}: cannot be read ({error.strerror})") from None
    if sha256_of(data) != cell.heat_maps.sha256:
        raise EvaluatorError(f"{file}: sha256 is not the one in {path.name}")
    maps: npt.NDArray[np.uint8] = np.load(io.BytesIO(data), allow_pickle=False)
    return maps


def compute_cell(
    path: Path,
    network: Network,
    category: Category,
    config: CellConfig,
    resources: Resources,
    bar: tqdm,
) -> Cell:
    """Run PaDiM for one backbone on one category, all seeds, and write the cell to `path`."""
    protocol = config.protocol
    masks = ground_truth(category, protocol)
    examples = choose_examples(category, masks)
    paths = [*category.train, *(image.path for image in category.test)]
    with feature_store(network, len(paths), resources.out) as layers:
        started = time.perf_counter()
        extract(
            network,
            paths,
            protocol.resize_px,
            protocol.crop_px,
            resources.batch_size,
            layers,
            bar.update,
        )
        features_s = time.perf_counter() - started
        pixel: list[float] = []
        image: list[float] = []
        shown = np.empty(0, np.uint8)
        for dims in config.dims:
            bar.set_postfix_str(f"seed {len(pixel) + 1} of {len(config.dims)}")
            maps = _maps_of_seed(network, layers, dims, len(category.train), protocol, resources)
            pixel.append(auroc(masks, maps))
            is_defective = np.array([item.mask is not None for item in category.test])
            image.append(auroc(is_defective, maps.max(axis=(1, 2))))
            if len(pixel) == 1:
                shown = rarity(maps[examples], share_thresholds(maps))
    scores = Scores(
        category=category.name,
        backbone=network.name,
        pixel_auroc=pixel,
        image_auroc=image,
        images=len(paths),
        images_per_s=len(paths) / features_s,
        features_s=features_s,
        scoring_s=time.perf_counter() - started - features_s,
        device=network.device.type,
    )
    return _write_cell(path, config, scores, shown, examples)


def _maps_of_seed(
    network: Network,
    layers: Sequence[LayerFeatures],
    dims: DimsOfSeed,
    train_images: int,
    protocol: Protocol,
    resources: Resources,
) -> npt.NDArray[np.float32]:
    """Score maps of all test images for one seed: float32 [test images, size, size]."""
    images = layers[0].values.shape[1]
    rows, columns = finest_grid(layers)
    tile, workers = plan_tiles(
        images, len(dims.indices), resources.max_memory_bytes, usable_workers(network.device)
    )
    distance = np.empty((images - train_images, rows * columns), np.float32)
    for positions, values in distance_tiles(
        layers, dims.indices, train_images, protocol.epsilon, tile, workers, network.device
    ):
        distance[:, positions] = values.T
    size_px = protocol.crop_px or protocol.resize_px
    return anomaly_maps(distance.reshape(-1, rows, columns), size_px, protocol.blur_sigma_px)


def _write_cell(
    path: Path,
    config: CellConfig,
    scores: Scores,
    shown: npt.NDArray[np.uint8],
    examples: list[int],
) -> Cell:
    buffer = io.BytesIO()
    np.save(buffer, shown, allow_pickle=False)
    cell = Cell(
        format="semiformula-report-cell",
        format_version=1,
        config_sha256=sha256_of(canonical_json(config)),
        scores=scores,
        heat_maps=HeatMaps(
            file=f"{path.stem}.npy",
            sha256=sha256_of(buffer.getvalue()),
            seed=config.protocol.seeds[0],
            test_images=examples,
        ),
    )
    write_bytes(path.with_name(cell.heat_maps.file), buffer.getvalue())
    write_json(path, cell)  # last: a cell without its maps does not exist
    return cell
