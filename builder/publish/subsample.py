"""A random subsample of a dataset, drawn once: what the statistics and the gallery look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from builder.dataset import read_normals
from builder.index import Dataset
from builder.publish.parameters import ShardParameters
from builder.render import render
from builder.storage import Storage

SEED = 0
MAX_SAMPLES = 10_000
MAX_VALUES = 10_000_000  # of all vectors together: 40 MB
MAX_RENDERED = 1000
MAX_NORMAL_BYTES = 400 * 2**20
BATCH = 64


@dataclass
class Subsample:
    """Random samples in index order: index int64 [n], normal int64 [n], theta float32 [n, L].

    The first of `rendered` (positions in a random order) are those that are also painted.
    """

    index: npt.NDArray[np.int64]
    normal: npt.NDArray[np.int64]
    theta: npt.NDArray[np.float32]
    rendered: npt.NDArray[np.int64]

    def take(self, part: ShardParameters) -> None:
        """Keep those rows of a part of the dataset that were chosen."""
        first, last = np.searchsorted(self.index, [part.start, part.start + len(part.theta)])
        rows = self.index[first:last] - part.start
        self.normal[first:last] = part.normal[rows]
        self.theta[first:last] = part.theta[rows]


def choose(dataset: Dataset) -> Subsample:
    """Which samples to look at: at most 10,000, of which at most 1,000 are painted."""
    rng = np.random.default_rng(SEED)
    length, image = dataset.theta.length, dataset.image
    count = min(dataset.samples, MAX_SAMPLES, max(1, MAX_VALUES // length))
    image_bytes = image.size_px**2 * image.channels
    painted = min(count, MAX_RENDERED, max(16, MAX_NORMAL_BYTES // image_bytes))
    return Subsample(
        index=np.sort(rng.choice(dataset.samples, count, replace=False)).astype(np.int64),
        normal=np.zeros(count, np.int64),
        theta=np.zeros((count, length), np.float32),
        rendered=np.sort(rng.permutation(count)[:painted]).astype(np.int64),
    )


@dataclass(frozen=True)
class Painted:
    """The painted part of a subsample: positions in it [n], and the normals by their index."""

    positions: npt.NDArray[np.int64]
    normals: dict[int, npt.NDArray[np.uint8]]
    largest_change: npt.NDArray[np.int64]  # grey levels from the normal image, 0 to 255


def paint(storage: Storage, dataset: Dataset, subsample: Subsample) -> Painted:
    """Render the chosen samples from their stored vectors and normals, and measure the change."""
    wanted = set(subsample.normal[subsample.rendered].tolist())
    normals = read_normals(storage, dataset.normals, dataset.image.channels, wanted)
    change = [
        np.abs(painted.astype(np.int16) - clean).max((1, 2, 3)).astype(np.int64)
        for clean, painted in batches(subsample, normals, subsample.rendered)
    ]
    return Painted(subsample.rendered, normals, np.concatenate(change))


def batches(
    subsample: Subsample,
    normals: dict[int, npt.NDArray[np.uint8]],
    positions: npt.NDArray[np.int64],
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    """Yield (normal, painted) images, each uint8 [n, H, W, C], of positions in order."""
    for first in range(0, len(positions), BATCH):
        part = positions[first : first + BATCH]
        clean = np.stack([normals[i] for i in subsample.normal[part].tolist()])
        yield clean, render(clean, np.arange(len(part)), subsample.theta[part])
