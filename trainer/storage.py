"""Where data and runs lie: a local folder, or any fsspec URL (s3://, gs://, http://), alike."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from trainer.artifacts import MAX_JSON_BYTES, atomic_file
from trainer.errors import TrainerError

COPY_BYTES = 2**20


class Storage(ABC):
    """A root with files below it, named by relative paths with `/`.

    Every method raises TrainerError in one line for what the storage cannot do; `read` and `fetch`
    raise FileNotFoundError for a file that is not there.
    """

    url: str
    local: Path | None = None  # the folder, when it is one of this machine

    @abstractmethod
    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        """All bytes of a small file; TrainerError beyond `max_bytes`."""

    @abstractmethod
    def fetch(
        self,
        name: str,
        size: int,
        file: BinaryIO,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Write the `size` bytes of a file to the first bytes of an open local one.

        `progress` is called with the number of bytes of each piece that arrived. Raises Unfetched
        when the file has another length or does not come whole.
        """

    @abstractmethod
    def put(self, name: str, source: Path | bytes) -> None:
        """Write a file whole; its length at the other end is compared."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """The files in a folder and in all below it, sorted; none when it is missing."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; nothing happens when it is not there."""

    def where(self, name: str) -> str:
        """The file's full name, for messages."""
        return f"{self.url.rstrip('/')}/{name}".rstrip("/")


class Unfetched(TrainerError):
    """One file is missing there, or did not come whole until the deadline; others may."""


class Folder(Storage):
    """A local (or mounted) folder; files are fsynced and renamed into place."""

    def __init__(self, path: Path) -> None:
        self.local: Path = path
        self.url = str(path)

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        with self._open(name) as file:
            try:
                data = file.read(max_bytes + 1)
            except OSError as error:
                raise self._fault(name, "read", error) from None
        if len(data) > max_bytes:
            raise too_large(self.where(name), max_bytes)
        return data

    def fetch(
        self,
        name: str,
        size: int,
        file: BinaryIO,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        with self._open(name) as source:
            found = os.fstat(source.fileno()).st_size
            if found != size:
                raise Unfetched(f"{self.where(name)}: {found} bytes, expected {size}")
            try:
                file.seek(0)
                while piece := source.read(COPY_BYTES):
                    file.write(piece)
                    if progress is not None:
                        progress(len(piece))
                file.flush()
            except OSError as error:
                raise self._fault(name, "copied", error) from None

    def put(self, name: str, source: Path | bytes) -> None:
        try:
            with atomic_file(self.local / name) as file:
                if isinstance(source, bytes):
                    file.write(source)
                else:
                    with source.open("rb") as data:
                        while piece := data.read(COPY_BYTES):
                            file.write(piece)
        except OSError as error:
            raise self._fault(name, "written", error) from None

    def names(self, folder: str = "") -> list[str]:
        return sorted(self._walk(folder))

    def _walk(self, folder: str) -> Iterator[str]:
        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise TrainerError(f"{error.filename}: cannot be listed ({error.strerror})")

        for top, _, files in os.walk(self.local / folder, onerror=refuse):
            for name in files:
                yield (Path(top) / name).relative_to(self.local).as_posix()

    def delete(self, name: str) -> None:
        try:
            (self.local / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._fault(name, "removed", error) from None

    def _open(self, name: str) -> BinaryIO:
        try:
            return open_plain(self.local / name)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._fault(name, "read", error) from None

    def _fault(self, name: str, what: str, error: OSError) -> TrainerError:
        return TrainerError(f"{self.where(name)}: cannot be {what} ({error.strerror})")


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read; OSError for one that is none, such as a pipe, which would block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a plain file")
    return os.fdopen(descriptor, "rb")


def too_large(where: str, max_bytes: int) -> TrainerError:
    """The line for a file beyond what its reader can make use of."""
    return TrainerError(f"{where}: larger than {max_bytes} bytes, not one of our files")


def is_remote(url: str) -> bool:
    """Whether this names an object store or a server, not a path of this machine.

    >>> is_remote("s3://bucket/set"), is_remote("/data/set"), is_remote("file:///data/set")
    (True, False, False)
    """
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> Path:
    """The folder that a path or a file:// URL names."""
    return Path(url.removeprefix("file://"))


@lru_cache(maxsize=16)
def open_storage(url: str) -> Storage:
    """The storage at a path or URL; one connection a process. A missing folder is not created."""
    if is_remote(url):
        from trainer.bucket import Bucket  # here, because it is made from this module's parts

        return Bucket(url)
    return Folder(local_path(url))
