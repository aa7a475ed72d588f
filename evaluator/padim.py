"""PaDiM's arithmetic on features: random dimensions, Gaussian per position, Mahalanobis, maps.

Pure functions of arrays; method.md, "Evaluation (PaDiM)". Defard et al., "PaDiM: a patch
distribution modeling framework for anomaly detection and localization", ICPR 2021.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from evaluator.errors import EvaluatorError

BLUR_BORDER = "reflect"  # d c b a | a b c d | d c b a, scipy's default
# Larger tiles fall out of the caches and gain nothing.
FASTEST_TILE_BYTES = 128 * 2**20
BLUR_TRUNCATE = 4.0  # the kernel ends at this many sigmas


@dataclass(frozen=True)
class LayerFeatures:
    """Features of one layer: float32 [height * width, images, channels], positions row by row."""

    height: int
    width: int
    values: npt.NDArray[np.float32]


def draw_dims(channels: int, dims: int, seed: int) -> list[int]:
    """`dims` of `channels` indices without repetition, ascending: a pure function of the three.

    The channels with the smallest 64-bit words of NumPy's Philox stream with key `seed`; that
    stream is fixed for good, which `Generator.choice` does not promise.

    >>> draw_dims(5, 5, seed=0)
    [0, 1, 2, 3, 4]
    """
    words = np.random.Philox(key=seed).random_raw(channels)
    return sorted(np.argsort(words, kind="stable")[:dims].tolist())


def repeated_index(fine: int, coarse: int) -> npt.NDArray[np.int64]:
    """For each of `fine` rows (or columns) the nearest of `coarse` ones: floor(i coarse / fine).

    >>> repeated_index(4, 2).tolist()
    [0, 0, 1, 1]
    """
    return np.arange(fine, dtype=np.int64) * coarse // fine


def fit_gaussians(train: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and Cholesky factor of the covariance, per position.

    `train` float64 [positions, images, dims]; the covariance has ddof 1 and `epsilon` added to its
    diagonal. Returns float64 [positions, 1, dims] and lower-triangular [positions, dims, dims].
    Raises EvaluatorError when rounding leaves a covariance that is not positive definite.
    """
    mean = train.mean(dim=1, keepdim=True)
    centred = train - mean
    covariance = centred.mT @ centred / (train.shape[1] - 1)
    covariance.diagonal(dim1=1, dim2=2).add_(epsilon)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        raise EvaluatorError(
            f"a covariance is not positive definite with --epsilon {epsilon:g}; raise it"
        )
    return mean, factor


def mahalanobis(test: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Distance sqrt((x - m)' S^-1 (x - m)) with S = L L': the norm of L^-1 (x - m).

    `test` float64 [positions, images, dims]. Returns float64 [positions, images], no unit, >= 0.
    """
    whitened = torch.linalg.solve_triangular(factor, (test - mean).mT, upper=False)
    return torch.linalg.vector_norm(whitened, dim=1)


def plan_tiles(images: int, dims: int, max_memory_bytes: int, max_workers: int) -> tuple[int, int]:
    """(positions a tile, tiles at once) within `max_memory_bytes`; EvaluatorError when none fits.

    Counted in float64 per position: covariance and factor, and for each image its gathered,
    centred and whitened features.
    """
    per_position = 8 * (2 * dims * dims + 3 * images * dims)
    if per_position > max_memory_bytes:
        raise EvaluatorError(
            f"--max-memory: one position of {images} images x {dims} dimensions needs "
            f"{per_position / 2**30:.3f} GiB, allowed are {max_memory_bytes / 2**30:.3f}; raise it "
            "or lower --dims"
        )
    workers = min(max_workers, max_memory_bytes // per_position)
    room = min(max_memory_bytes // workers, FASTEST_TILE_BYTES)
    return max(1, room // per_position), workers


def usable_workers(device: torch.device) -> int:
    """Tiles worth computing at once: one per usable core on a CPU, one on anything else."""
    return len(os.sched_getaffinity(0)) if device.type == "cpu" else 1


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
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


def distance_tiles(
    layers: Sequence[LayerFeatures],
    dims: Sequence[int],
    train_images: int,
    epsilon: float,
    tile: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Mahalanobis distances of the test images, `workers` tiles of `tile` positions at a time.

    In each layer the first `train_images` images are fitted on, the others scored. Layers are
    repeated (nearest) onto the finest grid; `dims` index their channels one layer after the other.
    Yields (positions of the finest grid, float32 [positions, test images]).
    """
    height, width = finest_grid(layers)

    def score(start: int) -> tuple[slice, npt.NDArray[np.float32]]:
        positions = np.arange(start, min(start + tile, height * width))
        features = torch.from_numpy(_gather(layers, dims, positions, (height, width))).to(device)
        features = features.to(torch.float64)  # eps = 0.01 beside variances of 100: float32 is lost
        mean, factor = fit_gaussians(features[:, :train_images], epsilon)
        distance = mahalanobis(features[:, train_images:], mean, factor)
        return slice(start, start + len(positions)), distance.float().cpu().numpy()

    with _one_thread_each():
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield from pool.map(score, range(0, height * width, tile))
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt need not wait for all tiles


def finest_grid(layers: Sequence[LayerFeatures]) -> tuple[int, int]:
    """Rows and columns of the layer with the most positions."""
    finest = max(layers, key=lambda layer: layer.height * layer.width)
    return finest.height, finest.width


def _gather(
    layers: Sequence[LayerFeatures],
    dims: Sequence[int],
    positions: npt.NDArray[np.int64],
    grid: tuple[int, int],
) -> npt.NDArray[np.float32]:
    """The chosen channels of all layers at `positions` of the grid: [positions, images, dims]."""
    parts = []
    first_channel = 0
    for layer in layers:
        channels = layer.values.shape[2]
        chosen = [dim - first_channel for dim in dims if 0 <= dim - first_channel < channels]
        first_channel += channels
        rows = repeated_index(grid[0], layer.height)[positions // grid[1]]
        columns = repeated_index(grid[1], layer.width)[positions % grid[1]]
        # A coarse position serves many fine ones: read it from disk once.
        needed, back = np.unique(rows * layer.width + columns, return_inverse=True)
        parts.append(np.stack([layer.values[p][:, chosen] for p in needed])[back])
    return np.concatenate(parts, axis=2)


def anomaly_maps(
    distance: npt.NDArray[np.float32], size_px: int, blur_sigma_px: float
) -> npt.NDArray[np.float32]:
    """Score per pixel: bilinear upsampling (half-pixel centres), then a Gaussian blur.

    `distance` float32 [images, rows, columns] on the feature grid. Returns float32
    [images, size_px, size_px]; beyond its border the map is mirrored (scipy's `reflect`).
    """
    maps = np.empty((len(distance), size_px, size_px), np.float32)
    for index, grid in enumerate(distance):
        fine = F.interpolate(
            torch.from_numpy(grid)[None, None], (size_px, size_px), mode="bilinear"
        )[0, 0].numpy()
        if blur_sigma_px > 0:
            gaussian_filter(
                fine, blur_sigma_px, output=maps[index], mode=BLUR_BORDER, truncate=BLUR_TRUNCATE
            )
        else:
            maps[index] = fine
    return maps
