"""How a batch is cut into parts, and parts of one sample or none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.order import Order
from trainer.samples import Batch
from trainer.schedule import End
from trainer.step import Cut, own_parts, padded, part_indices, weights_of

CPU = torch.device("cpu")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 40))
def test_processes_share_a_batch_without_gap_or_overlap(
    world: int, more: int, samples: int
) -> None:
    parts = world + more - 1
    stretches = [
        stretch
        for rank in range(world)
        for stretch in Cut(40, parts, own_parts(rank, world, parts)).stretches(100, samples)
    ]
    assert len(stretches) == parts
    edges = [100, *(stop for _, stop in stretches)]
    assert [start for start, _ in stretches] == edges[:-1]
    assert edges[-1] == 100 + samples
    sizes = [stop - start for start, stop in stretches]
    assert max(sizes) - min(sizes) <= 1


def test_last_batch_is_cut_to_what_is_left() -> None:
    order = Order("key", 0, np.array([10]), window_shards=1)
    end = End(math.inf, 10, math.inf)
    for world in (1, 3):
        ranks = [
            list(part_indices(order, Cut(8, 3, own_parts(r, world, 3)), end, 0, 0))
            for r in range(world)
        ]
        sizes = [[len(part) for part in rank] for rank in ranks]
        assert sizes == ([[2, 3, 3, 0, 1, 1]] if world == 1 else [[2, 0], [3, 1], [3, 1]])
        seen = sorted(index for rank in ranks for part in rank for index in part)
        assert seen == list(range(10))


def part(count: int) -> Batch:
    generator = torch.Generator().manual_seed(count)
    return Batch(
        torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8),
        torch.rand(count, 19, generator=generator),
        torch.arange(count),
        torch.arange(count),
        torch.zeros(3, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("count", "rows", "weights"),
    [(0, 2, [0, 0]), (1, 2, [0.0625, 0.0625]), (2, 2, [0.125] * 2), (5, 5, [0.125] * 5)],
)
def test_part_has_two_rows_at_least_and_the_weight_of_its_samples(
    count: int, rows: int, weights: list[float]
) -> None:
    batch = padded(part(count))
    assert len(batch.images) == len(batch.theta) == len(batch.normal) == rows
    assert len(batch.index) == count
    assert weights_of(rows, batch, 8, CPU).tolist() == weights


def test_single_sample_leaves_gradients_finite_in_a_deep_network() -> None:
    # At 1 x 1 pixels the two rows are all that batch norm has: 40 times a slope of 316.
    layers = [layer for _ in range(40) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    torch.manual_seed(0)
    network = nn.Sequential(*layers)
    batch = padded(part(1))
    loss = weights_of(2, batch, 8, CPU) @ network(batch.theta[:, :4]).square().sum(dim=1)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
