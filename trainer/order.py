"""The order of samples: a pure function of (dataset, seed, epoch, window), whoever trains on it.

An epoch visits the shards in a random order, W at a time; the samples of such a window are
shuffled together. Only two windows of shards have to be at hand, however large the dataset, and any
position is found without walking to it. Epochs laid end to end are one stream: where a run stands
is one integer, the samples consumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

DEFAULT_HOLDOUT_SAMPLES = 512
DEFAULT_WINDOW_SHARDS = 16  # 16,000 samples are shuffled together; two windows are 1.7 GB of WebP

Indices = npt.NDArray[np.int64]


def default_holdout(samples: int) -> int:
    """How many samples are held out unless told: 512, at most a tenth, at least one."""
    return max(1, min(DEFAULT_HOLDOUT_SAMPLES, samples // 10))


def train_counts(shard_samples: Indices, holdout: int) -> Indices:
    """How many samples of each shard are trained on; the last `holdout` of the dataset are not.

    >>> train_counts(np.array([4, 4, 2]), holdout=3).tolist()
    [4, 3, 0]
    """
    firsts = np.cumsum(shard_samples) - shard_samples
    return np.clip(int(shard_samples.sum()) - holdout - firsts, 0, shard_samples).astype(np.int64)


@dataclass(frozen=True)
class Window:
    """Shards whose samples are shuffled together, and which stretch of the stream they fill."""

    epoch: int
    number: int  # in the epoch
    start: int  # stream position of the first sample
    stop: int
    shards: tuple[int, ...]  # positions in dataset.json's list


@dataclass(frozen=True)
class _Epoch:
    """The shards in the order of an epoch, and where its windows begin."""

    shards: Indices  # [shards that are trained on]
    starts: Indices  # [windows + 1], from 0 to the samples of an epoch


class Order:
    """The stream of an endless run: samples and windows at any position.

    `counts` int64 [shards] is how many samples of each shard are trained on, `key` the dataset's
    `order_key`. Memory and time of a seek grow with the number of shards (8 bytes and 0.1 us each,
    a few times over) and the samples of a window, not with those of the dataset.
    """

    def __init__(self, key: str, seed: int, counts: Indices, window_shards: int) -> None:
        self.key = key
        self.seed = seed
        self.counts = counts
        self.window_shards = window_shards
        self.train_samples = int(counts.sum())
        assert self.train_samples > 0
        assert window_shards > 0
        self._firsts = np.cumsum(counts) - counts  # all but the last shards are trained on whole
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=3)(self._make_window)

    def samples(self, start: int, stop: int) -> Indices:
        """The sample indices at stream positions start..stop-1, int64 [stop - start]."""
        pieces, position = [np.empty(0, np.int64)], start
        while position < stop:
            window = self.window_at(position)
            order = self._window(window.epoch, window.number)
            pieces.append(order[position - window.start : stop - window.start])
            position = window.stop
        return np.concatenate(pieces)

    def window_at(self, position: int) -> Window:
        """The window in which a stream position lies."""
        epoch, offset = divmod(position, self.train_samples)
        starts = self._epoch(epoch).starts
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        begin = epoch * self.train_samples
        return Window(
            epoch=epoch,
            number=number,
            start=begin + int(starts[number]),
            stop=begin + int(starts[number + 1]),
            shards=tuple(self._shards(epoch, number).tolist()),
        )

    def windows(self, position: int) -> Iterator[Window]:
        """The window of a position and all that follow, without end."""
        while True:
            window = self.window_at(position)
            yield window
            position = window.stop

    def _shards(self, epoch: int, number: int) -> Indices:
        size = self.window_shards
        return self._epoch(epoch).shards[number * size : (number + 1) * size]

    def _make_epoch(self, epoch: int) -> _Epoch:
        used = np.flatnonzero(self.counts)
        shards = used[self._permutation(f"{epoch}", len(used))]
        ends = np.cumsum(self.counts[shards])
        last_of_window = np.append(ends[self.window_shards - 1 :: self.window_shards], ends[-1])
        return _Epoch(shards, np.unique(np.append(0, last_of_window)))

    def _make_window(self, epoch: int, number: int) -> Indices:
        shards = self._shards(epoch, number)
        samples = np.concatenate(
            [np.arange(self._firsts[s], self._firsts[s] + self.counts[s]) for s in shards]
        )
        return samples[self._permutation(f"{epoch} {number}", len(samples))]

    def _permutation(self, name: str, count: int) -> Indices:
        """Sorts raw Philox words: NumPy keeps their stream, not what `permutation` makes of it."""
        words = f"semiformula-order-2 {self.key} {self.seed} {self.window_shards} {name}"
        key = np.frombuffer(hashlib.sha256(words.encode()).digest()[:16], dtype="<u8")
        raw = np.random.Philox(key=key).random_raw(count)
        return np.argsort(raw, kind="stable").astype(np.int64)
