"""Mahalanobis distances on a tile of positions, exact, with the work of coarse layers shared.

Layers come coarsest first. A cell of a coarse layer serves a block of finer positions; what it
contributes is computed once, and the finer layers of the block are whitened given it: the block
Cholesky factorisation of the covariance S = A'A + eps I, A = centred features / sqrt(N - 1).
The coarser part is carried in one of two forms (method.md, "Exact algebra"), d = x - mean:

* primal, for dimensions < images: rows Y = L^-1 [A' d] of the factor S = L L';
* dual, for images < dimensions: G = [A A' | A d], from which L L' = A A' + eps I and v = L^-1 A d,
  so that d' S^-1 d = (|d|^2 - |v|^2) / eps. A finer layer with few dimensions f is then added
  without cancellation: its Schur complement is eps (I + W'W), W = L^-1 A_f, its residual
  d_f - W'v.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from evaluator.errors import EvaluatorError

Form = Literal["dual", "primal"]
CACHE_BYTES = 4 * 2**20  # what is worked on at once: larger batches gain nothing
# In exact arithmetic no pivot of a covariance + eps I lies below eps.
LOWEST_PIVOT = 0.99
# The relative rounding error of a squared distance grows with trace(A'A) / eps, a bound of both the
# condition number of S and what |d|^2 - |v|^2 cancels: at this one 1e-5 was the most measured.
MOST_VARIANCE = 1e11


def repeated_index(fine: int, coarse: int) -> npt.NDArray[np.int64]:
    """For each of `fine` rows (or columns) the nearest of `coarse` ones: floor(i coarse / fine).

    >>> repeated_index(4, 2).tolist()
    [0, 0, 1, 1]
    """
    return np.arange(fine, dtype=np.int64) * coarse // fine


class LayerSource(Protocol):
    """Features of one layer for all images of a category, read by rows of its grid."""

    @property
    def images(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...

    def read(self, first_row: int, last_row: int) -> npt.NDArray[np.float32]:
        """float32 [images, last_row - first_row, width, channels]."""
        ...


@dataclass(frozen=True)
class Level:
    """One layer on a tile: chosen features and the cell that each fine position reads.

    `features` float32 [train + test images, rows * width, dims], the training images first;
    `rows[i]` and `columns[j]` are the row and column of position (i, j) of the tile.
    """

    features: torch.Tensor
    width: int
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Carried:
    """What the finer layers need of the coarser ones, for a batch of cells; all float64.

    A layer's share of the squared distance is what it adds to that of the coarser layers.
    """

    shares: torch.Tensor  # [cells, layers so far, test]; dual without split: their sum
    whitened: (
        torch.Tensor
    )  # primal Y [cells, dims so far, train + test]; dual v [cells, train, test]
    gram: torch.Tensor  # dual G [cells, train, train + test]
    square: torch.Tensor  # dual |d|^2 [cells, test]
    factor: torch.Tensor  # dual L [cells, train, train]

    def of(self, cells: list[int]) -> _Carried:
        if cells == list(range(len(self.shares))):
            return self
        return _Carried(*(getattr(self, field)[cells] for field in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Tile:
    levels: Sequence[Level]
    train: int
    epsilon: float
    form: Form
    split: bool
    found: torch.Tensor  # [levels or 1, test, rows * columns]
    variance: torch.Tensor  # [levels], the largest sum over dims at any cell so far


_Block = tuple[slice, slice]  # rows and columns of positions whose coarser cells are the same


def score_tile(
    levels: Sequence[Level], train: int, epsilon: float, form: Form, split: bool
) -> torch.Tensor:
    """Squared Mahalanobis distances of the test images, float64 [1, test, rows, columns].

    With `split` [levels, ...]: the share of each level given the coarser ones; they are >= 0 and
    sum to the squared distance. Raises EvaluatorError when rounding leaves a matrix that is not
    positive definite, for variances above `MOST_VARIANCE` epsilon, and for features that are not
    finite.
    """
    first = levels[0]
    images = first.features.shape[0]
    rows, columns = len(first.rows), len(first.columns)
    found = torch.empty(
        (len(levels) if split else 1, images - train, rows * columns),
        dtype=torch.float64,
        device=first.features.device,
    )
    tile = _Tile(levels, train, epsilon, form, split, found, found.new_zeros(len(levels)))
    sizes = [(level.features.shape[1], level.features.shape[2]) for level in levels]
    step = columns_at_once(form, sizes, first.width, train, images)
    for column in range(0, first.width, step):
        start, stop = np.searchsorted(first.columns, (column, column + step))
        if start < stop:
            _visit(tile, 0, [(slice(0, rows), slice(int(start), int(stop)))], None)
    found *= train - 1  # A and d both carry 1 / sqrt(N - 1)
    _check_finite(found)
    _check_variance(float(tile.variance.sum()), epsilon)
    return found.view(*found.shape[:2], rows, columns)


def columns_at_once(
    form: Form, sizes: Sequence[tuple[int, int]], width: int, train: int, images: int
) -> int:
    """Columns of the coarsest layer in a batch; `sizes` (cells, dims) of the levels on a tile."""
    values = before = 0
    for index, (cells, dims) in enumerate(sizes):
        carried = train if form == "dual" else before
        values += cells * (dims + (carried if index < len(sizes) - 1 else 0))
        before += dims
    return max(1, min(width, CACHE_BYTES * width // (8 * images * values)))


def _visit(tile: _Tile, depth: int, blocks: list[_Block], parents: _Carried | None) -> None:
    """Score blocks of positions; `parents` are the coarser cells of each."""
    level = tile.levels[depth]
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (rows, columns) in enumerate(blocks):
        ys, xs = level.rows[rows], level.columns[columns]
        shape = int(ys[-1] - ys[0]) + 1, int(xs[-1] - xs[0]) + 1
        groups.setdefault(shape, []).append(index)
    for shape, members in groups.items():
        group = [blocks[index] for index in members]
        x = _centred(level, group, shape, tile.train)
        variance = x[: tile.train].square().sum((0, 2)).max()
        tile.variance[depth] = torch.maximum(tile.variance[depth], variance)
        above = None if parents is None else parents.of(members)
        if depth == len(tile.levels) - 1:
            _write(tile, level, group, shape, _finish(tile, x, above, len(group)))
            continue
        if tile.form == "primal":
            cells = _primal(tile, x, above, len(group), last=False)
        else:
            cells = _dual(tile, x, above, tile.split or depth == len(tile.levels) - 2)
        below, used = _below(level, group, shape)
        _visit(tile, depth + 1, below, cells.of(used))


def _finish(tile: _Tile, x: torch.Tensor, above: _Carried | None, blocks: int) -> torch.Tensor:
    """Shares float64 [cells, levels or 1, test] of the finest level's cells."""
    if tile.form == "primal":
        shares = _primal(tile, x, above, blocks, last=True).shares
    elif above is not None and x.shape[2] < tile.train:
        shares = _dual_last(tile, x, above)
    else:
        shares = _dual(tile, x, above, factor=True).shares
    return shares if tile.split else shares.sum(1, keepdim=True)


def _below(
    level: Level, blocks: list[_Block], shape: tuple[int, int]
) -> tuple[list[_Block], list[int]]:
    """The blocks below each cell of `blocks`, and the index of the cell of each."""
    below, used = [], []
    for index, (rows, columns) in enumerate(blocks):
        across = _runs(level.columns, columns, shape[1])
        for i, high in enumerate(_runs(level.rows, rows, shape[0])):
            for j, wide in enumerate(across):
                if high.start < high.stop and wide.start < wide.stop:
                    below.append((high, wide))
                    used.append((index * shape[0] + i) * shape[1] + j)
    return below, used


def _runs(index: npt.NDArray[np.int64], part: slice, cells: int) -> list[slice]:
    """The positions within `part` that read each of its `cells` consecutive cells."""
    own = index[part]
    edges = (part.start + np.searchsorted(own, np.arange(cells + 1) + own[0])).tolist()
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def _write(
    tile: _Tile, level: Level, blocks: list[_Block], shape: tuple[int, int], shares: torch.Tensor
) -> None:
    """Put the shares of each cell at the positions that read it."""
    places, cells = [], []
    for index, (rows, columns) in enumerate(blocks):
        ys, xs = level.rows[rows], level.columns[columns]
        across = np.arange(columns.start, columns.stop)
        down = np.arange(rows.start, rows.stop)[:, None]
        places.append((down * len(level.columns) + across).ravel())
        cells.append((((ys - ys[0])[:, None] + index * shape[0]) * shape[1] + xs - xs[0]).ravel())
    place, cell = np.concatenate(places), np.concatenate(cells)
    tile.found[:, :, place] = shares[cell].permute(1, 2, 0)


def _centred(
    level: Level, blocks: list[_Block], shape: tuple[int, int], train: int
) -> torch.Tensor:
    """(x - mean of the training images) / sqrt(N - 1): float64 [images, cells, dims].

    The cells of one block after another, row by row.
    """
    top = np.array([level.rows[rows.start] for rows, _ in blocks])
    left = np.array([level.columns[columns.start] for _, columns in blocks])
    y = top[:, None, None] + np.arange(shape[0])[:, None]
    cells = torch.from_numpy((y * level.width + left[:, None, None] + np.arange(shape[1])).ravel())
    x = level.features.index_select(1, cells.to(level.features.device)).to(torch.float64)
    x -= x[:train].mean(0)
    return x.mul_((train - 1) ** -0.5)


def _check_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise EvaluatorError("features are not finite; wrong --input-norm, or damaged weights?")


def _check_variance(variance: float, epsilon: float) -> None:
    if variance > MOST_VARIANCE * epsilon:
        raise EvaluatorError(
            f"variances of the features sum to {variance:.2g} at a position; with --epsilon "
            f"{epsilon:g} at most {MOST_VARIANCE * epsilon:.2g} can be scored to 1e-4; raise "
            "--epsilon, or take a backbone with smaller features"
        )


def _cholesky(matrices: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Cholesky factors of batched matrices after adding `epsilon` to their diagonals, in place."""
    matrices.diagonal(dim1=1, dim2=2).add_(epsilon)
    factors, failed = torch.linalg.cholesky_ex(matrices)
    pivots = factors.diagonal(dim1=1, dim2=2).square()
    if bool(failed.any()) or not bool((pivots > LOWEST_PIVOT * epsilon).all()):
        _check_finite(matrices)
        raise EvaluatorError(
            f"a covariance is not positive definite with --epsilon {epsilon:g}; raise it"
        )
    return factors


def _by_block(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """[images, blocks * cells, dims] -> [blocks, images, cells * dims]."""
    return x.view(len(x), blocks, -1).transpose(0, 1)


def _by_cell(blocks: torch.Tensor, dims: int) -> torch.Tensor:
    """[blocks, rows, cells * dims] -> [blocks * cells, rows, dims]."""
    rows = blocks.shape[1]
    return blocks.view(len(blocks), rows, -1, dims).transpose(1, 2).reshape(-1, rows, dims)


def _solve(factors: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve_triangular(factors, right, upper=False)


def _primal(
    tile: _Tile, x: torch.Tensor, above: _Carried | None, blocks: int, last: bool
) -> _Carried:
    """Whiten the cells' dims given the coarser ones: S = A'A + eps - B'B, B = Y_train A."""
    images, cells, dims = x.shape
    a = x[: tile.train].transpose(0, 1)  # [cells, train, dims]
    schur = a.mT @ a
    rest = _by_block(x[tile.train :] if last else x, blocks)
    if above is not None:
        before = above.whitened
        b = before[:, :, : tile.train] @ _by_block(x[: tile.train], blocks)
        scored = before[:, :, images - rest.shape[1] :]
        rest = torch.baddbmm(rest, scored.mT, b, alpha=-1)
        b = _by_cell(b, dims)
        schur.baddbmm_(b.mT, b, alpha=-1)
    y = _solve(_cholesky(schur, tile.epsilon), _by_cell(rest, dims).mT)
    shares = y[:, :, tile.train - images :].square().sum(1, keepdim=True)
    if above is not None:
        shares = torch.cat((above.shares.repeat_interleave(cells // blocks, 0), shares), 1)
        if not last:
            y = torch.cat((before.repeat_interleave(cells // blocks, 0), y), 1)
    none = x.new_empty((cells, 0))
    return _Carried(shares, y, none, none, none)


def _dual(tile: _Tile, x: torch.Tensor, above: _Carried | None, factor: bool) -> _Carried:
    """Add the cells' Grams to the coarser ones'; with `factor` also L, v and the shares so far."""
    cells = x.shape[1]
    a = x[: tile.train].transpose(0, 1)
    both = x.permute(1, 2, 0)  # [cells, dims, train + test]
    square = x[tile.train :].square().sum(2).T
    if above is None:
        gram = a @ both
    else:
        below = cells // len(above.gram)
        gram = above.gram.repeat_interleave(below, 0).baddbmm_(a, both)
        square = square + above.square.repeat_interleave(below, 0)
    none = x.new_empty((cells, 0))
    if not factor:
        return _Carried(none, none, gram, square, none)
    lower = _cholesky(gram[:, :, : tile.train].clone(), tile.epsilon)
    v = _solve(lower, gram[:, :, tile.train :])
    shares = (square - v.square().sum(1)).div_(tile.epsilon).clamp_(min=0)[:, None]
    if above is not None and tile.split:
        before = above.shares.repeat_interleave(below, 0)
        share = (shares - before.sum(1, keepdim=True)).clamp_(min=0)
        shares = torch.cat((before, share), 1)
    return _Carried(shares, v, gram, square, lower)


def _dual_last(tile: _Tile, x: torch.Tensor, above: _Carried) -> torch.Tensor:
    """Shares with the last layer: Schur complement eps (I + W'W), W = L^-1 A."""
    _, cells, dims = x.shape
    blocks = len(above.factor)
    a = _by_block(x[: tile.train], blocks)
    # From the right, as W' L' = A': no copy into the column order that LAPACK wants.
    w = torch.linalg.solve_triangular(above.factor.mT, a.mT, upper=True, left=False).mT
    rest = torch.baddbmm(_by_block(x[tile.train :], blocks), above.whitened.mT, w, alpha=-1)
    w = _by_cell(w, dims)
    y = _solve(_cholesky(w.mT @ w, 1.0), _by_cell(rest, dims).mT)
    share = y.square().sum(1, keepdim=True).div_(tile.epsilon)
    return torch.cat((above.shares.repeat_interleave(cells // blocks, 0), share), 1)
