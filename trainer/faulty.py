"""A web server that fails on purpose, for `trainer selftest --chaos` and for tests.

It serves a folder, with ranges, or stands before another server, such as an object store: what a
client asks is handed on as it is, Host included, so that its signature stays valid. Bodies pass
through in pieces.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import mimetypes
import random
import re
import socket
import socketserver
import sys
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE_BYTES = 256 * 1024
UPSTREAM_SECONDS = 60.0
DRIPS_PER_SECOND = 10
HOP_BY_HOP = {"connection", "keep-alive", "expect", "te", "trailer", "transfer-encoding", "upgrade"}
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>injected</Message></Error>"

# What can happen to an answer; the first three to any, the others to a body that is asked for.
FAULTS = {
    "503": "Slow Down, instead of the answer",
    "hang": "nothing for a while, then the answer",
    "reset": "the connection is closed when the answer should begin",
    "cut": "fewer bytes than Content-Length says, then the connection is closed",
    "flip": "one bit is wrong",
    "changed": "the bytes and the ETag of another version of the object, of the same length",
    "drip": "a few bytes at a time",
    "empty": "a body of no bytes, with a good status",
    "whole": "status 200 and the whole object, whatever range was asked for",
}
OF_A_BODY = ("cut", "flip", "changed", "drip", "empty", "whole")


@dataclass
class Counts:
    """What happened so far: requests (by path too), bytes of bodies sent, faults by kind."""

    requests: int = 0
    bytes: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Faults:
    """When an answer is faulty.

    `plan` gives for the end of a path (`""`: of any) the faults of its first requests in order,
    `""` for none; the last of them holds for all further ones where it ends in `...`, as in
    `{"0.tar": ["cut", "", "flip..."]}`. Any other request of a path that ends in `ends` meets one
    of `kinds` with `probability`, drawn from seed, path and number of the request of that path.
    """

    plan: Mapping[str, Sequence[str]] = field(default_factory=dict)
    probability: float = 0.0
    kinds: Sequence[str] = tuple(FAULTS)
    ends: str = ""
    seed: int = 0
    hang_seconds: float = 5.0
    drip_bytes_per_s: int = 1000

    def draw(self, path: str, number: int) -> str:
        """The fault of the request with this number, from 0, of a path; "" for none."""
        for end, faults in self.plan.items():
            if path.endswith(end) and faults:
                if number < len(faults):
                    return faults[number].removesuffix("...")
                if faults[-1].endswith("..."):
                    return faults[-1].removesuffix("...")
        moments = self.generator(path, number)
        drawn = path.endswith(self.ends) and moments.random() < self.probability
        return moments.choice(self.kinds) if drawn else ""

    def generator(self, path: str, number: int) -> random.Random:
        """Random numbers that depend on nothing but seed, path and number of the request."""
        return random.Random(f"{self.seed} {path} {number}")


@dataclass
class _Answer:
    """What a healthy server would say; `length` None: the body ends with the connection."""

    status: int
    headers: list[tuple[str, str]]
    length: int | None
    body: Iterator[bytes]


class FaultyServer:
    """A running server; `url` is its root, `counts` what happened, `faults` may be exchanged."""

    def __init__(self, source: Path | str, faults: Faults) -> None:
        self.faults = faults
        self.counts = Counts()
        self.source = source
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._versions: dict[str, tuple[int, bytes]] = {}
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="faulty", daemon=True
        )
        self._thread.start()

    def replace(self, name: str, data: bytes, after_requests: int = 0) -> None:
        """A second version of a file of the folder, from so many more requests of it on."""
        path = f"/{name}"
        with self._lock:
            self._versions[path] = (self.counts.paths[path] + after_requests, data)

    def begin(self, path: str) -> tuple[str, random.Random, bytes | None]:
        """Note a request: its fault, random numbers for it, and the replaced object's bytes."""
        with self._lock:
            number = self.counts.paths[path]
            self.counts.requests += 1
            self.counts.paths[path] += 1
            since, data = self._versions.get(path, (0, None))
        fault = self.faults.draw(path, number)
        assert fault in ("", *FAULTS), fault
        moments = self.faults.generator(f"of a body: {path}", number)
        return fault, moments, data if number >= since else None

    def note(self, fault: str = "", sent_bytes: int = 0) -> None:
        """Count an injected fault, or bytes sent."""
        with self._lock:
            self.counts.bytes += sent_bytes
            if fault:
                self.counts.faults[fault] += 1

    def close(self) -> None:
        """End every connection and thread."""
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()  # waits for the threads


@contextlib.contextmanager
def faulty_server(source: Path | str, faults: Faults | None = None) -> Iterator[FaultyServer]:
    """Serve a folder, or what stands at a base URL (`http://HOST:PORT`), on a free local port."""
    server = FaultyServer(source, faults or Faults())
    try:
        yield server
    finally:
        server.close()


class _Server(ThreadingHTTPServer):
    """Knows its open sockets, so that none outlives it."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, owner: FaultyServer) -> None:
        self.owner = owner
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the name service who it is

    def keep(self, connection: socket.socket) -> None:
        """A socket to shut when the server ends."""
        with self._lock:
            self._open.add(connection)

    def forget(self, connection: socket.socket) -> None:
        """A socket that is about to be closed."""
        with self._lock:
            self._open.discard(connection)

    def hang_up(self) -> None:
        """Wake every thread that waits for a client or for the upstream server."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.keep(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients and upstream servers that went away are what this server is for."""
        if not isinstance(sys.exception(), OSError | http.client.HTTPException):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """All methods are one: the folder knows GET and HEAD, an upstream server its own."""
        owner = self.server.owner
        path = urllib.parse.unquote(self.path.partition("?")[0])
        fault, moments, replaced = owner.begin(path)
        if fault in OF_A_BODY and self.command != "GET":
            fault = ""
        if fault == "whole" and "Range" not in self.headers:
            fault = ""
        if fault == "503":
            self._drain()
            owner.note(fault)
            self._send(_whole(503, SLOW_DOWN), moments, "")
            return
        if fault == "hang":
            owner.note(fault)
            owner.stopping.wait(owner.faults.hang_seconds)
        if fault == "whole":
            del self.headers["Range"]
        with contextlib.ExitStack() as stack:
            if isinstance(owner.source, Path):
                self._drain()
                answer = _of_folder(
                    owner.source, path, replaced, self.headers.get("Range"), self.command, stack
                )
            else:
                answer = self._of_upstream(owner.source, stack)
            if fault == "reset" or owner.stopping.is_set():
                owner.note(fault)
                self.close_connection = True
                return
            self._send(answer, moments, fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _request_pieces(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, PIECE_BYTES))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            yield piece

    def _drain(self) -> None:
        for _ in self._request_pieces():
            pass

    def _of_upstream(self, url: str, stack: contextlib.ExitStack) -> _Answer:
        """Hand the request on, and the answer back."""
        upstream = urllib.parse.urlsplit(url)
        assert upstream.scheme == "http", url
        connection = http.client.HTTPConnection(upstream.netloc, timeout=UPSTREAM_SECONDS)
        stack.callback(connection.close)
        connection.connect()
        self.server.keep(connection.sock)
        stack.callback(self.server.forget, connection.sock)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_BY_HOP:
                connection.putheader(name, value)
        connection.endheaders()
        for piece in self._request_pieces():
            connection.send(piece)
        response = stack.enter_context(contextlib.closing(connection.getresponse()))
        length = response.getheader("Content-Length")
        without = {*HOP_BY_HOP, "content-length"}
        headers = [pair for pair in response.getheaders() if pair[0].lower() not in without]
        pieces = iter(lambda: response.read(PIECE_BYTES), b"")
        return _Answer(response.status, headers, None if length is None else int(length), pieces)

    def _send(self, answer: _Answer, moments: random.Random, fault: str) -> None:
        """Status, headers and body, with what the fault makes of them."""
        owner = self.server.owner
        length = answer.length
        good = answer.status in (200, 206) and bool(length)
        fault = fault if fault == "hang" or good else ""
        end, wrong = length, -1
        if fault == "empty":
            end = length = 0
        elif fault == "cut":
            end = moments.randrange(length or 1)
        elif fault == "flip":
            wrong = moments.randrange(length or 1)
        if fault and fault != "hang":
            owner.note(fault)
        if length is None or fault == "cut":
            self.close_connection = True
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            other = fault == "changed" and name.lower() == "etag"
            self.send_header(name, '"another-version"' if other else value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        elif self.command != "HEAD":
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        position = 0
        for piece in answer.body:
            if end is not None:
                piece = piece[: end - position]
            if fault == "changed":
                piece = bytes(piece).translate(_INVERTED)
            elif position <= wrong < position + len(piece):
                piece = _flipped(piece, wrong - position, moments)
            self._write(piece, fault == "drip")
            position += len(piece)
            if position == end:
                break

    def _write(self, piece: bytes, drip: bool) -> None:
        owner = self.server.owner
        few = max(1, owner.faults.drip_bytes_per_s // DRIPS_PER_SECOND)
        step = few if drip else PIECE_BYTES
        for start in range(0, len(piece), step):
            if drip and owner.stopping.wait(1 / DRIPS_PER_SECOND):
                raise ConnectionError("the server ends")
            owner.note(sent_bytes=len(piece[start : start + step]))
            self.wfile.write(piece[start : start + step])


_INVERTED = bytes(255 - value for value in range(256))


def _flipped(piece: bytes, position: int, moments: random.Random) -> bytes:
    changed = bytearray(piece)
    changed[position] ^= 1 << moments.randrange(8)
    return bytes(changed)


def _whole(status: int, data: bytes, *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, list(headers), len(data), iter([data]))


def _of_folder(
    folder: Path,
    path: str,
    replaced: bytes | None,
    wanted: str | None,
    command: str,
    stack: contextlib.ExitStack,
) -> _Answer:
    """A file of the folder, or the range of it that is asked for."""
    if command not in ("GET", "HEAD"):
        return _whole(405, b"", ("Allow", "GET, HEAD"))
    file = folder / path.lstrip("/")
    if ".." in Path(path).parts or not file.is_file():
        return _whole(404, b"")
    stat = file.stat()
    size = stat.st_size if replaced is None else len(replaced)
    version = replaced or f"{stat.st_mtime_ns} {size}".encode()
    headers = [
        ("ETag", f'"{hashlib.sha256(version).hexdigest()[:32]}"'),
        ("Accept-Ranges", "bytes"),
        ("Content-Type", mimetypes.guess_type(file.name)[0] or "application/octet-stream"),
    ]
    start, stop, status = 0, size, 200
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if match is not None and any(match.groups()):
        first, last = match.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            return _whole(416, b"", ("Content-Range", f"bytes */{size}"))
        status = 206
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{size}"))
    if replaced is not None:
        return _Answer(status, headers, stop - start, iter([replaced[start:stop]]))
    opened = stack.enter_context(file.open("rb"))
    opened.seek(start)
    return _Answer(status, headers, stop - start, _pieces(opened, stop - start))


def _pieces(file: Any, left: int) -> Iterator[bytes]:
    while left:
        piece = file.read(min(left, PIECE_BYTES))
        if not piece:
            return
        left -= len(piece)
        yield piece
