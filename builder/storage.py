"""Where artifacts lie: a local folder, or any fsspec URL (s3://, gs://, ...), behind one interface.

A file appears whole or not at all. Transient faults of a remote service are tried again, with full
jitter, until a deadline; what cannot mend itself (credentials, a bucket that is not there) is one
line at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar

from builder.artifacts import MAX_JSON_BYTES, TEMPORARY, atomic_file
from builder.errors import BuilderError

T = TypeVar("T")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
DRIVERS = {"s3": "s3fs", "gcs": "gcsfs", "http": "aiohttp"}
READS_AT_ONCE = 128  # small objects asked for together: a request's latency, not its bytes, counts


class Entry(NamedTuple):
    """A file of a storage: its name below the root, its size, and when it was written (epoch)."""

    name: str
    bytes: int
    modified: float


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
    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        """All bytes of a small file; BuilderError beyond `max_bytes`."""

    @abstractmethod
    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """The bytes of many small files in order, None for a missing one."""

    @abstractmethod
    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A binary reader of the whole file, whatever its size."""

    @abstractmethod
    def write(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A binary writer; the file appears when the block ends without an exception."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; nothing happens when it is not there."""

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        folder, _, last = name.rpartition("/")
        return any(PurePosixPath(entry.name).name == last for entry in self.entries(folder))

    def where(self, name: str) -> str:
        """The file's full name, for messages."""
        return f"{self.url.rstrip('/')}/{name}"


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
                    # A file may vanish while we look: another worker renamed its temporary.
                    with contextlib.suppress(FileNotFoundError):
                        if file.is_file(follow_symlinks=False):
                            about = file.stat(follow_symlinks=False)
                            yield Entry(prefix + file.name, about.st_size, about.st_mtime)
        except FileNotFoundError:
            return
        except OSError as error:
            raise BuilderError(f"{self.where(folder)}: cannot be read ({error.strerror})") from None

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        with self.open(name) as file:
            data = file.read(max_bytes + 1)
        return _bounded(data, max_bytes, self.where(name))

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        for name in names:
            try:
                yield self.read(name)
            except FileNotFoundError:
                yield None

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            file = (self.path / name).open("rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BuilderError(f"{self.where(name)}: cannot be read ({error.strerror})") from None
        with file:
            yield file

    def write(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return atomic_file(self.path / name)

    def delete(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise BuilderError(f"{self.where(name)}: not removed ({error.strerror})") from None


class Bucket(Storage):
    """A prefix of an object store, through fsspec; objects are fetched and put whole."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        extra = EXTRAS.get(protocol)
        if extra is not None and importlib.util.find_spec(DRIVERS[extra]) is None:
            raise BuilderError(f"{url}: needs more packages: pip install 'semiformula[{extra}]'")
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url, **_options(protocol))
        except (ValueError, ImportError) as error:
            raise BuilderError(f"{url}: no storage of this kind ({error})") from None

    def entries(self, folder: str) -> Iterator[Entry]:
        path = self._path(folder)
        try:
            found = self._retry("list", folder, lambda: self._fs.ls(path, detail=True))
        except FileNotFoundError:
            self._refuse_missing_bucket()
            return
        for one in found:
            if one["type"] == "file" and one["name"].rstrip("/") != path:
                name = one["name"].rsplit("/", 1)[1]
                stamp = one.get("LastModified") or one.get("mtime") or one.get("updated")
                seconds = stamp.timestamp() if hasattr(stamp, "timestamp") else 0.0
                yield Entry(f"{folder}/{name}" if folder else name, one["size"] or 0, seconds)

    def exists(self, name: str) -> bool:
        return bool(self._retry("look for", name, lambda: self._fs.isfile(self._path(name))))

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        def whole() -> bytes:
            size = self._fs.info(self._path(name))["size"]
            if size is not None and size > max_bytes:
                return bytes(max_bytes + 1)
            data: bytes = self._fs.cat_file(self._path(name))
            # Clients have handed out short bodies without an error.
            if size is not None and len(data) != size:
                raise ConnectionError(f"{len(data)} of {size} bytes came")
            return data

        return _bounded(self._retry("read", name, whole), max_bytes, self.where(name))

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        names = iter(names)
        while part := list(islice(names, READS_AT_ONCE)):
            paths = [self._path(name) for name in part]
            together = self._fs.cat(paths, on_error="return") if len(paths) > 1 else {}
            for name, path in zip(part, paths, strict=True):
                data = together.get(path)
                if not isinstance(data, bytes):  # missing, or a fault: alone, and tried again
                    try:
                        data = self.read(name)
                    except FileNotFoundError:
                        data = None
                yield data

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryDirectory(prefix="semiformula-") as folder:
            local = Path(folder) / "object"

            def fetch() -> None:
                size = self._fs.info(self._path(name))["size"]
                self._fs.get_file(self._path(name), str(local))
                if size is not None and local.stat().st_size != size:
                    raise ConnectionError(f"{local.stat().st_size} of {size} bytes came")

            self._retry("read", name, fetch)
            with local.open("rb") as file:
                yield file

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryDirectory(prefix="semiformula-") as folder:
            local = Path(folder) / "object"
            try:
                with local.open("wb") as file:
                    yield file
                size = local.stat().st_size
            except OSError as error:
                raise BuilderError(f"{folder}: cannot be written ({error.strerror})") from None

            def put() -> None:
                self._fs.put_file(str(local), self._path(name))
                found = self._fs.info(self._path(name))["size"]
                if found != size:
                    raise ConnectionError(f"{found} of {size} bytes arrived")

            try:
                self._retry("write", name, put)
            except FileNotFoundError as error:
                self._refuse_missing_bucket()
                raise BuilderError(f"{self.where(name)}: cannot be written ({error})") from None

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retry("remove", name, lambda: self._fs.rm_file(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _refuse_missing_bucket(self) -> None:
        """An empty prefix and a bucket that is not there look alike to fsspec; tell them apart."""
        bucket = self._root.split("/", 1)[0]
        try:
            self._retry("list", "", lambda: self._fs.ls(bucket, detail=False))
        except FileNotFoundError:
            raise BuilderError(
                f"{self.url}: bucket {bucket!r} does not exist; create it, or mend the URL"
            ) from None

    def _retry(self, verb: str, name: str, operation: Callable[[], T]) -> T:
        """Run a remote operation until it succeeds, cannot succeed, or the deadline is over."""
        deadline = time.monotonic() + retry_seconds()
        attempt = 0
        while True:
            try:
                self._fs.invalidate_cache()  # others write here too
                return operation()
            except FileNotFoundError:
                raise
            except Exception as error:  # drivers raise OSError, botocore's and aiohttp's own
                line = (str(error) or type(error).__name__).splitlines()[0]
                if _is_final(error):
                    raise BuilderError(
                        f"{self.where(name)}: could not {verb} ({line}); "
                        "check the credentials and the URL"
                    ) from None
                attempt += 1
                # Full jitter: a thousand workers must not come back at the same moment.
                pause = random.uniform(0, min(20.0, 0.2 * 2**attempt))
                if time.monotonic() + pause > deadline:
                    raise BuilderError(
                        f"{self.where(name)}: could not {verb} in {attempt} tries over "
                        f"{retry_seconds():.0f} s ({line}); what is finished is kept: "
                        "run the same command again when the service is back"
                    ) from None
                time.sleep(pause)


def retry_seconds() -> float:
    """How long a failing remote operation is tried again."""
    return float(os.environ.get("SEMIFORMULA_RETRY_SECONDS", "120"))


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use: no credentials, wrong ones, or not allowed."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, PermissionError | NotImplementedError | TypeError) or bool(
        names & {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}
    )


def _options(protocol: str) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if EXTRAS.get(protocol) == "s3":
        # Newer clients add checksums by default that other servers than AWS refuse.
        options["config_kwargs"] = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    return options


def _bounded(data: bytes, max_bytes: int, where: str) -> bytes:
    if len(data) > max_bytes:
        raise BuilderError(f"{where}: larger than {max_bytes} bytes, not one of our files")
    return data


@lru_cache(maxsize=16)
def open_storage(url: str) -> Storage:
    """The storage at a path or URL; one connection a process. A missing folder is not created."""
    if "://" in url and not url.startswith("file://"):
        return Bucket(url)
    return Folder(Path(url.removeprefix("file://")))


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
    return f"{storage.url}: {needed_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a killed writer left half-written."""
    last = PurePosixPath(name).name
    return last.startswith(".") and TEMPORARY in last
