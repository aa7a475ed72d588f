"""The decode-once cache: pixels of a dataset's first samples, shared by a node's processes.

One file in the cache folder, unlinked as soon as all ranks of the node have it open, so that
nothing is left of it however they end. It is read and written as a file rather than as mapped
memory: a full disk is then an error, not a SIGBUS, and a row goes to a batch in one copy.

Layout: one byte a row that says whether it is whole; from the next page on the rows, each the
image, theta, normal (int64) and the CRC-32 of these. Row i is sample i. Nobody locks: two who
write a row write the same bytes, and the byte that makes it valid is written last.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from trainer.dataset import Dataset
from trainer.errors import TrainerError

PAGE_BYTES = 4096
TAIL = struct.Struct("<qI")  # normal, CRC-32
PREFIX = "decoded-"


class Decoded:
    """The open cache; each process reads and writes through the same inherited or opened file."""

    def __init__(self, file: int, dataset: Dataset, max_bytes: int) -> None:
        self.file = file
        self.row_bytes = row_bytes(dataset)
        self.rows = row_count(dataset, max_bytes)
        self.start = -(-self.rows // PAGE_BYTES) * PAGE_BYTES
        self._ends = np.cumsum([shard.samples for shard in dataset.shards])

    def read(
        self, index: int, image: npt.NDArray[np.uint8], theta: npt.NDArray[np.float32]
    ) -> int | None:
        """Fill a sample's image and theta and return its normal, or None when it is not here."""
        if index >= self.rows or os.pread(self.file, 1, index) != b"\1":
            return None
        tail = bytearray(TAIL.size)
        parts: list[Any] = [_bytes(image), _bytes(theta), tail]
        found = os.preadv(self.file, parts, self.start + index * self.row_bytes)
        normal, crc = TAIL.unpack(tail)
        # CRC-32 is the cheapest here that finds every short error: 35 us for 224 px, SHA-256 83.
        if found != image.nbytes + theta.nbytes + TAIL.size or crc != _crc(image, theta, normal):
            with suppress(OSError):
                os.pwrite(self.file, b"\0", index)  # from its shard again
            return None
        return cast(int, normal)

    def write(
        self,
        index: int,
        image: npt.NDArray[np.uint8],
        theta: npt.NDArray[np.float32],
        normal: int,
    ) -> None:
        """Keep a decoded sample, if it is one of the first that there is room for."""
        if index >= self.rows:
            return
        tail = TAIL.pack(normal, _crc(image, theta, normal))
        parts: list[Any] = [_bytes(image), _bytes(theta), tail]
        with suppress(OSError):  # a cache: what cannot be kept is decoded again
            written = os.pwritev(self.file, parts, self.start + index * self.row_bytes)
            if written == image.nbytes + theta.nbytes + TAIL.size:
                os.pwrite(self.file, b"\1", index)

    def complete(self, shard: int) -> bool:
        """Whether every sample of a shard is here, so that its tar need not be."""
        end = int(self._ends[shard])
        first = int(self._ends[shard - 1]) if shard else 0
        return end <= self.rows and os.pread(self.file, end - first, first) == b"\1" * (end - first)


def row_bytes(dataset: Dataset) -> int:
    """The room of one sample, rounded up to 64 bytes."""
    image = dataset.image
    theta = 0 if dataset.theta is None else 4 * dataset.theta.length
    return -(-(image.size_px**2 * image.channels + theta + TAIL.size) // 64) * 64


def row_count(dataset: Dataset, max_bytes: int) -> int:
    """How many samples fit, with a byte each and what rounding up to a page may take."""
    return max(0, min(dataset.samples, (max_bytes - PAGE_BYTES) // (row_bytes(dataset) + 1)))


@contextmanager
def decoded_cache(
    folder: Path,
    max_bytes: int,
    dataset: Dataset,
    local_rank: int,
    barrier: Callable[[], None],
    share: Callable[[str | None], str],
) -> Iterator[Decoded | None]:
    """Make the cache of this node, or None where no sample fits or there is nothing to decode.

    All local ranks call it: rank 0 makes the file, `share` gives its path to the others, and after
    `barrier`, when all have it open, it has no name any more. Raises TrainerError on a disk that
    has no room for it.
    """
    if dataset.contents == "parameters" or not row_count(dataset, max_bytes):
        yield None
        return
    file, path = _made(folder, max_bytes, dataset) if local_rank == 0 else (-1, None)
    try:
        name = share(path)
        if local_rank != 0:
            file = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        barrier()
    finally:
        if path is not None:
            Path(path).unlink(missing_ok=True)
    try:
        yield Decoded(file, dataset, max_bytes)
    finally:
        os.close(file)


def _made(folder: Path, max_bytes: int, dataset: Dataset) -> tuple[int, str]:
    """A new file with its room reserved, so that a full disk is found now."""
    rows = row_count(dataset, max_bytes)
    size = -(-rows // PAGE_BYTES) * PAGE_BYTES + rows * row_bytes(dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        file, path = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        fcntl.flock(file, fcntl.LOCK_EX)  # while it has a name: not left by a killed process
    except OSError as error:
        raise TrainerError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        os.close(file)
        Path(path).unlink(missing_ok=True)
        raise TrainerError(
            f"{folder}: no room for {size} bytes of decoded images ({error.strerror}); give "
            "--cache-decoded less"
        ) from None
    return file, path


def _sweep(folder: Path) -> None:
    """Remove what was left where a process was killed before the others had opened its file."""
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _bytes(array: npt.NDArray[np.generic]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _crc(image: npt.NDArray[np.uint8], theta: npt.NDArray[np.float32], normal: int) -> int:
    head = zlib.crc32(struct.pack("<q", normal), zlib.crc32(_bytes(theta)))
    return zlib.crc32(_bytes(image), head)
