"""Shards of remote datasets on the local disk, under a hard limit of bytes, shared by processes.

    CACHE/lock                      held (flock) for the short while in which room is made
    CACHE/SHA256.tar                a whole shard, named by its content; read under a shared flock
    CACHE/SHA256.PID-TIME.part      a shard on its way, at its full size: the reservation

Every file of ours counts by its size towards the limit. A part is held by its writer's exclusive
flock, which the kernel drops when the process ends, however it ends: a part that can be locked is
stale, and removed. An evictor, too, takes only what it can lock. The access time, set by hand, says
when a shard was last asked for; the modification time never changes after the rename.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.dataset import ShardRecord
from trainer.errors import TrainerError
from trainer.index import BadShard
from trainer.patience import Patience
from trainer.storage import Storage, Unfetched

_NAME = re.compile(r"([0-9a-f]{64})(\.tar|\.[0-9]+-[0-9]+\.part)")
POLL_SECONDS = 0.05
HASH_BYTES = 2**20
DEFAULT_SHARE_OF_FREE = 0.8


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


class _Found(NamedTuple):
    path: Path
    sha256: str
    whole: bool
    bytes: int
    used_ns: int


def default_folder() -> Path:
    """Where shards are kept unless told: SEMIFORMULA_CACHE, else ~/.cache/semiformula."""
    given = os.environ.get("SEMIFORMULA_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "semiformula"


def default_bytes(folder: Path) -> int:
    """The limit unless told: 80 % of what is free on the disk and of what the cache holds."""
    here = folder.absolute()
    while not here.is_dir():
        here = here.parent
    held = sum(found.bytes for found in _scan(folder))
    return int(DEFAULT_SHARE_OF_FREE * (shutil.disk_usage(here).free + held))


class Cache:
    """A folder of shards; any number of processes may use one at the same time."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.counters = Counters()
        self._parts: set[Path] = set()
        self._creating = threading.Lock()
        self._abandoned = False

    def path(self, record: ShardRecord) -> Path:
        """Where a shard lies when it is here."""
        return self.folder / f"{record.sha256}.tar"

    def get(
        self,
        storage: Storage,
        record: ShardRecord,
        next_uses: Callable[[], Sequence[str]] = tuple,
    ) -> BinaryIO:
        """Open a verified shard, fetched where it is not here; closing the file lets go of it.

        `next_uses` gives the SHA-256 of the shards that this run will ask for again, in that
        order: where room is needed, those last in it go first, and before them all others by their
        last use. Raises BadShard for a shard that is not there or stays damaged, TrainerError when
        no room can be made.
        """
        patience = Patience(f"{storage.where(record.name)}: could not be fetched whole")
        with _cache_faults(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                if (file := self._open_whole(record)) is not None:
                    return file
                if (part := self._reserve(record, next_uses)) is not None:
                    return self._fill(storage, record, part, patience)
                # Another process fetches the same one.
                time.sleep(POLL_SECONDS)

    def sweep(self) -> None:
        """Remove what killed processes left half-way."""
        if self.folder.is_dir():
            with _cache_faults(self.folder), self._locked():
                for _ in self._living():
                    pass

    def abandon(self) -> None:
        """Remove what is on its way here from this process; for its last moment."""
        with self._creating:
            self._abandoned = True
            for part in self._parts:
                with suppress(OSError):
                    part.unlink()

    def _open_whole(self, record: ShardRecord) -> BinaryIO | None:
        """The shard, if it is here and good; a damaged one is removed."""
        path = self.path(record)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH)  # waits for an evictor's moment
            about = os.fstat(file.fileno())
            if about.st_nlink == 0:  # it was evicted
                file.close()
                return None
            if about.st_size == record.bytes and self._hash(file) == record.sha256:
                os.utime(file.fileno(), ns=(time.time_ns(), about.st_mtime_ns))
                self.counters.add(hits=1)
                return file
            self.counters.add(damaged=1)
            with self._locked(), suppress(FileNotFoundError):
                if path.stat().st_ino == about.st_ino:  # else a good one has taken its place
                    path.unlink()
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def _reserve(
        self, record: ShardRecord, next_uses: Callable[[], Sequence[str]]
    ) -> tuple[BinaryIO, Path] | None:
        """An empty file of the shard's full size; None when the shard is here or on its way."""
        if record.bytes > self.max_bytes:
            raise TrainerError(
                f"{self.folder}: no room for a shard of {record.bytes} bytes; --cache-bytes is "
                f"{self.max_bytes}"
            )
        patience = Patience(f"{self.folder}: no room for {record.bytes} bytes")
        while True:
            with self._locked():
                found = list(self._living())
                if any(one.sha256 == record.sha256 for one in found):
                    return None
                if self._make_room(found, record.bytes, next_uses):
                    try:
                        return self._allocate(record)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        if self._evict_one(self._living(), next_uses):
                            continue
            # Others hold it all: theirs becomes free as they go on.
            busy = OSError(
                f"the limit is {self.max_bytes} bytes, and what lies there is in use, or the disk "
                "is full; give a larger --cache-bytes or another --cache"
            )
            seconds = patience.pause(busy)
            if seconds is None:
                raise TrainerError(patience.over(busy))
            time.sleep(min(seconds, 1.0))

    def _allocate(self, record: ShardRecord) -> tuple[BinaryIO, Path]:
        path = self.folder / f"{record.sha256}.{os.getpid()}-{time.time_ns()}.part"
        with self._creating:
            if self._abandoned:
                raise TrainerError(f"{self.folder}: abandoned")
            self._parts.add(path)
            file = path.open("x+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(file.fileno(), 0, record.bytes)
        except BaseException:
            self._drop(file, path)
            raise
        return file, path

    def _drop(self, file: BinaryIO, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._parts.discard(path)
        file.close()

    def _fill(
        self, storage: Storage, record: ShardRecord, part: tuple[BinaryIO, Path], patience: Patience
    ) -> BinaryIO:
        """Fetch into the reservation until the hash is right, and give it its name."""
        file, path = part
        try:
            while True:
                mark = time.perf_counter()
                try:
                    storage.fetch(record.name, record.bytes, file, self._came)
                except FileNotFoundError:
                    raise BadShard(
                        f"{storage.where(record.name)}: is not there, but dataset.json lists it"
                    ) from None
                except Unfetched as error:
                    raise BadShard(error.message) from None
                finally:
                    self.counters.add(fetch_seconds=time.perf_counter() - mark)
                if self._hash(file) == record.sha256:
                    break
                self.counters.add(damaged=1)
                wrong = ConnectionError("the SHA-256 of what came is not that of dataset.json")
                seconds = patience.pause(wrong)
                if seconds is None:
                    raise BadShard(patience.over(wrong))
                time.sleep(seconds)
            os.fsync(file.fileno())
            with self._locked():  # between the two locks an evictor might take it
                fcntl.flock(file, fcntl.LOCK_SH)
                path.rename(self.path(record))
                _sync_folder(self.folder)
        except BaseException:
            self._drop(file, path)
            raise
        self._parts.discard(path)
        return file

    def _came(self, count: int) -> None:
        self.counters.add(fetched_bytes=count)

    def _hash(self, file: BinaryIO) -> str:
        return hash_of(file, self.counters)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _living(self) -> Iterator[_Found]:
        """All files of the cache; what killed processes left is removed. With the lock held."""
        for found in _scan(self.folder):
            if found.whole or not _remove(found.path):
                yield found

    def _make_room(
        self, found: list[_Found], wanted: int, next_uses: Callable[[], Sequence[str]]
    ) -> bool:
        """Evict until `wanted` more bytes fit under the limit. With the lock held."""
        excess = sum(one.bytes for one in found) + wanted - self.max_bytes
        if excess <= 0:
            return True
        for victim in _victims(found, next_uses()):
            if _remove(victim.path):
                self.counters.add(evictions=1)
                excess -= victim.bytes
                if excess <= 0:
                    return True
        return False

    def _evict_one(self, found: Iterator[_Found], next_uses: Callable[[], Sequence[str]]) -> bool:
        for victim in _victims(list(found), next_uses()):
            if _remove(victim.path):
                self.counters.add(evictions=1)
                return True
        return False


@contextmanager
def _cache_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainerError(
            f"{folder}: the cache cannot be used ({error.strerror or error}); mend it or give "
            "another --cache"
        ) from None


def hash_of(file: BinaryIO, counters: Counters) -> str:
    """The SHA-256 of an open file, in hex."""
    digest, buffer, position = hashlib.sha256(), bytearray(HASH_BYTES), 0
    view = memoryview(buffer)
    while count := os.preadv(file.fileno(), [buffer], position):
        digest.update(view[:count])
        position += count
    counters.add(verified_bytes=position)
    return digest.hexdigest()


def _victims(found: Sequence[_Found], order: Sequence[str]) -> list[_Found]:
    """Whole shards: foreign ones by their last use, then those used again last."""
    turn = {sha256: number for number, sha256 in reversed(list(enumerate(order)))}
    never = len(order)
    whole = [one for one in found if one.whole]
    return sorted(whole, key=lambda one: (-turn.get(one.sha256, never), one.used_ns))


def _remove(path: Path) -> bool:
    """Unlink a file that nobody has locked; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _scan(folder: Path) -> Iterator[_Found]:
    """The files of the cache; others in the folder are neither counted nor touched."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is None:
                continue
            with suppress(FileNotFoundError):
                about = entry.stat(follow_symlinks=False)
                yield _Found(
                    Path(entry.path), match[1], match[2] == ".tar", about.st_size, about.st_atime_ns
                )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
