"""Shards of remote datasets on the local disk, under a hard limit of bytes, shared by processes.

    CACHE/lock           held (flock) for the short while in which room is made; says how many bytes
                         the shards take at most
    CACHE/SHA256.tar     a whole shard, named by its content; read under a shared flock
    CACHE/SHA256.part    a shard on its way, at its full size: the reservation

Every shard counts by its size towards the limit. A part is held by its writer's exclusive flock,
which the kernel drops when the process ends, however it ends: a part that can be locked is stale,
and removed. An evictor, too, takes only what it can lock. The access time, set by hand, says when a
shard was last asked for; nothing here sets the modification time, by which changes are seen.

The folder is looked through once a process, and then only to make room: the sum in the lock file
grows before a reservation and shrinks after a removal, so that a kill leaves it too large at worst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.dataset import ShardRecord
from trainer.errors import TrainerError
from trainer.index import BadShard
from trainer.patience import Patience
from trainer.storage import Storage, Unfetched, open_plain
from trainer.verified import Counters, Verified, hash_of, stamp_of

_NAME = re.compile(r"([0-9a-f]{64})\.(tar|part)")
POLL_SECONDS = 0.05
DEFAULT_SHARE_OF_FREE = 0.8
VICTIMS_SHARE = 1 / 16  # of the files, chosen together: choosing looks through them all
UTIME_OMIT = 2**30 - 2  # of <sys/stat.h>: leave this time as it is

_LIBC = ctypes.CDLL(None, use_errno=True)


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
    held = 0
    with suppress(OSError):  # told when the cache is needed, which for local data it is not
        held = sum(found.bytes for found in _scan(folder))
    return int(DEFAULT_SHARE_OF_FREE * (shutil.disk_usage(here).free + held))


class Cache:
    """A folder of shards; any number of processes may use one at the same time."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.counters = Counters()
        self._parts: set[Path] = set()
        self._victims: deque[_Found] = deque()
        self._looked = False
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
    ) -> Verified:
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
                if (whole := self._open_whole(record)) is not None:
                    return whole
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
            while self._parts:
                with suppress(OSError):
                    self._parts.pop().unlink()

    def _open_whole(self, record: ShardRecord) -> Verified | None:
        """The shard, if it is here and good; a damaged one is removed."""
        path = self.path(record)
        try:
            file = open_plain(path)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH)  # waits for an evictor's moment
            about = os.fstat(file.fileno())
            if about.st_nlink == 0:  # it was evicted
                file.close()
                return None
            if about.st_size == record.bytes and self._hash(file) == record.sha256:
                _touch(file.fileno())
                self.counters.add(hits=1)
                return Verified(file, stamp_of(about))
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
        before: set[_Found] = set()
        while True:
            with self._locked() as lock:
                whole = self.path(record)
                if whole.exists() or not _remove(whole.with_suffix(".part")):
                    return None
                if self._make_room(lock, record.bytes, next_uses):
                    try:
                        return self._allocate(lock, record)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        if self._evict_one(lock, next_uses):
                            continue
                found = set(_scan(self.folder))
            # Others hold it all: theirs becomes free as they go on.
            busy = OSError(
                f"the limit is {self.max_bytes} bytes, and what lies there is in use, or the disk "
                "is full; give a larger --cache-bytes or another --cache, or let it wait with a "
                "longer SEMIFORMULA_RETRY_SECONDS"
            )
            seconds = patience.pause(busy, headway=found != before)
            before = found
            if seconds is None:
                raise TrainerError(patience.over(busy))
            time.sleep(min(seconds, 1.0))

    def _allocate(self, lock: int, record: ShardRecord) -> tuple[BinaryIO, Path]:
        path = self.path(record).with_suffix(".part")
        _write_sum(lock, (_read_sum(lock) or 0) + record.bytes)
        with self._creating:
            if self._abandoned:
                raise TrainerError(f"{self.folder}: abandoned")
            file = path.open("x+b")
            self._parts.add(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(file.fileno(), 0, record.bytes)
        except BaseException:
            self._drop(file, path)
            raise
        return file, path

    def _drop(self, file: BinaryIO, path: Path) -> None:
        with self._creating:
            if path in self._parts:  # else it was abandoned, and may be another's by now
                self._parts.remove(path)
                path.unlink(missing_ok=True)
        file.close()

    def _fill(
        self, storage: Storage, record: ShardRecord, part: tuple[BinaryIO, Path], patience: Patience
    ) -> Verified:
        """Fetch into the reservation until the hash is right, and give it its name."""
        file, path = part

        def came(count: int) -> None:
            self.counters.add(fetched_bytes=count)

        try:
            while True:
                mark = time.perf_counter()
                try:
                    storage.fetch(record.name, record.bytes, file, came)
                except FileNotFoundError:
                    raise BadShard(
                        f"{storage.where(record.name)}: is not there, but dataset.json lists it"
                    ) from None
                except Unfetched as error:
                    raise BadShard(error.message) from None
                finally:
                    self.counters.add(fetch_seconds=time.perf_counter() - mark)
                os.fsync(file.fileno())  # some file systems set the modification time here
                stamp = stamp_of(os.fstat(file.fileno()))
                if self._hash(file) == record.sha256:
                    break
                self.counters.add(damaged=1)
                wrong = ConnectionError("the SHA-256 of what came is not that of dataset.json")
                seconds = patience.pause(wrong)
                if seconds is None:
                    raise BadShard(patience.over(wrong))
                time.sleep(seconds)
            with self._locked():  # between the two locks an evictor might take it
                fcntl.flock(file, fcntl.LOCK_SH)
                path.rename(self.path(record))
                _sync_folder(self.folder)
        except BaseException:
            self._drop(file, path)
            raise
        with self._creating:
            self._parts.discard(path)
        return Verified(file, stamp)

    def _hash(self, file: BinaryIO) -> str:
        return hash_of(file, self.counters)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _living(self) -> Iterator[_Found]:
        """All files of the cache; what killed processes left is removed. With the lock held."""
        for found in _scan(self.folder):
            if found.whole or not _remove(found.path):
                yield found

    def _make_room(self, lock: int, wanted: int, next_uses: Callable[[], Sequence[str]]) -> bool:
        """Evict until `wanted` more bytes fit under the limit. With the lock held."""

        def fits() -> bool:
            held = _read_sum(lock)
            return held is not None and held + wanted <= self.max_bytes

        if self._looked:
            while not fits() and self._evict(lock):
                pass
            if fits():
                return True
        found = self._look(lock)
        if not fits():
            self._victims = deque(_victims(found, next_uses()))
            while not fits() and self._evict(lock):
                pass
            self._victims = deque(islice(self._victims, int(VICTIMS_SHARE * len(found))))
        return fits()

    def _evict_one(self, lock: int, next_uses: Callable[[], Sequence[str]]) -> bool:
        self._victims = deque(_victims(self._look(lock), next_uses()))
        return self._evict(lock)

    def _look(self, lock: int) -> list[_Found]:
        """Look through the folder, and set the sum right. With the lock held."""
        found = list(self._living())
        _write_sum(lock, sum(one.bytes for one in found))
        self._looked = True
        return found

    def _evict(self, lock: int) -> bool:
        """Remove the first victim that nobody uses or has asked for since it was chosen."""
        while self._victims:
            victim = self._victims.popleft()
            with suppress(FileNotFoundError):
                unused = victim.path.stat().st_atime_ns == victim.used_ns
                if unused and _remove(victim.path):
                    _write_sum(lock, (_read_sum(lock) or 0) - victim.bytes)
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
            "another --cache or SEMIFORMULA_CACHE"
        ) from None


def _victims(found: Sequence[_Found], order: Sequence[str]) -> list[_Found]:
    """Whole shards: foreign ones by their last use, then those used again last."""
    turn = {sha256: number for number, sha256 in reversed(list(enumerate(order)))}
    never = len(order)
    whole = [one for one in found if one.whole]
    return sorted(whole, key=lambda one: (-turn.get(one.sha256, never), one.used_ns))


def _touch(descriptor: int) -> None:
    """Set the access time alone: os.utime would set the modification time back."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    times = (ctypes.c_long * 4)(seconds, nanoseconds, 0, UTIME_OMIT)
    if _LIBC.futimens(descriptor, times) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _read_sum(lock: int) -> int | None:
    """The bytes that the shards take at most; None for a lock file that does not say."""
    said = os.pread(lock, 32, 0)
    return int(said) if said.isdigit() else None


def _write_sum(lock: int, held_bytes: int) -> None:
    os.pwrite(lock, b"%032d" % max(0, held_bytes), 0)


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
                    Path(entry.path), match[1], match[2] == "tar", about.st_size, about.st_atime_ns
                )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
