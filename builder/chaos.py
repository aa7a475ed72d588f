"""Storages that fail on purpose, for `builder selftest --chaos`; nobody else asks for them.

SEMIFORMULA_CHAOS=SEED:PROBABILITY:LOG makes a process's operations fail with that probability and
appends a line for each fault to the file LOG. Of a folder's operations these are opening a file to
read or write it (listing, sizes, removals and the reading of many records are spared); of an object
store's every call of the driver.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from builder.bucket import Bucket
from builder.errors import BuilderError
from builder.storage import Folder, Storage

CHAOS = "SEMIFORMULA_CHAOS"


class Faults:
    """Draws faults, and keeps account of them in a file that several processes append to."""

    def __init__(self, given: str) -> None:
        try:
            seed, probability, log = given.split(":", 2)
            self._probability = float(probability)
        except ValueError:
            raise BuilderError(f"{CHAOS}={given}: expected SEED:PROBABILITY:LOG") from None
        self._random = random.Random(f"{seed} {os.getpid()}")
        self._log = log

    def draw(self, *kinds: str) -> str:
        """One of the kinds of fault, or an empty string for none."""
        if self._random.random() >= self._probability:
            return ""
        kind = self._random.choice(kinds)
        with Path(self._log).open("a") as file:  # a short line is appended whole
            file.write(f"{kind}\n")
        return kind


class FaultyFolder(Folder):
    """A disk that is full at times, that cannot be read, or that keeps half of what it took."""

    def __init__(self, path: Path, faults: Faults) -> None:
        super().__init__(path)
        self._faults = faults

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        # A plan that lost its end is for a person to remove: nothing may guess what it said.
        kinds = ("failed write",) if name == "plan.json" else ("failed write", "lost end")
        fault = self._faults.draw(*kinds)
        with super().write(name) as file:
            yield file
            if fault == "failed write":
                raise OSError(errno.ENOSPC, "No space left on device: injected")
        if fault == "lost end":
            path = self.path / name
            os.truncate(path, path.stat().st_size // 2)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        if self._faults.draw("failed read"):
            raise BuilderError(f"{self.where(name)}: cannot be read (Input/output error: injected)")
        with super().open(name) as file:
            yield file


class FaultyBucket(Bucket):
    """A service that drops connections, before it did what was asked or after."""

    def __init__(self, url: str, faults: Faults) -> None:
        super().__init__(url)
        self._faults = faults

    def _call(self, method: str, *words: Any, timeout: float | None = None, **named: Any) -> Any:
        fault = self._faults.draw("request lost", "answer lost")
        if fault == "request lost":
            raise ConnectionError("request lost: injected")
        answer = super()._call(method, *words, timeout=timeout, **named)
        if fault == "answer lost":
            raise ConnectionError("answer lost: injected")
        return answer


def disturbed(storage: Storage) -> Storage:
    """The same storage with faults."""
    faults = Faults(os.environ[CHAOS])
    if isinstance(storage, Folder):
        return FaultyFolder(storage.path, faults)
    return FaultyBucket(storage.url, faults)
