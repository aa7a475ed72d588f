"""Where artifacts lie: a local folder, or any fsspec URL (s3://, gs://, ...), behind one interface.

A file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from builder.artifacts import MAX_JSON_BYTES, TEMPORARY, atomic_file
from builder.errors import BuilderError

MAX_RECORD_BYTES = 2**16  # a commit record is a few hundred


class Entry(NamedTuple):
    """A file of a storage: its name below the root, its size, and when it was written (epoch)."""

    name: str
    bytes: int
    modified: float


class TooLarge(BuilderError):
    """A file is larger than the reader can make use of."""

    def __init__(self, where: str, max_bytes: int) -> None:
        super().__init__(f"{where}: larger than {max_bytes} bytes, not one of our files")


class Storage(ABC):
    """A root with files below it, named by relative paths with `/`.

    Every method raises BuilderError in one line for what the storage cannot do; `read` and `open`
    raise FileNotFoundError for a file that is not there.
    """

    url: str

    @abstractmethod
    def entries(self, folder: str) -> Iterator[Entry]:
        """The files directly in a folder, "" for the root; none when it is missing."""

    @abstractmethod
    def walk(self, folder: str = "") -> Iterator[Entry]:
        """The files in a folder and in all below it, in any order; links are not followed."""

    def strangers(self) -> Iterator[str]:
        """The names below the root of what is neither a file nor a folder: links, pipes."""
        return iter(())

    @abstractmethod
    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        """All bytes of a small file; BuilderError beyond `max_bytes`."""

    @abstractmethod
    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """The first 64 KiB of each of many files in order, None for a missing one, or a link."""

    @abstractmethod
    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A binary reader of the whole file, whatever its size."""

    @abstractmethod
    def write(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A binary writer; the file appears when the block ends without an exception."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; nothing happens when it is not there."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """The file's bytes; None when it is not there, or is no plain file (a link)."""

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self.size(name) is not None

    def where(self, name: str) -> str:
        """The file's full name, for messages."""
        return f"{self.url.rstrip('/')}/{name}".rstrip("/")


class Folder(Storage):
    """A local (or mounted) folder; files are fsynced and renamed into place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def entries(self, folder: str) -> Iterator[Entry]:
        prefix = f"{folder}/" if folder else ""
        try:
            with os.scandir(self.path / folder) as files:
                for file in files:
                    try:
                        about = file.stat(follow_symlinks=False)
                    except FileNotFoundError:  # another worker renamed its temporary meanwhile
                        continue
                    if stat.S_ISREG(about.st_mode):
                        yield Entry(prefix + file.name, about.st_size, about.st_mtime)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unreadable(self.where(folder), error) from None

    def walk(self, folder: str = "") -> Iterator[Entry]:
        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise _unreadable(str(error.filename), error) from None

        for top, _, _ in os.walk(self.path / folder, onerror=refuse):
            below = Path(top).relative_to(self.path).as_posix()
            yield from self.entries("" if below == "." else below)

    def strangers(self) -> Iterator[str]:
        for top, folders, files in os.walk(self.path):
            for name in folders + files:
                path = Path(top) / name
                with contextlib.suppress(FileNotFoundError):
                    mode = path.lstat().st_mode
                    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                        yield path.relative_to(self.path).as_posix()

    def size(self, name: str) -> int | None:
        try:
            about = (self.path / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(self.where(name), error) from None
        return about.st_size if stat.S_ISREG(about.st_mode) else None

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        with self.open(name) as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise TooLarge(self.where(name), max_bytes)
        return data

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        # The system's own calls: a million records through pathlib and buffers take minutes.
        folder = os.fsencode(self.path) + b"/"
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        for name in names:
            try:
                number = os.open(folder + os.fsencode(name), flags)
            except FileNotFoundError:
                yield None
                continue
            except OSError as error:
                if error.errno == errno.ELOOP:  # a link, which `entries` does not list either
                    yield None
                    continue
                raise _unreadable(self.where(name), error) from None
            try:
                yield os.read(number, MAX_RECORD_BYTES)
            except OSError as error:
                raise _unreadable(self.where(name), error) from None
            finally:
                os.close(number)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            file = (self.path / name).open("rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreadable(self.where(name), error) from None
        with file:
            yield file

    def write(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return atomic_file(self.path / name)

    def delete(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise BuilderError(f"{self.where(name)}: not removed ({error.strerror})") from None


def _unreadable(where: str, error: OSError) -> BuilderError:
    return BuilderError(f"{where}: cannot be read ({error.strerror})")


@lru_cache(maxsize=16)
def open_storage(url: str) -> Storage:
    """The storage at a path or URL; one connection a process. A missing folder is not created."""
    storage: Storage
    if is_remote(url):
        from builder.bucket import Bucket  # here, because it is made from this module's parts

        storage = Bucket(url)
    else:
        storage = Folder(Path(url.removeprefix("file://")))
    if "SEMIFORMULA_CHAOS" in os.environ:  # set by `builder selftest --chaos` alone
        from builder.chaos import disturbed

        storage = disturbed(storage)
    return storage


def is_remote(url: str) -> bool:
    """Whether this names an object store, not a path of this machine."""
    return "://" in url and not url.startswith("file://")


def make_room(storage: Storage, needed_bytes: int) -> str:
    """A warning when a local disk has less free space than `needed_bytes`, else an empty string."""
    if not isinstance(storage, Folder):
        return ""
    folder = storage.path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= needed_bytes:
        return ""
    unit, name = (1e9, "GB") if needed_bytes >= 1e9 else (1e6, "MB")
    return f"{storage.url}: {needed_bytes / unit:.1f} {name} needed, {free / unit:.1f} {name} free"


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a killed writer left half-written."""
    last = name[name.rfind("/") + 1 :]
    return last.startswith(".") and TEMPORARY in last
