"""The order of samples: a pure function of the dataset's hash, the seed and the epoch."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

DEFAULT_HOLDOUT_SAMPLES = 512


def default_holdout(samples: int) -> int:
    """How many samples are held out unless told: 512, at most a tenth, at least one."""
    return max(1, min(DEFAULT_HOLDOUT_SAMPLES, samples // 10))


def epoch_order(
    content_sha256: str, seed: int, epoch: int, train_samples: int
) -> npt.NDArray[np.int64]:
    """The permutation of 0..train_samples-1 in which `epoch` visits them: int64 [train_samples].

    Sorts raw Philox words, because NumPy keeps the bit stream from version to version but not
    what `Generator.permutation` makes of it. Held-out samples are the last indices of the dataset
    and never appear.

    >>> epoch_order("00" * 32, seed=0, epoch=0, train_samples=5).tolist() == sorted(range(5))
    False
    >>> sorted(epoch_order("00" * 32, seed=0, epoch=1, train_samples=5).tolist())
    [0, 1, 2, 3, 4]
    """
    name = f"semiformula-order-1 {content_sha256} {seed} {epoch}"
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype="<u8")
    words = np.random.Philox(key=key).random_raw(train_samples)
    return np.argsort(words, kind="stable").astype(np.int64)


class BatchOrder:
    """The batches of a run as one endless stream, each of the same size.

    Step t takes the samples at positions [t B, (t+1) B) of the epochs' permutations laid end to
    end: every sample comes exactly once per epoch, a batch may span two epochs, and the position
    in the stream is the step alone.
    """

    def __init__(self, content_sha256: str, seed: int, train_samples: int, batch_size: int) -> None:
        self.content_sha256 = content_sha256
        self.seed = seed
        self.train_samples = train_samples
        self.batch_size = batch_size
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def at(self, step: int) -> list[int]:
        """The sample indices of the batch that step `step` (from 0) trains on."""
        indices: list[int] = []
        position = step * self.batch_size
        while len(indices) < self.batch_size:
            epoch, start = divmod(position, self.train_samples)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = epoch_order(self.content_sha256, self.seed, epoch, self.train_samples)
            piece = self._order[start : start + self.batch_size - len(indices)]
            indices.extend(piece.tolist())
            position += len(piece)
        return indices
