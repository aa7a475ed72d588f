"""The node table: memory in which a node's fetcher tells its readers which shards are verified.

An anonymous file (memfd), mapped by the fetcher, the local ranks and their workers: it has no name,
so nothing is left of it when they end. Layout, all int64:

    [0, 4096)    header: see the `_FIELDS`; the fault's line as UTF-8 from byte 1024 on
    entries      [shards, 9]: turn, status, slot, until, size, mtime_ns, inode, CRC-32 of the rows,
                 and the CRC-32 of these eight, so that a half-written entry is seen as one
    slots        [slots, rows, 5]: the rows of a shard that is in a window in flight

The fetcher writes all but `position` and `leave`. It gives a free slot to a shard that enters a
window, writes the rows, then the entry; when the last window in flight with that shard lies behind
the position consumed, the entry is ABSENT again and its slot free for another. While an entry says
READY its slot is not written. `turn` grows by one with each verification, and that one holds up to
the stream position `until`: a reader waits for the next once that is consumed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ABSENT, READY, QUARANTINED = 0, 1, 2
HEADER_BYTES, FAULT_AT, ENTRY = 4096, 1024, 9
COLUMNS = 5
_FIELDS = (
    "shards", "slots", "rows", "position", "leave", "fault_bytes",
    "fetched_bytes", "fetch_microseconds", "hits", "verified_bytes", "evictions", "damaged",
    "quarantined_samples",
)  # fmt: skip


class Entry(NamedTuple):
    """What the table says of a shard."""

    turn: int
    status: int
    slot: int
    until: int
    size: int
    mtime_ns: int
    inode: int
    rows_crc: int


class Table:
    """A mapped table; `descriptor` is its open file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._memory = mmap.mmap(descriptor, 0)
        self._header = np.frombuffer(self._memory, np.int64, FAULT_AT // 8)
        shards, slots, rows = (int(self[name]) for name in ("shards", "slots", "rows"))
        self._entries = np.frombuffer(self._memory, np.int64, shards * ENTRY, HEADER_BYTES).reshape(
            shards, ENTRY
        )
        start = HEADER_BYTES + self._entries.nbytes
        self._rows = np.frombuffer(self._memory, np.int64, slots * rows * COLUMNS, start).reshape(
            slots, rows, COLUMNS
        )

    def __getitem__(self, field: str) -> int:
        return int(self._header[_FIELDS.index(field)])

    def __setitem__(self, field: str, value: int) -> None:
        self._header[_FIELDS.index(field)] = value

    @property
    def fault(self) -> str:
        """The line of the fetcher's error, or an empty string."""
        count = self["fault_bytes"]
        return self._memory[FAULT_AT : FAULT_AT + count].decode("utf-8", "replace")

    @fault.setter
    def fault(self, line: str) -> None:
        data = line.encode()[: HEADER_BYTES - FAULT_AT]
        self._memory[FAULT_AT : FAULT_AT + len(data)] = data
        self["fault_bytes"] = len(data)

    def raw(self, shard: int) -> bytes:
        """The bytes of an entry as they are now: changed whenever the entry has changed."""
        return self._entries[shard].tobytes()

    def entry(self, raw: bytes) -> Entry | None:
        """The entry of these bytes; None when it is absent or being written."""
        words = np.frombuffer(raw, np.int64).tolist()
        if words[1] == ABSENT or words[-1] != zlib.crc32(raw[:-8]):
            return None
        return Entry(*words[:-1])

    def rows(self, slot: int, count: int) -> npt.NDArray[np.int64]:
        """A slot's first rows, int64 [count, 5], read-only: the table's own memory."""
        rows = self._rows[slot, :count]
        rows.flags.writeable = False
        return rows

    def set_rows(self, slot: int, rows: npt.NDArray[np.int64]) -> None:
        """Write a free slot."""
        self._rows[slot, : len(rows)] = rows

    def publish(self, shard: int, entry: Entry) -> None:
        """Replace a shard's entry."""
        words = np.array(entry, np.int64)
        self._entries[shard] = [*entry, zlib.crc32(words.tobytes())]

    def held(self) -> bool:
        """Whether the fetcher lives: it alone holds the lock, until the kernel ends it."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        return False


def make_table(shards: int, slots: int, rows: int, position: int) -> Table:
    """A new table with every entry absent; pages that nobody writes take no memory."""
    descriptor = os.memfd_create("semiformula-node", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, HEADER_BYTES + 8 * (ENTRY * shards + COLUMNS * slots * rows))
    sizes = np.array([shards, slots, rows, position], np.int64)
    os.pwrite(descriptor, sizes.tobytes(), 0)
    return Table(descriptor)


def open_table(path: str) -> Table:
    """The table of another process of this machine and user, by `/proc/PID/fd/NUMBER`."""
    return Table(os.open(path, os.O_RDWR | os.O_CLOEXEC))
