"""Which form of the algebra, how many rows at once, how many tiles side by side: by counting.

Pure arithmetic on sizes; evaluator/gaussians.py does the work that is counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluator.errors import EvaluatorError
from evaluator.gaussians import Form, columns_at_once, repeated_index

Shape = tuple[int, int, int]  # channels, height, width
# What allocators keep beside the arrays that are counted, per tile at work.
KEPT_SHARE, KEPT_BYTES = 0.05, 12 * 2**20
FORMS: tuple[Form, ...] = ("dual", "primal")
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """How to score; `flops` of all seeds, `peak_bytes` beyond the features that are in memory."""

    form: Form
    tile_rows: int
    workers: int
    peak_bytes: int
    flops: int


@dataclass(frozen=True)
class _Level:
    """One layer's cells; one that the edge of a tile or of a coarser cell cuts counts twice."""

    dims: int
    cells: int  # over the whole grid
    batch: int  # at once


def finest_grid(shapes: Sequence[Shape]) -> tuple[int, int]:
    """Rows and columns of the layer with the most positions."""
    return max((shape[1:] for shape in shapes), key=lambda grid: grid[0] * grid[1])


def chosen_channels(shapes: Sequence[Shape], dims: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(layer, its chosen channels) for the layers with any, the coarsest first.

    `dims` index the channels of all layers, one layer after the other.

    >>> chosen_channels([(4, 8, 8), (4, 4, 4)], [0, 3, 5])
    [(1, [1]), (0, [0, 3])]
    """
    first = 0
    chosen = []
    for index, (channels, _, _) in enumerate(shapes):
        own = [dim - first for dim in dims if 0 <= dim - first < channels]
        first += channels
        if own:
            chosen.append((index, own))
    return sorted(chosen, key=lambda item: shapes[item[0]][1] * shapes[item[0]][2])


def make_plan(
    shapes: Sequence[Shape],
    dims_per_seed: Sequence[Sequence[int]],
    train: int,
    test: int,
    max_memory_bytes: int,
    cores: int,
    split_seeds: int = 0,
    images: int = 0,
) -> Plan:
    """The fastest way within `max_memory_bytes`, by counted floating-point operations.

    `images`: how many the layers hold, if more than `train` + `test`. Raises EvaluatorError when
    not even one row of one tile fits.
    """
    height, width = finest_grid(shapes)
    images = max(images, train + test)
    results = 4 * test * height * width * (len(dims_per_seed) + split_seeds * len(shapes))
    coarsest = min(shape[1] for shape in shapes)
    plans = []
    for rows in range(1, -(-height // coarsest) + 1):
        for form in FORMS:
            levels = [
                _levels(form, shapes, dims, rows, train, train + test) for dims in dims_per_seed
            ]
            flops = sum(_flops(form, each, train, test) for each in levels)
            work = max(_work_bytes(form, each, train, test) for each in levels)
            tile = work + _read_bytes(shapes, dims_per_seed, rows, images)
            tile += int(KEPT_SHARE * tile) + KEPT_BYTES
            tiles = -(-height // rows)
            for workers in range(1, min(cores, tiles) + 1):
                seconds = flops / tiles * -(-tiles // workers)
                plan = Plan(form, rows, workers, results + workers * tile, flops)
                plans.append((seconds, plan.peak_bytes, plan))
    fitting = [plan for plan in plans if plan[1] <= max_memory_bytes]
    if not fitting:
        least = min(plan[1] for plan in plans)
        dims = max(len(dims) for dims in dims_per_seed)
        raise EvaluatorError(
            f"--max-memory: {images} images x {dims} dimensions need {least / 2**30:.3f} GiB, "
            f"allowed are {max_memory_bytes / 2**30:.3f}; raise it or lower --dims"
        )
    return min(fitting, key=lambda plan: plan[:2])[2]


def _levels(
    form: Form,
    shapes: Sequence[Shape],
    dims: Sequence[int],
    tile_rows: int,
    train: int,
    images: int,
) -> list[_Level]:
    """The layers with chosen channels, the coarsest first, on tiles of `tile_rows` rows."""
    height, width = finest_grid(shapes)
    chosen = chosen_channels(shapes, dims)
    tiles = np.arange(height) // tile_rows
    rows = [repeated_index(height, shapes[index][1]) for index, _ in chosen]
    columns = [repeated_index(width, shapes[index][2]) for index, _ in chosen]
    sizes = [
        (_widest(tiles, own) * shapes[index][2], len(channels))
        for (index, channels), own in zip(chosen, rows, strict=True)
    ]
    steps = columns[0] // columns_at_once(form, sizes, shapes[chosen[0][0]][2], train, images)
    levels = []
    for depth, (_, channels) in enumerate(chosen, 1):
        down, across = _counts([tiles, *rows[:depth]]), _counts([steps, *columns[:depth]])
        cells = sum(down) * sum(across)
        levels.append(_Level(len(channels), cells, max(down) * max(across)))
    return levels


def _counts(keys: Sequence[Index]) -> list[int]:
    """For each value of the first of `keys`, how many combinations with the others there are."""
    combinations = np.unique(np.stack(keys), axis=1)
    return np.unique(combinations[0], return_counts=True)[1].tolist()


def _widest(tiles: Index, rows: Index) -> int:
    """The most rows of a layer that one tile reads."""
    firsts = np.flatnonzero(np.diff(tiles, prepend=-1))
    lasts = np.append(firsts[1:], len(tiles)) - 1
    return int((rows[lasts] - rows[firsts]).max()) + 1


def _flops(form: Form, levels: Sequence[_Level], train: int, test: int) -> int:
    """Multiplications and additions as evaluator/gaussians.py does them."""
    both = train + test
    factor = train**3 / 3 + train * train * test
    total = 0.0
    before = 0
    for depth, level in enumerate(levels):
        d, last = level.dims, depth == len(levels) - 1
        each: float
        if form == "primal":
            columns = test if last else both
            each = 2 * d * d * (train + before) + 2 * before * d * (train + columns)
            each += d**3 / 3 + d * d * columns
        elif last and depth > 0 and d < train:
            each = train * train * d + 2 * train * d * (d + test) + d**3 / 3 + d * d * test
        else:
            each = 2 * train * both * d + (factor if depth >= len(levels) - 2 else 0)
        total += each * level.cells
        before += d
    return int(total)


def _work_bytes(form: Form, levels: Sequence[_Level], train: int, test: int) -> int:
    """Most float64 arrays at once: those carried down by coarser layers, and a level's own."""
    both = train + test
    carried = peak = before = 0
    for depth, level in enumerate(levels):
        d, last = level.dims, depth == len(levels) - 1
        x = both * d
        if form == "primal":
            kept = 0 if last else (before + d) * both
            own = 2 * before * d + 3 * d * (test if last else both) + 3 * d * d + kept
        elif last and depth > 0 and d < train:
            kept = 0
            own = 2 * train * d + 3 * d * d + 3 * test * d
        else:
            kept = train * both + train * train + train * test
            own = kept + train * train + train * test
        peak = max(peak, carried + level.batch * (own + x))
        carried += level.batch * (kept + x)
        before += d
    return 8 * peak


def _read_bytes(
    shapes: Sequence[Shape], dims_per_seed: Sequence[Sequence[int]], tile_rows: int, images: int
) -> int:
    """float32 features of a tile: all channels once, and the chosen ones of one seed."""
    height, _ = finest_grid(shapes)
    tiles = np.arange(height) // tile_rows
    row_values = [_widest(tiles, repeated_index(height, h)) * w for _, h, w in shapes]
    read = sum(shape[0] * values for shape, values in zip(shapes, row_values, strict=True))
    taken = 0
    for dims in dims_per_seed:
        chosen = chosen_channels(shapes, dims)
        taken = max(taken, sum(len(own) * row_values[index] for index, own in chosen))
    return 4 * images * (read + taken)
