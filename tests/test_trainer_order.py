"""The sample order: pure, complete, and continuous over epochs."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from trainer.order import Order, default_holdout, train_counts

KEY = "ab" * 32


def order_of(counts: list[int], window: int = 2, key: str = KEY, seed: int = 0) -> Order:
    return Order(key, seed, np.array(counts, np.int64), window)


def test_order_typed_by_hand() -> None:
    # Philox words sorted by plain Python; a change here means that old runs no longer resume.
    order = order_of([4, 4, 4, 4, 0])
    assert order.samples(0, 16).tolist() == [12, 0, 13, 1, 15, 14, 2, 3, 6, 11, 10, 4, 8, 7, 5, 9]
    assert [window.shards for window in (order.window_at(0), order.window_at(8))] == [
        (3, 0),
        (1, 2),
    ]


def test_order_differs_by_key_seed_and_window() -> None:
    base = order_of([9] * 9).samples(0, 81).tolist()
    assert base != order_of([9] * 9, key="cd" * 32).samples(0, 81).tolist()
    assert base != order_of([9] * 9, seed=1).samples(0, 81).tolist()
    assert base != order_of([9] * 9, window=3).samples(0, 81).tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), st.integers(1, 5))
def test_every_sample_comes_once_an_epoch(counts: list[int], window: int) -> None:
    order = order_of(counts, window)
    total = sum(counts)
    for epoch in range(3):
        assert sorted(order.samples(epoch * total, (epoch + 1) * total)) == list(range(total))


@given(st.integers(0, 60), st.integers(0, 40))
def test_a_seek_gives_what_walking_gives(start: int, length: int) -> None:
    walked = order_of([3, 4, 5, 2, 3]).samples(0, start + length)
    assert order_of([3, 4, 5, 2, 3]).samples(start, start + length).tolist() == (
        walked[start:].tolist()
    )


@given(st.integers(0, 60))
def test_windows_tile_the_stream_and_hold_their_samples(position: int) -> None:
    counts = [3, 4, 5, 0, 2]
    order = order_of(counts)
    windows = order.windows(position)
    shard_of = np.repeat(np.arange(5), counts)
    end = None
    for window in (next(windows) for _ in range(6)):
        assert end is None or window.start == end
        end = window.stop
        samples = order.samples(window.start, window.stop)
        assert set(shard_of[samples]) == set(window.shards)


def test_the_last_samples_are_held_out() -> None:
    assert train_counts(np.array([4, 4, 2]), holdout=3).tolist() == [4, 3, 0]


@pytest.mark.parametrize(("samples", "expected"), [(1, 1), (9, 1), (100, 10), (10**6, 512)])
def test_default_holdout(samples: int, expected: int) -> None:
    assert default_holdout(samples) == expected
