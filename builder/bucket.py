"""Object stores (s3://, gs://, any fsspec URL) as a Storage: objects are fetched and put whole.

Transient faults are tried again, with full jitter, until a deadline; what cannot mend itself
(credentials, a bucket that is not there) is one line at once. Objects on their way lie in TMPDIR;
a killed process leaves them there, and on S3 the parts of what it uploaded in parts: no object, but
billed until a rule of the bucket aborts it (FARM.md).
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from builder.artifacts import MAX_JSON_BYTES
from builder.errors import BuilderError
from builder.storage import MAX_RECORD_BYTES, Entry, Storage, TooLarge

T = TypeVar("T")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
DRIVERS = {"s3": "s3fs", "gcs": "gcsfs", "http": "aiohttp"}

CONNECT_SECONDS, ANSWER_SECONDS = 10, 30
# The client's timeouts do not cover a server that stops taking an upload: this one does.
SLOWEST_BYTES_PER_SECOND = 2**17
LISTED_AT_ONCE = 1000
READS_AT_ONCE = 128  # small objects asked for together: a request's latency, not its bytes, counts
PART_BYTES, PARTS_AT_ONCE = 32 * 2**20, 2  # what an upload or a download holds in memory
QUIET_SECONDS = 10.0  # a longer wait is announced

# Answers of 4xx that another try may change.
_TRANSIENT = {"RequestTimeout", "SlowDown", "BadDigest", "IncompleteBody", "OperationAborted"}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Bucket(Storage):
    """A prefix of an object store, through fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        extra = EXTRAS.get(protocol)
        if extra in ("s3", "gcs") and not re.match(r"[^:]+://[^/]", url):
            raise BuilderError(f"{url}: names no bucket; expected {protocol}://BUCKET/PREFIX")
        if extra is not None and importlib.util.find_spec(DRIVERS[extra]) is None:
            raise BuilderError(f"{url}: needs more packages: pip install 'semiformula[{extra}]'")
        try:
            self._fs, root = fsspec.url_to_fs(self.url, **_options(protocol))
        except (ValueError, ImportError) as error:
            raise BuilderError(f"{url}: no storage of this kind ({error})") from None
        self._root = root.rstrip("/")
        if extra == "s3":
            # Tries of its own, each with a timeout, would outlast the deadline.
            self._fs.retries = 1
        self._read_only = extra == "http"
        self._bucket_stands = extra not in ("s3", "gcs")  # others have none

    def entries(self, folder: str) -> Iterator[Entry]:
        path = self._path(folder)
        if hasattr(self._fs, "call_s3"):
            yield from self._listed(folder, "/")
            return
        try:
            found = self._retry("list", folder, lambda: self._call("ls", path, detail=True))
        except FileNotFoundError:
            self._refuse_missing_bucket()
            return
        for one in found:
            name = one["name"].rstrip("/").rsplit("/", 1)[-1]
            if one["type"] == "file" and one["name"].strip("/") != path.strip("/"):
                yield _entry(f"{folder}/{name}" if folder else name, one)

    def walk(self, folder: str = "") -> Iterator[Entry]:
        path = self._path(folder)
        if hasattr(self._fs, "call_s3"):
            yield from self._listed(folder, "")
            return
        found = self._retry("list", folder, lambda: self._call("find", path, detail=True))
        if not found:
            self._refuse_missing_bucket()
        for name, one in found.items():
            yield _entry(name.strip("/").removeprefix(self._root.strip("/") + "/"), one)

    def _listed(self, folder: str, delimiter: str) -> Iterator[Entry]:
        """S3's own listing, page by page.

        A million objects take no memory, and a fault repeats one page.
        """
        bucket, _, root = self._root.partition("/")
        start = f"{root}/" if root else ""
        words: dict[str, Any] = {"Bucket": bucket, "MaxKeys": LISTED_AT_ONCE}
        words["Prefix"] = start + (f"{folder}/" if folder else "")
        if delimiter:
            words["Delimiter"] = delimiter
        while True:
            try:
                page = self._retry(
                    "list", folder, lambda: self._call("call_s3", "list_objects_v2", **words)
                )
            except FileNotFoundError:
                raise self._missing_bucket() from None
            for one in page.get("Contents", []):
                if not one["Key"].endswith("/"):  # what consoles write for an empty folder
                    yield Entry(
                        one["Key"].removeprefix(start), one["Size"], one["LastModified"].timestamp()
                    )
            if not page.get("IsTruncated"):
                return
            words["ContinuationToken"] = page["NextContinuationToken"]

    def size(self, name: str) -> int | None:
        try:
            found = self._retry("look up", name, lambda: self._info(name))
        except FileNotFoundError:
            self._refuse_missing_bucket()
            return None
        return int(found["size"] or 0)

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        def whole() -> bytes:
            size = self._info(name)["size"]
            if size is not None and size > max_bytes:
                raise TooLarge(self.where(name), max_bytes)
            data: bytes = self._call("cat_file", self._path(name), timeout=_seconds(size))
            # Clients have handed out short bodies without an error.
            if size is not None and len(data) != size:
                raise ConnectionError(f"{len(data)} of {size} bytes came")
            return data

        return self._present(name, whole)

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        names = iter(names)
        while part := list(islice(names, READS_AT_ONCE)):
            for name, data in zip(part, self._together(part), strict=True):
                if isinstance(data, bytes):
                    yield data
                    continue
                try:  # missing, or a fault: alone, and tried again
                    yield self._present(name, partial(self._head_of, name))
                except FileNotFoundError:
                    yield None

    def _together(self, names: list[str]) -> list[Any]:
        """The first bytes of objects, one request each; something else for what did not come."""
        if len(names) == 1:
            return [None]
        paths, ends = [self._path(name) for name in names], [MAX_RECORD_BYTES] * len(names)
        try:
            found: list[Any] = self._call("cat_ranges", paths, [0] * len(paths), ends)
            return found
        except Exception:  # whichever it was, each is tried alone
            return [None] * len(names)

    def _head_of(self, name: str) -> bytes:
        try:
            data: bytes = self._call("cat_file", self._path(name), start=0, end=MAX_RECORD_BYTES)
            return data
        except OSError as error:
            if _answer(error)[1] == "InvalidRange":  # an empty object has no first byte
                return b""
            raise

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        with _local_copy() as local:

            def fetch() -> None:
                size = self._info(name)["size"]
                self._call("get_file", self._path(name), str(local), timeout=_seconds(size))
                if size is not None and local.stat().st_size != size:
                    raise ConnectionError(f"{local.stat().st_size} of {size} bytes came")

            self._present(name, fetch)
            with local.open("rb") as file:
                yield file

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        if self._read_only:
            raise BuilderError(f"{self.url}: can be read only; write to a folder, s3:// or gs://")
        with _local_copy() as local:
            try:
                with local.open("wb") as file:
                    yield file
                size = local.stat().st_size
            except OSError as error:
                raise _no_local_room(error) from None

            def put() -> None:
                # S3's driver takes other parts for a file than those it is set up with.
                parts = {"chunksize": PART_BYTES} if hasattr(self._fs, "call_s3") else {}
                where = self._path(name)
                self._call("put_file", str(local), where, timeout=_seconds(size), **parts)
                found = self._info(name)["size"]
                if found != size:
                    raise ConnectionError(f"{found} of {size} bytes arrived")

            self._present(name, put, "write")

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retry("remove", name, lambda: self._call("rm_file", self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _call(self, method: str, *words: Any, timeout: float | None = None, **named: Any) -> Any:
        """One operation of the driver, given up after a time."""
        from fsspec.asyn import AsyncFileSystem, sync

        if not isinstance(self._fs, AsyncFileSystem):
            return getattr(self._fs, method)(*words, **named)
        run = getattr(self._fs, f"_{method}")
        return sync(self._fs.loop, run, *words, timeout=timeout or _seconds(0), **named)

    def _info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call("info", self._path(name))
        if found["type"] != "file":
            raise FileNotFoundError(name)
        return found

    def _present(self, name: str, operation: Callable[[], T], verb: str = "read") -> T:
        """Retry an operation on a file; where it is missing, look whether the bucket is there."""
        try:
            return self._retry(verb, name, operation)
        except FileNotFoundError:
            self._refuse_missing_bucket()
            if verb == "read":
                raise
            raise BuilderError(
                f"{self.where(name)}: could not {verb}, and the bucket is there; "
                "run the same command again"
            ) from None

    def _refuse_missing_bucket(self) -> None:
        """A missing object and a missing bucket look alike; tell them apart, once a process."""
        if self._bucket_stands:
            return
        bucket = self._root.strip("/").split("/", 1)[0]
        try:
            self._retry("list", "", lambda: self._call("info", bucket))
        except FileNotFoundError:
            raise self._missing_bucket() from None

    def _missing_bucket(self) -> BuilderError:
        bucket = self._root.strip("/").split("/", 1)[0]
        return BuilderError(
            f"{self.url}: bucket {bucket!r} does not exist; create it, or mend the URL"
        )

    def _retry(self, verb: str, name: str, operation: Callable[[], T]) -> T:
        """Run a remote operation until it succeeds, cannot succeed, or the deadline is over.

        The clock starts at the first failure: an upload of an hour may fail and be tried again.
        """
        allowed = retry_seconds()
        attempt, first, told = 0, 0.0, False
        while True:
            try:
                result = operation()
                self._bucket_stands = True
                return result
            except BuilderError:
                raise
            except Exception as error:  # drivers raise OSError, botocore's and aiohttp's own
                missing = isinstance(error, FileNotFoundError)
                # A service in trouble has been seen to deny a bucket that it had served before.
                if missing and not (self._bucket_stands and _answer(error)[1] == "NoSuchBucket"):
                    raise
                line = _line(error)
                attempt += 1
                now = time.monotonic()
                first = first or now
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    raise _no_local_room(error) from None
                if is_final(error) and not missing:
                    raise BuilderError(
                        f"{self.where(name)}: could not {verb} ({line}); "
                        "check the credentials and the URL"
                    ) from None
                # Full jitter: a thousand workers must not come back at the same moment.
                pause = random.uniform(0, min(20.0, 0.2 * 2**attempt))
                if now - first + pause > allowed:
                    tries = "1 try" if attempt == 1 else f"{attempt} tries"
                    raise BuilderError(
                        f"{self.where(name)}: could not {verb} in {tries} over "
                        f"{now - first:.0f} s ({line}); what is finished is kept: "
                        "run the same command again when the service is back"
                    ) from None
                if now - first > QUIET_SECONDS and not told:
                    told = True
                    left = allowed - (now - first)
                    print(
                        f"{self.where(name)}: no answer ({line}); trying for {left:.0f} s more",
                        file=sys.stderr,
                    )
                time.sleep(pause)


def retry_seconds() -> float:
    """How long a failing remote operation is tried again, from SEMIFORMULA_RETRY_SECONDS."""
    given = os.environ.get("SEMIFORMULA_RETRY_SECONDS", "120")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1e9:
        raise BuilderError(f"SEMIFORMULA_RETRY_SECONDS={given}: expected seconds, such as 120")
    return seconds


def is_final(error: BaseException) -> bool:
    """Whether trying again is of no use: no credentials, wrong ones, not allowed, ill-formed."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}:
        return True
    status, code = _answer(error)
    if status:
        return 400 <= status < 500 and status not in (408, 409, 429) and code not in _TRANSIENT
    return isinstance(error, PermissionError | NotImplementedError | TypeError | ValueError)


def _line(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:200].rstrip(".")


def _answer(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the code of an S3 service's answer; 0 and "" for other errors."""
    answer = getattr(error.__cause__, "response", None)
    if not isinstance(answer, dict):
        status = getattr(error, "status", 0)  # aiohttp's
        return status if isinstance(status, int) else 0, ""
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(answer.get("Error", {}).get("Code", ""))


def _seconds(size: int | None) -> float:
    """How long an operation on so many bytes may take: the slowest line, and twice an answer."""
    return 2 * ANSWER_SECONDS + (size or 0) / SLOWEST_BYTES_PER_SECOND


def _options(protocol: str) -> dict[str, Any]:
    # Others write here too: nothing listed is remembered.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if EXTRAS.get(protocol) == "s3":
        options["default_block_size"] = PART_BYTES
        options["max_concurrency"] = PARTS_AT_ONCE
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "retries": {"total_max_attempts": 1},  # ours are the only ones
            "max_pool_connections": READS_AT_ONCE,
            # Newer clients add checksums by default that other servers than AWS refuse.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    return options


def _entry(name: str, about: dict[str, Any]) -> Entry:
    stamp = about.get("LastModified") or about.get("mtime") or about.get("updated")
    seconds = stamp.timestamp() if isinstance(stamp, datetime) else 0.0
    return Entry(name, about["size"] or 0, seconds)


@contextlib.contextmanager
def _local_copy() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="semiformula-")
    except OSError as error:
        raise _no_local_room(error) from None
    with folder as path:
        yield Path(path) / "object"


def _no_local_room(error: OSError) -> BuilderError:
    return BuilderError(
        f"temporary folder {tempfile.gettempdir()}: cannot be written ({error.strerror}); free "
        "space or set TMPDIR to another disk, and run the same command again"
    )
