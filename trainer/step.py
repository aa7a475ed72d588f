"""How a global batch is cut into parts, and which of them this process works on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer.order import Order
from trainer.samples import Batch
from trainer.schedule import End

LEAST_ROWS = 2  # batch norm takes no statistics of one value


@dataclass(frozen=True)
class Cut:
    """A batch of `size` samples is cut into `parts`; this process has those of `own`."""

    size: int
    parts: int
    own: range

    def stretches(self, cursor: int, samples: int) -> list[tuple[int, int]]:
        """The stream positions [start, stop) of this process's parts of a batch at `cursor`.

        >>> Cut(size=8, parts=3, own=range(1, 3)).stretches(100, samples=8)
        [(102, 105), (105, 108)]
        """
        return [
            (cursor + i * samples // self.parts, cursor + (i + 1) * samples // self.parts)
            for i in self.own
        ]


def own_parts(rank: int, world: int, parts: int) -> range:
    """Which of the parts of each batch a process works on: all have as many, or one more.

    >>> [list(own_parts(rank, 2, 5)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(rank * parts // world, (rank + 1) * parts // world)


def batch_samples(cut: Cut, end: End, cursor: int) -> int:
    """How many samples the batch at `cursor` has: fewer at the end of a run by epochs."""
    return cut.size if end.sample == math.inf else min(cut.size, int(end.sample) - cursor)


def part_indices(order: Order, cut: Cut, end: End, step: int, cursor: int) -> Iterator[list[int]]:
    """The sample indices of each part of this process, in order, from `cursor` to the end."""
    while step < end.step and cursor < end.sample:
        samples = batch_samples(cut, end, cursor)
        for start, stop in cut.stretches(cursor, samples):
            yield order.samples(start, stop).tolist()
        step, cursor = step + 1, cursor + samples


def padded(part: Batch) -> Batch:
    """A part with at least LEAST_ROWS rows: filled up with its only sample, or with zeros.

    Its `index` tells how many rows are samples.
    """
    count = len(part.index)
    if count >= LEAST_ROWS:
        return part

    def filled(rows: torch.Tensor) -> torch.Tensor:
        like = rows if count else rows.new_zeros(1, *rows.shape[1:])
        return like.expand(LEAST_ROWS, *rows.shape[1:]).contiguous()

    return Batch(
        filled(part.images), filled(part.theta), filled(part.normal), part.index, part.seconds
    )


def weights_of(rows: int, part: Batch, batch_size: int, device: torch.device) -> torch.Tensor:
    """What each row counts for, float32 [rows]: 1 / batch_size, a sample and its copy half each.

    Copies of unequal weight would ask batch norm for the slope between them, which has none where
    they are all of a part: gradients of 1e38 in a deep network. Zeros that fill up count 0.
    """
    return torch.full((rows,), len(part.index) / (rows * batch_size), device=device)
