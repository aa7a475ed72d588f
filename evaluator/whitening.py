"""The tables that score a photograph at once: whitening matrices, shared by coarse cells.

PaDiM's squared distance d' (A'A + eps I)^-1 d is written as a sum of |y_l|^2 over the layers, the
coarsest first, y_l = L_l^-1 (d_l - E[d_l | coarser ones]): a Cholesky factorisation in blocks.
Nothing is subtracted from the squares, so float32 is enough to apply what float64 computed.
MODEL.md holds the equations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from evaluator.errors import EvaluatorError
from evaluator.padim import one_thread_each, usable_cores

TILE_BYTES = 128 * 2**20  # float64 scratch of all tiles at once, while tables are computed


State = tuple[torch.Tensor, ...]  # what a level hands to the finer one


@dataclass(frozen=True)
class Level:
    """One layer among the levels: how the nodes of its tree are laid out.

    A node is a distinct choice of one cell per level down to this one; `cell` [nodes] is its own
    cell, row by row, `parent` [nodes] the node above it (zeros at the coarsest level).
    """

    layer: int
    cells: int
    cell: npt.NDArray[np.int64]
    parent: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """The levels, coarsest first, and for each position of the finest grid its last node."""

    levels: tuple[Level, ...]
    grid: tuple[int, int]
    node_of_position: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """What a level applies, float32: `whiten` [nodes, dims, inputs], `carry` [nodes, images, dims].

    Inputs of the dual form: the level's own dims, then the state [images]; `carry` leads the state
    on and is empty at the last level. Inputs of the primal form: the dims of all coarser levels in
    order, then its own; `carry` is empty. `mean` float32 [cells, dims].
    """

    mean: torch.Tensor
    whiten: torch.Tensor
    carry: torch.Tensor


def make_tree(grids: Sequence[tuple[int, int]]) -> Tree:
    """The tree over layers of the given (rows, columns); nearest repetition onto the finest grid.

    Grids need not nest: position (i, j) of the finest H x W reads cell (floor(i h / H),
    floor(j w / W)) of every layer, and each combination that occurs is a node.
    """
    order = sorted(range(len(grids)), key=lambda k: grids[k][0] * grids[k][1])
    height, width = grids[order[-1]]
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int64), width)
    read = [(rows * h // height) * w + columns * w // width for h, w in (grids[k] for k in order)]
    levels: list[Level] = []
    above = np.zeros(height * width, np.int64)  # each position's node so far
    for layer, cells_read in zip(order, read, strict=True):
        cells = grids[layer][0] * grids[layer][1]
        # Sorted by parent first: the descendants of a node lie side by side on every level.
        pairs, node = np.unique(above * cells + cells_read, return_inverse=True)
        levels.append(Level(layer, cells, pairs % cells, pairs // cells))
        above = node.reshape(-1)
    return Tree(tuple(levels), (height, width), above)


def table_shapes(
    tree: Tree, dims: Sequence[int], images: int, dual: bool
) -> list[tuple[tuple[int, int], tuple[int, int, int], tuple[int, int, int]]]:
    """The shapes of (mean, whiten, carry) per level; `dims` are counts per level."""
    shapes = []
    for k, level in enumerate(tree.levels):
        nodes = len(level.cell)
        state = (images if k else 0) if dual else sum(dims[:k])
        carried = images if dual and k < len(dims) - 1 else 0
        shapes.append(
            ((level.cells, dims[k]), (nodes, dims[k], dims[k] + state), (nodes, carried, dims[k]))
        )
    return shapes


def make_tables(
    tree: Tree, features: Sequence[npt.NDArray[np.floating]], epsilon: float, dual: bool
) -> list[Tables]:
    """Fit the Gaussians and write them as tables; `features` [images, cells, dims] per level.

    Mean and covariance (ddof 1, `epsilon` on the diagonal) in float64, in tiles of coarse cells.
    Raises EvaluatorError when rounding leaves a covariance that is not positive definite.
    """
    images = len(features[0])
    dims = [values.shape[2] for values in features]
    tables = []
    for values, (_, rows, led) in zip(
        features, table_shapes(tree, dims, images, dual), strict=True
    ):
        mean = torch.from_numpy(values.mean(axis=0, dtype=np.float64))
        tables.append(Tables(mean.float(), torch.empty(rows), torch.empty(led)))
    step = _dual_level if dual else _primal_level

    @torch.inference_mode()  # of each thread: the caller's does not reach it
    def tile(ranges: list[tuple[int, int]]) -> None:
        state: State = ()
        for k, (first, last) in enumerate(ranges):
            level, table = tree.levels[k], tables[k]
            centred = _centred(features[k], level.cell[first:last])
            above = torch.from_numpy(level.parent[first:last] - (ranges[k - 1][0] if k else 0))
            whiten, carry, state = step(centred, above, state, epsilon, k == len(dims) - 1)
            table.whiten[first:last] = whiten
            table.carry[first:last] = carry

    workers = usable_cores(torch.device("cpu"))
    with one_thread_each():
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for _ in pool.map(tile, _tiles(tree, dims, images, TILE_BYTES // workers)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt need not wait for all tiles
    return tables


def _tiles(
    tree: Tree, dims: Sequence[int], images: int, room_bytes: int
) -> Iterator[list[tuple[int, int]]]:
    """Ranges of nodes per level, one tile of coarsest nodes and their descendants at a time."""
    roots = len(tree.levels[0].cell)
    per_root = sum(
        8 * len(level.cell) / roots * (3 * images * size + 4 * size * size + 2 * images**2)
        for level, size in zip(tree.levels, dims, strict=True)
    )
    tile = max(1, int(room_bytes // per_root))
    for start in range(0, roots, tile):
        ranges = [(start, min(start + tile, roots))]
        for level in tree.levels[1:]:
            first, last = np.searchsorted(level.parent, ranges[-1])
            ranges.append((int(first), int(last)))
        yield ranges


def _centred(values: npt.NDArray[np.floating], cells: npt.NDArray[np.int64]) -> torch.Tensor:
    """A = (x - mean) / sqrt(images - 1) at `cells`: float64 [cells, images, dims]."""
    unique, back = np.unique(cells, return_inverse=True)
    x = torch.from_numpy(values[:, unique].astype(np.float64)).transpose(0, 1)
    x = (x - x.mean(dim=1, keepdim=True)) / (len(values) - 1) ** 0.5
    return x[torch.from_numpy(back.reshape(-1))]


def _dual_level(
    a: torch.Tensor, above: torch.Tensor, state: State, epsilon: float, last: bool
) -> tuple[torch.Tensor, torch.Tensor, State]:
    """One level where there are fewer images than dims; `state`: K = sum A A' + eps I so far.

    With alpha = K^-1 A d of the coarser levels: y = W (d - A' alpha) and
    alpha += eps K^-1 A W' y, where W = L^-1, L L' = eps (I + A' K^-1 A).
    """
    nodes, images, dims = a.shape
    if state:
        gram = state[0][above]
        root = _cholesky(state[0], epsilon)[above]
        b = torch.linalg.solve_triangular(root, a, upper=False)  # K = root root', b = root^-1 A
    else:
        gram = epsilon * torch.eye(images, dtype=a.dtype, device=a.device).expand(nodes, -1, -1)
        b = a / epsilon**0.5
    inner = epsilon * (b.mT @ b)
    inner.diagonal(dim1=1, dim2=2).add_(epsilon)
    w = _inverse_factor(inner, epsilon)
    whiten = torch.cat([w, -(w @ a.mT)], dim=2) if state else w
    if last:
        return whiten, a.new_empty(nodes, 0, dims), ()
    solved = torch.linalg.solve_triangular(root.mT, b, upper=True) if state else b / epsilon**0.5
    return whiten, epsilon * solved @ w.mT, (gram + a @ a.mT,)


def _primal_level(
    a: torch.Tensor, above: torch.Tensor, state: State, epsilon: float, last: bool
) -> tuple[torch.Tensor, torch.Tensor, State]:
    """One level where there are as many images as dims; rows of the inverse Cholesky factor.

    `state`: A of all coarser levels, and the inverse factor of their covariance.
    """
    nodes, _, dims = a.shape
    covariance = a.mT @ a
    covariance.diagonal(dim1=1, dim2=2).add_(epsilon)
    none = a.new_empty(nodes, 0, dims)
    if not state:
        w = _inverse_factor(covariance, epsilon)
        return w, none, (a, w)
    coarse, inverse = state[0][above], state[1][above]
    rows = (a.mT @ coarse) @ inverse.mT  # L[l, <l]
    w = _inverse_factor(covariance - rows @ rows.mT, epsilon)
    whiten = torch.cat([-(w @ rows @ inverse), w], dim=2)
    if last:
        return whiten, none, ()
    padded = torch.nn.functional.pad(inverse, (0, dims))
    return whiten, none, (torch.cat([coarse, a], dim=2), torch.cat([padded, whiten], dim=1))


def _cholesky(matrix: torch.Tensor, epsilon: float) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise EvaluatorError(
            f"a covariance is not positive definite with an epsilon of {epsilon:g}; raise it"
        )
    return factor


def _inverse_factor(matrix: torch.Tensor, epsilon: float) -> torch.Tensor:
    """L^-1 where L L' is the given matrix."""
    factor = _cholesky(matrix, epsilon)
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(factor, one.expand_as(factor), upper=False)
