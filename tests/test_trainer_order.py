"""The sample order: pure, complete, and continuous over epochs."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trainer.order import BatchOrder, default_holdout, epoch_order

HASH = "ab" * 32


def test_epoch_order_typed_by_hand() -> None:
    # Philox words sorted by plain Python; a change here means that old runs no longer resume.
    assert epoch_order(HASH, seed=0, epoch=0, train_samples=8).tolist() == [7, 2, 4, 3, 1, 5, 6, 0]
    assert epoch_order(HASH, seed=0, epoch=1, train_samples=8).tolist() == [6, 3, 7, 1, 5, 4, 2, 0]


def test_epoch_order_differs_by_hash_and_seed() -> None:
    base = epoch_order(HASH, 0, 0, 100).tolist()
    assert base != epoch_order("cd" * 32, 0, 0, 100).tolist()
    assert base != epoch_order(HASH, 1, 0, 100).tolist()


@given(st.integers(1, 50), st.integers(2, 70), st.integers(0, 5))
def test_batches_visit_every_sample_once_per_epoch(samples: int, batch: int, seed: int) -> None:
    order = BatchOrder(HASH, seed, samples, batch)
    steps = -(-3 * samples // batch)
    stream = [index for step in range(steps) for index in order.at(step)]
    for epoch in range(3):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


@given(st.integers(0, 40))
def test_batch_at_a_step_does_not_depend_on_the_steps_before(step: int) -> None:
    walked = BatchOrder(HASH, 3, 17, 5)
    batches = [walked.at(number) for number in range(step + 1)]
    assert BatchOrder(HASH, 3, 17, 5).at(step) == batches[-1]


@pytest.mark.parametrize(("samples", "expected"), [(1, 1), (9, 1), (100, 10), (10**6, 512)])
def test_default_holdout(samples: int, expected: int) -> None:
    assert default_holdout(samples) == expected
