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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from evaluator.errors import EvaluatorError

Form = Literal["dual", "primal"]
ROOT_CELLS = (
    16  # cells of the coarsest layer at once: enough for a batch, few enough for the caches
)
# In exact arithmetic no pivot of a covariance + eps I lies below eps.
LOWEST_PIVOT = 0.99


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
class ArrayLayer:
    """Features in memory: float32 [images, height, width, channels]."""

    values: npt.NDArray[np.float32]

    @property
    def images(self) -> int:
        return self.values.shape[0]

    @property
    def height(self) -> int:
        return self.values.shape[1]

    @property
    def width(self) -> int:
        return self.values.shape[2]

    @property
    def channels(self) -> int:
        return self.values.shape[3]

    def read(self, first_row: int, last_row: int) -> npt.NDArray[np.float32]:
        return self.values[:, first_row:last_row]


@dataclass(frozen=True)
class Level:
    """One layer on a tile: chosen features and the cell that each fine position reads.

    `features` float32 [train + test images, rows, columns, dims], the training images first;
    `rows[i]` and `columns[j]` are the cell of position (i, j) of the tile.
    """

    features: torch.Tensor
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Carried:
    """What the finer layers need of the coarser ones, for a batch of cells; all float64.

    A layer's share of the squared distance is what it adds to that of the coarser layers.
    """

    shares: torch.Tensor  # [cells, layers so far, test]; dual without --split: their sum
    whitened: (
        torch.Tensor
    )  # primal Y [cells, dims so far, train + test]; dual v [cells, train, test]
    gram: torch.Tensor  # dual G [cells, train, train + test]
    square: torch.Tensor  # dual |d|^2 [cells, test]
    factor: torch.Tensor  # dual L [cells, train, train]

    def cell(self, index: int) -> _Carried:
        return _Carried(*(getattr(self, field)[index] for field in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Tile:
    levels: Sequence[Level]
    train: int
    epsilon: float
    form: Form
    split: bool
    found: torch.Tensor  # [levels or 1, test, rows, columns]


def score_tile(
    levels: Sequence[Level], train: int, epsilon: float, form: Form, split: bool
) -> torch.Tensor:
    """Squared Mahalanobis distances of the test images, float64 [1, test, rows, columns].

    With `split` [levels, ...]: the share of each level given the coarser ones; they are >= 0 and
    sum to the squared distance. Raises EvaluatorError when rounding leaves a matrix that is not
    positive definite, and for features that are not finite.
    """
    first = levels[0]
    images = first.features.shape[0]
    found = torch.empty(
        (len(levels) if split else 1, images - train, len(first.rows), len(first.columns)),
        dtype=torch.float64,
        device=first.features.device,
    )
    tile = _Tile(levels, train, epsilon, form, split, found)
    rows = int(first.rows[-1] - first.rows[0]) + 1
    step = max(1, ROOT_CELLS // rows)
    for column in range(0, int(first.columns[-1]) + 1, step):
        start, stop = np.searchsorted(first.columns, (column, column + step))
        if start < stop:
            _visit(tile, 0, slice(0, len(first.rows)), slice(int(start), int(stop)), None)
    found *= train - 1  # A and d both carry 1 / sqrt(N - 1)
    _check_finite(found)
    return found


def _visit(tile: _Tile, depth: int, rows: slice, columns: slice, parent: _Carried | None) -> None:
    """Score the positions of a block; its coarser cells, `parent`, are the same everywhere."""
    level = tile.levels[depth]
    ys, xs = level.rows[rows], level.columns[columns]
    block = level.features[:, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    height, width = block.shape[1:3]
    x = _centred(block, tile.train)
    last = depth == len(tile.levels) - 1
    if tile.form == "primal":
        cells = _primal(tile, x, parent, last)
    elif last and parent is not None and x.shape[2] < tile.train:
        cells = _dual_last(tile, x, parent)
    else:
        cells = _dual(tile, x, parent, last or tile.split or depth == len(tile.levels) - 2)
    if last:
        shares = cells.shares if tile.split else cells.shares.sum(1, keepdim=True)
        grid = shares.reshape(height, width, *shares.shape[1:])[ys - ys[0]][:, xs - xs[0]]
        tile.found[:, :, rows, columns] = grid.permute(2, 3, 0, 1)
        return
    for i in range(height):
        top, bottom = rows.start + np.searchsorted(ys - ys[0], (i, i + 1))
        for j in range(width):
            left, right = columns.start + np.searchsorted(xs - xs[0], (j, j + 1))
            if top < bottom and left < right:
                cell = cells.cell(i * width + j)
                _visit(tile, depth + 1, slice(top, bottom), slice(left, right), cell)


def _centred(block: torch.Tensor, train: int) -> torch.Tensor:
    """(x - mean of the training images) / sqrt(N - 1): float64 [images, cells, dims]."""
    x = block.to(torch.float64).flatten(1, 2)
    x = x - x[:train].mean(0)
    return x.mul_((train - 1) ** -0.5)


def _check_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise EvaluatorError("features are not finite; wrong --input-norm, or damaged weights?")


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


def _solve(factors: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve_triangular(factors, right, upper=False)


def _primal(tile: _Tile, x: torch.Tensor, parent: _Carried | None, last: bool) -> _Carried:
    """Whiten the cells' dims given the coarser ones: S = A'A + eps - B'B, B = Y_train A."""
    images, cells, dims = x.shape
    a = x[: tile.train].permute(1, 0, 2)  # [cells, train, dims]
    schur = a.mT @ a
    rest = x[tile.train :] if last else x
    before = x.new_empty((0, images)) if parent is None else parent.whitened
    if len(before):
        b = before[:, : tile.train] @ x[: tile.train].reshape(tile.train, -1)
        rest = rest - (before[:, images - len(rest) :].mT @ b).view(rest.shape)
        b = b.view(-1, cells, dims).permute(1, 0, 2)
        schur.baddbmm_(b.mT, b, alpha=-1)
    y = _solve(_cholesky(schur, tile.epsilon), rest.permute(1, 2, 0))
    shares = y[:, :, -(images - tile.train) :].square().sum(1, keepdim=True)
    if parent is not None:
        shares = torch.cat((parent.shares.expand(cells, -1, -1), shares), 1)
    if not last:
        y = torch.cat((before.expand(cells, -1, -1), y), 1)
    none = x.new_empty((cells, 0))
    return _Carried(shares, y, none, none, none)


def _dual(tile: _Tile, x: torch.Tensor, parent: _Carried | None, factor: bool) -> _Carried:
    """Add the cells' Grams to the coarser ones'; with `factor` also L, v and the shares so far."""
    a, d = x[: tile.train].permute(1, 0, 2), x[tile.train :]
    both = x.permute(1, 2, 0)  # [cells, dims, train + test]
    square = d.square().sum(2).T
    if parent is None:
        gram = a @ both
    else:
        gram = torch.baddbmm(parent.gram, a, both)
        square = square + parent.square
    none = x.new_empty((len(gram), 0))
    if not factor:
        return _Carried(none, none, gram, square, none)
    lower = _cholesky(gram[:, :, : tile.train].clone(), tile.epsilon)
    v = _solve(lower, gram[:, :, tile.train :])
    total = (square - v.square().sum(1)).div_(tile.epsilon).clamp_(min=0)[:, None]
    if parent is not None and tile.split:
        before = parent.shares.expand(len(gram), -1, -1)
        share = (total - before.sum(1, keepdim=True)).clamp_(min=0)
        total = torch.cat((before, share), 1)
    return _Carried(total, v, gram, square, lower)


def _dual_last(tile: _Tile, x: torch.Tensor, parent: _Carried) -> _Carried:
    """The last layer given the coarser ones: Schur complement eps (I + W'W), W = L^-1 A."""
    _, cells, dims = x.shape
    a = x[: tile.train].reshape(tile.train, -1)
    # From the right, as W' L' = A': no copy into the column order that LAPACK wants.
    w = torch.linalg.solve_triangular(parent.factor.mT, a.mT, upper=True, left=False).mT
    rest = x[tile.train :] - (parent.whitened.mT @ w).view(-1, cells, dims)
    w = w.view(-1, cells, dims).permute(1, 0, 2)
    y = _solve(_cholesky(w.mT @ w, 1.0), rest.permute(1, 2, 0))
    share = y.square().sum(1, keepdim=True).div_(tile.epsilon)
    shares = torch.cat((parent.shares.expand(cells, -1, -1), share), 1)
    none = x.new_empty((cells, 0))
    return _Carried(shares, none, none, none, none)
