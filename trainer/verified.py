"""Files whose bytes were compared with a hash, and what was counted on the way."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

HASH_BYTES = 2**20

Stamp = tuple[int, int, int]  # size, mtime_ns, inode


@dataclass
class Counters:
    """What a cache did in this process; `verified_bytes` counts local folders as well."""

    fetched_bytes: int = 0
    fetch_seconds: float = 0.0
    hits: int = 0
    verified_bytes: int = 0
    evictions: int = 0
    damaged: int = 0  # files whose bytes were not those of their name, removed or fetched again
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **more: float) -> None:
        """Add to counters by name; from any thread."""
        with self.lock:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)


class Verified(NamedTuple):
    """An open shard whose bytes had the right hash, and how the file looked before it was read.

    While the file looks so, the bytes are those of the hash.
    """

    file: BinaryIO
    stamp: Stamp

    def __enter__(self) -> Verified:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the shard."""
        self.file.close()


def stamp_of(about: os.stat_result) -> Stamp:
    """What tells a file from an altered one: size, mtime_ns and inode.

    Without ctime_ns: a link or a change of mode moves it, the bytes being the same.
    """
    return about.st_size, about.st_mtime_ns, about.st_ino


def hash_of(file: BinaryIO, counters: Counters) -> str:
    """The SHA-256 of an open file, in hex."""
    digest, buffer, position = hashlib.sha256(), bytearray(HASH_BYTES), 0
    view = memoryview(buffer)
    while count := os.preadv(file.fileno(), [buffer], position):
        digest.update(view[:count])
        position += count
    counters.add(verified_bytes=position)
    return digest.hexdigest()
