"""Reads the samples of verified shards and decodes them, batch by batch."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from trainer.cache import Cache
from trainer.dataset import Dataset
from trainer.decoded import Decoded, theta_length
from trainer.errors import TrainerError
from trainer.images import decode_into
from trainer.index import BadShard, index_shard
from trainer.node import Slot
from trainer.shards import first_samples, open_shard
from trainer.storage import Storage

# Where images begin. At multiples of 32 libjpeg-turbo writes past the caches, which costs
# a sixth of the time of a decode.
IMAGES_AT = 16
SLACK_BYTES = 512  # of a batch's memory, for that and for rounding up
IDLE_BATCHES = 8  # a shard's file that so many batches did not read is closed


class Batch(NamedTuple):
    """Samples in the order asked for, without those of quarantined shards.

    `images` uint8 [n, H, W, C], or [n, 0, 0, C] for a parameter-only set; `theta` float32
    [n, K(C+6)+1], or [n, 0] for a labelled set; `normal` int64 [n], the label for a labelled set;
    `index` int64 [n]; `seconds` float64 [3]: waiting for shards, reading, decoding.
    """

    images: torch.Tensor
    theta: torch.Tensor
    normal: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # nobody looks for an item in a batch
    seconds: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Memory for a batch of at most as many rows: arrays as the tensors of `Batch`."""

    images: npt.NDArray[np.uint8]
    theta: npt.NDArray[np.float32]
    normal: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]

    def first(self, count: int) -> Rows:
        """The first rows."""
        return Rows(
            self.images[:count],
            self.theta[:count],
            self.normal[:count],
            self.index[:count],
            self.seconds,
        )

    def batch(self) -> Batch:
        """The same memory as tensors."""
        return Batch(
            torch.from_numpy(self.images),
            torch.from_numpy(self.theta),
            torch.from_numpy(self.normal),
            torch.from_numpy(self.index),
            torch.from_numpy(self.seconds),
        )

    def batch_with_own_numbers(self) -> Batch:
        """The images in the same memory, all else copied."""
        images, *small = self.batch()
        return Batch(images, *(part.clone() for part in small))


class Shards(Protocol):
    """Who knows where the shards lie: trainer/node.py, or `AtHand`."""

    def shard(self, shard: int, stop: Callable[[], bool]) -> Slot | None:
        """Wait until a shard is there; None when it is quarantined."""


@dataclass
class _Open:
    """An open file of a shard."""

    file: int
    stamp: tuple[int, int, int]
    used: int  # the number of the batch that read it last


def never() -> bool:
    """For those who cannot be stopped."""
    return False


class Samples:
    """The samples of a dataset, decoded a batch at a time.

    Each process that reads has its own: it keeps the shards open that its last batches read.
    """

    def __init__(self, dataset: Dataset, node: Shards, decoded: Decoded | None = None) -> None:
        self.dataset = dataset
        self.node = node
        self.decoded = decoded
        image = dataset.image
        size_px = 0 if dataset.contents == "parameters" else image.size_px
        self.image_shape = (size_px, size_px, image.channels)
        self.theta_length = theta_length(dataset)
        self._firsts = np.array(first_samples(dataset.shards))
        self._open: dict[int, _Open] = {}
        self._batches = 0

    def __len__(self) -> int:
        return self.dataset.samples

    def bytes_of(self, count: int) -> int:
        """The memory of a batch."""
        row_bytes = int(np.prod(self.image_shape)) + 4 * self.theta_length + 16
        return count * row_bytes + SLACK_BYTES

    def rows(self, count: int) -> Rows:
        """New memory for a batch."""
        return self.rows_in(memoryview(mmap.mmap(-1, self.bytes_of(count))), count)

    def rows_in(self, memory: memoryview, count: int) -> Rows:
        """A batch's arrays laid out in given memory: `bytes_of(count)` bytes at a page's start."""
        position = IMAGES_AT

        def array(kind: type[np.generic], *shape: int) -> npt.NDArray[np.generic]:
            nonlocal position
            found = np.ndarray(shape, kind, memory, position)
            position += -(-found.nbytes // 64) * 64
            return found

        return Rows(
            images=array(np.uint8, count, *self.image_shape),  # type: ignore[arg-type]
            theta=array(np.float32, count, self.theta_length),  # type: ignore[arg-type]
            normal=array(np.int64, count),  # type: ignore[arg-type]
            index=array(np.int64, count),  # type: ignore[arg-type]
            seconds=array(np.float64, 3),  # type: ignore[arg-type]
        )

    def batch(self, indices: Sequence[int], stop: Callable[[], bool] = never) -> Batch:
        """The samples of the given indices; see `read_into` for the errors."""
        rows = self.rows(len(indices))
        return rows.first(self.read_into(rows, indices, stop)).batch()

    def read_into(
        self, rows: Rows, indices: Sequence[int], stop: Callable[[], bool] = never
    ) -> int:
        """Fill `rows` with the given samples, and return how many those not quarantined are.

        Raises TrainerError in one line when one cannot be read or decoded, and what `node.shard`
        raises: TrainerError for the fetcher's, Stopped when `stop` turns true.
        """
        self._batches += 1
        rows.seconds[:] = 0
        slots: dict[int, Slot | None] = {}
        count = 0
        shards = np.searchsorted(self._firsts, np.asarray(indices), side="right") - 1

        def waiting() -> bool:
            self._close_unused()  # the shard waited for may need their room
            return stop()

        for index, shard in zip(indices, shards.tolist(), strict=True):
            start = time.perf_counter()
            if self.decoded is not None and self._from_decoded(rows, count, index):
                rows.seconds[1] += time.perf_counter() - start
                count += 1
                continue
            if shard not in slots:
                slots[shard] = slot = self.node.shard(shard, waiting)
                if slot is not None:
                    self._opened(shard, slot)
                rows.seconds[0] += time.perf_counter() - start
            slot = slots[shard]
            if slot is not None:
                self._read(rows, count, index, shard, slot)
                count += 1
        for shard, slot in slots.items():
            if slot is not None:
                self._refuse_changed(shard, slot)  # what was read is what was verified
        self._close_unused()
        return count

    def close(self) -> None:
        """Close the shards that are open."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def _from_decoded(self, rows: Rows, row: int, index: int) -> bool:
        assert self.decoded is not None
        normal = self.decoded.read(index, rows.images[row], rows.theta[row])
        if normal is None:
            return False
        rows.normal[row], rows.index[row] = normal, index
        return True

    def _read(self, rows: Rows, row: int, index: int, shard: int, slot: Slot) -> None:
        """Read and decode one sample of an open shard."""
        mark = time.perf_counter()
        image_start, image_bytes, theta_start, theta_bytes, normal = slot.rows[
            index - slot.first
        ].tolist()
        # Image and theta stand beside one another: one read for both.
        start = image_start if image_bytes else theta_start
        stop = theta_start + theta_bytes if theta_bytes else image_start + image_bytes
        where = f"{self.dataset.shards[shard].name}: {index:09d}"
        try:
            data = os.pread(self._open[shard].file, stop - start, start)
        except OSError as error:
            raise TrainerError(f"{where}: cannot be read ({error.strerror})") from None
        if len(data) != stop - start:
            raise TrainerError(f"{where}: the shard became shorter since it was verified")
        if theta_bytes:  # its header was read when the shard was verified
            rows.theta[row] = np.frombuffer(data[-4 * self.theta_length :], "<f4")
        rows.normal[row], rows.index[row] = normal, index
        read = time.perf_counter()
        rows.seconds[1] += read - mark
        if image_bytes:
            suffix = self.dataset.image.suffix
            decode_into(rows.images[row], memoryview(data)[:image_bytes], suffix, where)
            if self.decoded is not None:
                self.decoded.write(index, rows.images[row], rows.theta[row], normal)
            rows.seconds[2] += time.perf_counter() - read

    def _opened(self, shard: int, slot: Slot) -> None:
        """Have a shard open whose file is the verified one, now."""
        held = self._open.get(shard)
        if held is not None and held.stamp != slot.stamp:  # fetched or verified anew
            os.close(self._open.pop(shard).file)
            held = None
        if held is None:
            try:
                file = os.open(slot.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise TrainerError(f"{slot.path}: cannot be read ({error.strerror})") from None
            held = self._open[shard] = _Open(file, slot.stamp, 0)
        held.used = self._batches
        self._refuse_changed(shard, slot)

    def _refuse_changed(self, shard: int, slot: Slot) -> None:
        """TrainerError where an open shard is not as it was when it was verified."""
        try:
            about = os.fstat(self._open[shard].file)
        except OSError as error:  # as of a network's file system
            raise TrainerError(f"{slot.path}: cannot be read ({error.strerror})") from None
        if (about.st_size, about.st_mtime_ns, about.st_ino) != tuple(slot.stamp):
            raise TrainerError(
                f"{slot.path}: was changed after it had been verified; the same command verifies "
                "it again and goes on from the last checkpoint"
            )

    def _close_unused(self) -> None:
        """Close files that this batch did not read: evicted ones, and those idle for long."""
        oldest = self._batches - IDLE_BATCHES
        for shard, held in list(self._open.items()):
            if held.used < oldest or (held.used < self._batches and _is_gone(held.file)):
                os.close(self._open.pop(shard).file)


def _is_gone(file: int) -> bool:
    """Whether an open file has no name any more, so that closing it frees its disk."""
    try:
        return os.fstat(file).st_nlink == 0
    except OSError:
        return True


class AtHand:
    """Verifies and indexes shards here when they are asked for, each once; asked as a node is.

    Files stay open until `close`. `left_out` is told of a bad shard, and raises or has it left out.
    """

    def __init__(
        self,
        storage: Storage,
        cache: Cache,
        dataset: Dataset,
        left_out: Callable[[int, BadShard], None] | None = None,
    ) -> None:
        self._storage = storage
        self._cache = cache
        self._dataset = dataset
        self._left_out = left_out
        self._firsts = first_samples(dataset.shards)
        self._slots: dict[int, Slot | None] = {}
        self._files = ExitStack()

    def shard(self, shard: int, stop: Callable[[], bool]) -> Slot | None:
        """A verified shard, or None for one left out; BadShard or TrainerError in one line."""
        if shard not in self._slots:
            try:
                self._slots[shard] = self._verified(shard)
            except BadShard as error:
                if self._left_out is None:
                    raise
                self._left_out(shard, error)
                self._slots[shard] = None
        return self._slots[shard]

    def close(self) -> None:
        """Let go of the shards."""
        self._files.close()

    def _verified(self, shard: int) -> Slot:
        record, first = self._dataset.shards[shard], self._firsts[shard]
        opened = self._files.enter_context(open_shard(self._storage, self._cache, record))
        file = opened.file
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = index_shard(view, self._dataset, shard, first)
        return Slot(Path(f"/proc/self/fd/{file.fileno()}"), rows, first, opened.stamp)


@contextmanager
def samples_now(
    storage: Storage,
    cache: Cache,
    dataset: Dataset,
    left_out: Callable[[int, BadShard], None] | None = None,
) -> Iterator[Samples]:
    """Samples outside of the stream, as the held-out ones; see `AtHand`."""
    shards = AtHand(storage, cache, dataset, left_out)
    samples = Samples(dataset, shards)
    try:
        yield samples
    finally:
        samples.close()
        shards.close()


def read_now(
    storage: Storage,
    cache: Cache,
    dataset: Dataset,
    indices: Sequence[int],
    left_out: Callable[[int, BadShard], None] | None = None,
) -> Batch:
    """The given samples outside of the stream; see `AtHand` for the errors."""
    with samples_now(storage, cache, dataset, left_out) as samples:
        return samples.batch(indices)
