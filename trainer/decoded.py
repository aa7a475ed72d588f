"""The decode-once cache: pixels of a dataset's first samples, shared by a node's processes.

One file in the cache folder that has no name any more: the other processes open it through the
one that made it, and nothing is left of it however they end. It is read and written as a file
rather than as mapped memory: a full disk is then an error, not a SIGBUS, and a row goes to a batch
in one copy.

Layout: one byte a row that says whether it is whole; from the next page on the rows, each the
image, theta, normal (int64) and the CRC-32 of these. Row i is sample i. Nobody locks: two who
write a row write the same bytes, and the byte that makes it valid is written last.
"""

from __future__ import annotations

import errno
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
from trainer.shards import first_samples

PAGE_BYTES = 4096
TAIL = struct.Struct("<qI")  # normal, CRC-32


class Decoded:
    """The open cache; each process reads and writes through the same inherited or opened file."""

    def __init__(self, file: int, dataset: Dataset, rows: int) -> None:
        self.file = file
        self.dataset = dataset
        self.rows = rows
        self.row_bytes = row_bytes(dataset)
        self.start = _start(rows)
        self._firsts = first_samples(dataset.shards)

    @property
    def path(self) -> str:
        """Where other processes of this user open the file while this one has it open."""
        return f"/proc/{os.getpid()}/fd/{self.file}"

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.dataset, self.rows)

    def read(
        self, index: int, image: npt.NDArray[np.uint8], theta: npt.NDArray[np.float32]
    ) -> int | None:
        """Fill a sample's image and theta and return its normal, or None when it is not here.

        Raises TrainerError where the disk fails: as long as a row counts, nobody fetches its shard.
        """
        tail = bytearray(TAIL.size)
        parts: list[Any] = [_bytes(image), _bytes(theta), tail]
        try:
            if index >= self.rows or os.pread(self.file, 1, index) != b"\1":
                return None
            found = os.preadv(self.file, parts, self.start + index * self.row_bytes)
            normal, crc = TAIL.unpack(tail)
            # The cheapest here that finds every short error: 35 us for 224 px, SHA-256 83.
            whole = found == image.nbytes + theta.nbytes + TAIL.size
            if whole and crc == _crc(image, theta, normal):
                return cast(int, normal)
            os.pwrite(self.file, b"\0", index)  # from its shard again
        except OSError as error:
            raise TrainerError(
                f"the cache of decoded images cannot be used ({error.strerror}); mend the disk, "
                "give another --cache, or no --cache-decoded"
            ) from None
        return None

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
        first, end = self._firsts[shard : shard + 2]
        return end <= self.rows and os.pread(self.file, end - first, first) == b"\1" * (end - first)


def theta_length(dataset: Dataset) -> int:
    """How many parameters a sample has; none in a labelled set."""
    return 0 if dataset.contents == "labels" else dataset.theta.length


def row_bytes(dataset: Dataset) -> int:
    """The room of one sample, rounded up to 64 bytes."""
    image = dataset.image
    values = 4 * theta_length(dataset)
    return -(-(image.size_px**2 * image.channels + values + TAIL.size) // 64) * 64


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

    All local ranks call it: rank 0 makes the file, `share` says to the others where, and `barrier`
    waits until all have it open. Raises TrainerError on a disk that has no room for it.
    """
    rows = row_count(dataset, max_bytes)
    if dataset.contents == "parameters" or not rows:
        yield None
        return
    if local_rank == 0:
        decoded = Decoded(_made(folder, dataset, rows), dataset, rows)
        share(decoded.path)
    else:
        decoded = _reopen(share(None), dataset, rows)
    try:
        barrier()
        yield decoded
    finally:
        os.close(decoded.file)


def _reopen(path: str, dataset: Dataset, rows: int) -> Decoded:
    return Decoded(os.open(path, os.O_RDWR | os.O_CLOEXEC), dataset, rows)


def _made(folder: Path, dataset: Dataset, rows: int) -> int:
    """A new file without a name, its room reserved, so that a full disk is found now."""
    size = _start(rows) + rows * row_bytes(dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _nameless(folder)
    except OSError as error:
        raise TrainerError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        os.close(file)
        raise TrainerError(
            f"{folder}: no room for {size} bytes of decoded images ({error.strerror}); give "
            "--cache-decoded less"
        ) from None
    return file


def _nameless(folder: Path) -> int:
    """A new file in a folder that no kill leaves behind, where its file system can do that."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # as a network's, an old kernel's
            raise
    file, path = tempfile.mkstemp(prefix="decoded-", dir=folder)
    Path(path).unlink()
    return file


def _start(rows: int) -> int:
    """Where the rows begin, behind a byte for each."""
    return -(-rows // PAGE_BYTES) * PAGE_BYTES


def _bytes(array: npt.NDArray[np.generic]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _crc(image: npt.NDArray[np.uint8], theta: npt.NDArray[np.float32], normal: int) -> int:
    head = zlib.crc32(struct.pack("<q", normal), zlib.crc32(_bytes(theta)))
    return zlib.crc32(_bytes(image), head)
