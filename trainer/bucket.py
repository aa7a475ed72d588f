"""Object stores and web servers (any fsspec URL) as a Storage.

Transient faults are tried again, with full jitter, until a deadline; what cannot mend itself
(credentials, a bucket that is not there) is one line at once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from trainer.artifacts import MAX_JSON_BYTES
from trainer.errors import TrainerError
from trainer.patience import Patience, answer_of
from trainer.ranges import (
    ANSWER_SECONDS,
    PIECE_BYTES,
    Answer,
    NoRanges,
    Piecewise,
    fetch_parts,
    fetch_whole,
)
from trainer.storage import Storage, Unfetched, too_large

T = TypeVar("T")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
DRIVERS = {"s3": "s3fs", "gcs": "gcsfs", "http": "aiohttp"}

CONNECT_SECONDS = 10
CONNECTIONS = 64
UPLOAD_PART_BYTES = 32 * 2**20
# The client's timeouts do not cover a server that stops taking an upload: this one does.
SLOWEST_BYTES_PER_SECOND = 2**17


class Bucket(Storage):
    """A prefix of an object store, or a path of a web server, through fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        self._kind = EXTRAS.get(protocol, protocol)
        if self._kind in ("s3", "gcs") and not re.match(r"[^:]+://[^/]", url):
            raise TrainerError(f"{url}: names no bucket; expected {protocol}://BUCKET/PREFIX")
        driver = DRIVERS.get(self._kind)
        if driver is not None and importlib.util.find_spec(driver) is None:
            raise TrainerError(
                f"{url}: needs more packages: pip install 'semiformula[{self._kind}]'"
            )
        try:
            self._fs, root = fsspec.url_to_fs(self.url, **_options(self._kind))
        except (ValueError, ImportError) as error:
            raise TrainerError(f"{url}: no storage of this kind ({error})") from None
        self._root = root.rstrip("/")
        if self._kind == "s3":
            # Tries of its own, each with a timeout, would outlast the deadline.
            self._fs.retries = 1
        self._ranges = True
        self._bucket_stands = self._kind not in ("s3", "gcs")  # others have none

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        async def whole() -> bytes:
            data = bytearray()
            async with self._ask(name, 0, None) as answer:
                while piece := await answer.read(PIECE_BYTES):
                    data += piece
                    if len(data) > max_bytes:
                        raise too_large(self.where(name), max_bytes)
            # Clients have handed out short bodies without an error.
            if answer.total is not None and len(data) != answer.total:
                raise ConnectionError(f"{len(data)} of {answer.total} bytes came")
            return bytes(data)

        return self._present(name, lambda: self._await(whole(), _seconds(0)))

    def fetch(
        self,
        name: str,
        size: int,
        file: BinaryIO,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        descriptor = os.dup(file.fileno())  # an interrupted fetch may write for a moment longer
        wanted = Piecewise(
            f"{self.where(name)}: could not read",
            partial(self._ask, name),
            descriptor,
            size,
            progress or (lambda count: None),
        )

        async def run() -> None:
            try:
                if self._ranges:
                    with suppress(NoRanges):
                        return await fetch_parts(wanted)
                await fetch_whole(wanted)
            finally:
                os.close(descriptor)

        try:
            self._await(run(), None)
        except FileNotFoundError:
            self._refuse_missing_bucket()
            raise

    def put(self, name: str, source: Path | bytes) -> None:
        if self._kind == "http":
            raise TrainerError(f"{self.url}: can be read only; write to a folder, s3:// or gs://")
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        path = self._path(name)

        def put() -> None:
            if isinstance(source, bytes):
                self._call("pipe_file", path, source, timeout=_seconds(size))
            else:  # S3's driver takes other parts for a file than those it is set up with
                parts = {"chunksize": UPLOAD_PART_BYTES} if self._kind == "s3" else {}
                self._call("put_file", str(source), path, timeout=_seconds(size), **parts)
            found = self._info(name)["size"]
            if found != size:
                raise ConnectionError(f"{found} of {size} bytes arrived")

        try:
            self._present(name, put, "write")
        except FileNotFoundError:
            raise TrainerError(
                f"{self.where(name)}: could not write, and the bucket is there; "
                "run the same command again"
            ) from None

    def names(self, folder: str = "") -> list[str]:
        path, root = self._path(folder), self._root.strip("/") + "/"
        try:
            found = self._retry("list", folder, lambda: self._call("find", path))
        except FileNotFoundError:
            found = []
        if not found:
            self._refuse_missing_bucket()
        return sorted(name.strip("/").removeprefix(root) for name in found)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._retry("remove", name, lambda: self._call("rm_file", self._path(name)))

    @asynccontextmanager
    async def _ask(self, name: str, start: int, stop: int | None) -> AsyncIterator[Answer]:
        """Open the bytes [start, stop) of a file, all of it where stop is None."""
        wanted = "" if stop is None else f"bytes={start}-{stop - 1}"
        if self._kind == "s3":
            bucket, key, _ = self._fs.split_path(self._path(name))
            named = {"Bucket": bucket, "Key": key} | ({"Range": wanted} if wanted else {})
            with _answers_416(start):
                found = await self._fs._call_s3("get_object", **named)
            length = found.get("ContentLength")
            begin, total = _content_range(found.get("ContentRange"), length)
            try:
                yield Answer(begin, total, found["Body"].read)
            finally:
                found["Body"].close()
        elif self._kind == "http":
            session = await self._fs.set_session()
            headers = {"Accept-Encoding": "identity"} | ({"Range": wanted} if wanted else {})
            url = self._fs.encode_url(self._path(name))
            async with session.get(url, headers=headers, **self._fs.kwargs) as response:
                if response.status == 404:
                    raise FileNotFoundError(name)
                with _answers_416(start):
                    response.raise_for_status()
                if wanted and "Accept-Ranges" not in response.headers and response.status == 200:
                    self._ranges = False
                ranged = response.headers.get("Content-Range") if response.status == 206 else None
                begin, total = _content_range(ranged, response.content_length)
                yield Answer(begin, total, response.content.read)
        else:
            data = await self._cat(self._path(name), start, stop)
            yield Answer(start, None if stop is not None else len(data), _reader(data))

    async def _cat(self, path: str, start: int, stop: int | None) -> bytes:
        limits = {} if stop is None else {"start": start, "end": stop}
        if hasattr(self._fs, "_cat_file"):
            data: bytes = await self._fs._cat_file(path, **limits)
        else:
            data = await asyncio.to_thread(self._fs.cat_file, path, **limits)
        return data

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _await(self, operation: Coroutine[Any, Any, T], seconds: float | None) -> T:
        """Run a coroutine in fsspec's own thread."""
        from fsspec.asyn import get_loop

        loop = getattr(self._fs, "loop", None) or get_loop()
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(operation, seconds), loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _call(self, method: str, *words: Any, timeout: float | None = None, **named: Any) -> Any:
        """One operation of the driver, given up after a time."""
        from fsspec.asyn import AsyncFileSystem

        if not isinstance(self._fs, AsyncFileSystem):
            return getattr(self._fs, method)(*words, **named)
        run = getattr(self._fs, f"_{method}")
        return self._await(run(*words, **named), timeout or _seconds(0))

    def _info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call("info", self._path(name))
        return found

    def _present(self, name: str, operation: Callable[[], T], verb: str = "read") -> T:
        """Retry an operation on a file; where it is missing, look whether the bucket is there."""
        try:
            return self._retry(verb, name, operation)
        except FileNotFoundError:
            self._refuse_missing_bucket()
            raise

    def _refuse_missing_bucket(self) -> None:
        """A missing object and a missing bucket look alike; tell them apart, once a process."""
        if self._bucket_stands:
            return
        bucket = self._root.strip("/").split("/", 1)[0]
        try:
            self._retry("list", "", lambda: self._call("info", bucket))
        except FileNotFoundError:
            raise TrainerError(
                f"{self.url}: bucket {bucket!r} does not exist; create it, or mend the URL"
            ) from None

    def _retry(self, verb: str, name: str, operation: Callable[[], T]) -> T:
        """Run a remote operation until it succeeds, cannot succeed, or the deadline is over."""
        patience = Patience(f"{self.where(name)}: could not {verb}")
        while True:
            try:
                result = operation()
                self._bucket_stands = True
                return result
            except TrainerError:
                raise
            except Exception as error:  # drivers raise OSError, botocore's and aiohttp's own
                # A service in trouble has been seen to deny a bucket that it had served before.
                denied = self._bucket_stands and answer_of(error)[1] == "NoSuchBucket"
                if isinstance(error, FileNotFoundError) and not denied:
                    raise
                seconds = patience.pause(OSError(str(error)) if denied else error)
                if seconds is None:
                    raise Unfetched(
                        f"{patience.over(error)}; what is finished is kept: run the same command "
                        "again when the service is back"
                    ) from None
                time.sleep(seconds)


@contextmanager
def _answers_416(start: int) -> Iterator[None]:
    """Turn the answer that a range lies behind the end into a fault that may mend."""
    try:
        yield
    except Exception as error:
        if answer_of(error)[0] == 416:
            raise ConnectionError(f"it has no byte {start}") from None
        raise


def _content_range(header: str | None, length: int | None) -> tuple[int, int | None]:
    """The first byte and the file's size by a Content-Range; the whole file without one."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", (header or "").strip())
    if match is None:
        return 0, length
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _reader(data: bytes) -> Callable[[int], Coroutine[Any, Any, bytes]]:
    left = memoryview(data)

    async def read(count: int) -> bytes:
        nonlocal left
        piece, left = bytes(left[:count]), left[count:]
        return piece

    return read


def _seconds(size: int) -> float:
    """How long an operation on so many bytes may take: the slowest line, and twice an answer."""
    return 2 * ANSWER_SECONDS + size / SLOWEST_BYTES_PER_SECOND


def _options(kind: str) -> dict[str, Any]:
    # Others write here too: nothing listed is remembered.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if kind == "s3":
        options["default_block_size"] = UPLOAD_PART_BYTES
        options["max_concurrency"] = 2
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "retries": {"total_max_attempts": 1},  # ours are the only ones
            "max_pool_connections": CONNECTIONS,
            # Newer clients add checksums by default that other servers than AWS refuse.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    if kind == "http":
        from aiohttp import ClientTimeout

        # Ours look at each piece; by default a whole body may take five minutes.
        options["client_kwargs"] = {"timeout": ClientTimeout(sock_connect=CONNECT_SECONDS)}
    return options
