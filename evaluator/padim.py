"""PaDiM on features: random dimensions, Mahalanobis distances of all seeds in one pass, maps.

Method.md, "Evaluation (PaDiM)". Defard et al., "PaDiM: a patch distribution modeling framework
for anomaly detection and localization", ICPR 2021. The algebra is in evaluator/gaussians.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from evaluator.gaussians import LayerSource, Level, score_tile
from evaluator.gaussians import repeated_index as repeated_index
from evaluator.plan import Plan, chosen_channels, finest_grid
from evaluator.protocols import Protocol

BLUR_TRUNCATE = 4.0  # the kernel ends at this many sigmas
# NumPy's names of the borders that scipy calls reflect and mirror.
BORDERS = {"reflect": "symmetric", "mirror": "reflect"}
MAPS_AT_ONCE = 16


@dataclass(frozen=True)
class Scored:
    """Mahalanobis distances, float32 [seeds, test, rows, columns], and their split into layers.

    `shares` float32 [split seeds, layers, test, rows, columns]: what each layer adds to the squared
    distance given the coarser ones; >= 0, over the layers they sum to `distance` squared.
    """

    distance: npt.NDArray[np.float32]
    shares: npt.NDArray[np.float32]


def draw_dims(channels: int, dims: int, seed: int) -> list[int]:
    """`dims` of `channels` indices without repetition, ascending: a pure function of the three.

    The channels with the smallest 64-bit words of NumPy's Philox stream with key `seed`; that
    stream is fixed for good, which `Generator.choice` does not promise.

    >>> draw_dims(5, 5, seed=0)
    [0, 1, 2, 3, 4]
    """
    words = np.random.Philox(key=seed).random_raw(channels)
    return sorted(np.argsort(words, kind="stable")[:dims].tolist())


def usable_cores(device: torch.device) -> int:
    """Tiles worth computing at once: one per usable core on a CPU, one on anything else."""
    return len(os.sched_getaffinity(0)) if device.type == "cpu" else 1


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch operations on one thread each while tiles run side by side.

    Threads inside a batch of small triangular solves wait for one another at every matrix: 20 s
    instead of 0.3 s for 3136 of 100 x 100 where another process wanted the two cores as well.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def score(
    layers: Sequence[LayerSource],
    dims_per_seed: Sequence[Sequence[int]],
    train: Sequence[int],
    test: Sequence[int],
    epsilon: float,
    plan: Plan,
    device: torch.device,
    split_seeds: int = 0,
    on_tile: Callable[[int, int], object] | None = None,
) -> Scored:
    """Mahalanobis distances of the `test` images to Gaussians of the `train` images, per position.

    Both index the images of `layers`; each of `dims_per_seed` indexes the channels of all layers,
    one layer after the other. A tile's features are read once for all seeds; layers are repeated
    (nearest) onto the finest grid. The covariance has ddof 1 and `epsilon` on its diagonal.
    `on_tile` hears (tiles done, tiles). Raises EvaluatorError when rounding leaves a covariance
    that is not positive definite and for features that are not finite.
    """
    shapes = [(layer.channels, layer.height, layer.width) for layer in layers]
    height, width = finest_grid(shapes)
    images = np.array([*train, *test])
    distance = np.empty((len(dims_per_seed), len(test), height, width), np.float32)
    shares = np.zeros((split_seeds, len(layers), len(test), height, width), np.float32)
    chosen = [chosen_channels(shapes, dims) for dims in dims_per_seed]

    def work(start: int) -> None:
        rows = slice(start, min(start + plan.tile_rows, height))
        tile = [_read(layer, rows, (height, width)) for layer in layers]
        for seed, own in enumerate(chosen):
            levels = [_take(*tile[index], channels, images, device) for index, channels in own]
            split = seed < split_seeds
            squares = score_tile(levels, len(train), epsilon, plan.form, split)
            distance[seed, :, rows] = squares.sum(0).sqrt().cpu().numpy()
            if split:
                found = squares.cpu().numpy()
                for (index, _), values in zip(own, found, strict=True):
                    shares[seed, index, :, rows] = values

    starts = range(0, height, plan.tile_rows)
    with one_thread_each():
        pool = ThreadPoolExecutor(plan.workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for done, _ in enumerate(pool.map(work, starts), 1):
                if on_tile is not None:
                    on_tile(done, len(starts))
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt need not wait for all tiles
    return Scored(distance, shares)


_Rows = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _read(layer: LayerSource, rows: slice, grid: tuple[int, int]) -> _Rows:
    """The layer's features that a tile reads, and the row and column of them at each position."""
    index = repeated_index(grid[0], layer.height)[rows]
    features = layer.read(int(index[0]), int(index[-1]) + 1)
    return features, index - index[0], repeated_index(grid[1], layer.width)


def _take(
    features: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    channels: Sequence[int],
    images: npt.NDArray[np.int64],
    device: torch.device,
) -> Level:
    taken = features.take(channels, axis=3)
    if not np.array_equal(images, np.arange(len(features))):
        taken = taken[images]
    flat = torch.from_numpy(taken.reshape(len(images), -1, len(channels)))
    return Level(flat.to(device), features.shape[2], rows, columns)


def anomaly_maps(distance: npt.NDArray[np.float32], protocol: Protocol) -> npt.NDArray[np.float32]:
    """Score per pixel: bilinear upsampling (half-pixel centres), then a Gaussian blur.

    `distance` float32 [..., rows, columns] on the feature grid. Returns float32
    [..., size, size]. Both steps are linear along rows and along columns, so that each axis takes
    one matrix: map = P distance Q', computed in float64.
    """
    rows, columns = distance.shape[-2:]
    size = protocol.size_px
    down, across = enlargement(rows, protocol), enlargement(columns, protocol).T
    grids = distance.reshape(-1, rows, columns)
    maps = np.empty((len(grids), size, size), np.float32)
    for start in range(0, len(grids), MAPS_AT_ONCE):
        part = slice(start, start + MAPS_AT_ONCE)
        maps[part] = down @ grids[part].astype(np.float64) @ across
    return maps.reshape(*distance.shape[:-2], size, size)


def enlargement(cells: int, protocol: Protocol) -> npt.NDArray[np.float64]:
    """Upsampling from `cells` to the protocol's size and its blur along one axis: [size, cells]."""
    size = protocol.size_px
    return _blur_matrix(size, protocol) @ _bilinear_matrix(size, cells)


def _bilinear_matrix(size: int, cells: int) -> npt.NDArray[np.float64]:
    """Weights [size, cells] of torch's bilinear interpolation with align_corners=False."""
    place = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, cells - 1)
    matrix = np.zeros((size, cells))
    pixels = np.arange(size)
    np.add.at(matrix, (pixels, low), 1 - (place - low))
    np.add.at(matrix, (pixels, high), place - low)
    return matrix


def _blur_matrix(size: int, protocol: Protocol) -> npt.NDArray[np.float64]:
    """Weights [size, size] of a Gaussian blur along one axis, beyond the border mirrored."""
    sigma = protocol.blur_sigma_px
    if sigma == 0:
        return np.eye(size)
    radius = protocol.blur_radius_px or int(BLUR_TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    source = np.pad(np.arange(size), radius, mode=BORDERS[protocol.blur_border])  # type: ignore[call-overload]
    matrix = np.zeros((size, size))
    for index, weight in enumerate(kernel):
        np.add.at(matrix, (np.arange(size), source[index : index + size]), weight)
    return matrix
