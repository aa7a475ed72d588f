"""The web server that fails on purpose."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer.faulty import FAULTS, Faults, faulty_server

DATA = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(DATA)
    return tmp_path


def ask(url: str, wanted: str = "", method: str = "GET", data: bytes | None = None):
    """Status, headers and body of one request."""
    headers = {"Range": wanted} if wanted else {}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.status, answer.headers, answer.read()


@pytest.mark.parametrize(
    ("wanted", "status", "expected", "content_range"),
    [
        ("", 200, DATA, None),
        ("bytes=0-9", 206, DATA[:10], "bytes 0-9/10240"),
        ("bytes=10230-", 206, DATA[-10:], "bytes 10230-10239/10240"),
        ("bytes=10230-99999", 206, DATA[-10:], "bytes 10230-10239/10240"),
        ("bytes=-10", 206, DATA[-10:], "bytes 10230-10239/10240"),
        ("pages=1-2", 200, DATA, None),
    ],
)
def test_folder_is_served_with_ranges(
    folder: Path, wanted: str, status: int, expected: bytes, content_range: str | None
) -> None:
    with faulty_server(folder) as server:
        found, headers, body = ask(f"{server.url}/data/a.tar", wanted)
        assert (found, body) == (status, expected)
        assert headers["Content-Range"] == content_range
        assert int(headers["Content-Length"]) == len(expected)
        assert server.counts.requests == 1
        assert server.counts.bytes == len(expected)
        assert not server.counts.faults


@pytest.mark.parametrize(
    ("path", "method", "wanted", "status"),
    [
        ("data/b.tar", "GET", "", 404),
        ("data", "GET", "", 404),
        ("data/../data/a.tar", "GET", "", 404),
        ("data/a.tar", "GET", "bytes=10240-", 416),
        ("data/a.tar", "DELETE", "", 405),
    ],
)
def test_folder_refuses_by_status(
    folder: Path, path: str, method: str, wanted: str, status: int
) -> None:
    with faulty_server(folder) as server:
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(f"{server.url}/{path}", wanted, method)
        error.value.close()
        assert error.value.code == status


def test_head_has_the_length_and_no_body(folder: Path) -> None:
    with faulty_server(folder) as server:
        status, headers, body = ask(f"{server.url}/data/a.tar", method="HEAD")
        assert (status, headers["Content-Length"], body) == (200, "10240", b"")


def test_cut_body_has_the_whole_length_and_fewer_bytes(folder: Path) -> None:
    with faulty_server(folder, Faults({"a.tar": ["cut"]})) as server:
        with pytest.raises(http.client.IncompleteRead) as error:
            ask(f"{server.url}/data/a.tar")
        assert DATA.startswith(error.value.partial)
        assert len(error.value.partial) + error.value.expected == len(DATA)
        assert ask(f"{server.url}/data/a.tar")[2] == DATA
        assert server.counts.faults == {"cut": 1}


def test_flipped_body_differs_in_one_bit(folder: Path) -> None:
    with faulty_server(folder, Faults({"a.tar": ["flip"]})) as server:
        body = ask(f"{server.url}/data/a.tar", "bytes=100-199")[2]
        different = [a ^ b for a, b in zip(body, DATA[100:200], strict=True) if a != b]
        assert len(different) == 1
        assert different[0].bit_count() == 1


def test_empty_body_has_a_good_status(folder: Path) -> None:
    with faulty_server(folder, Faults({"": ["empty"]})) as server:
        assert ask(f"{server.url}/data/a.tar", "bytes=0-9")[::2] == (206, b"")


def test_whole_object_comes_where_a_range_was_asked(folder: Path) -> None:
    with faulty_server(folder, Faults({"": ["whole"]})) as server:
        assert ask(f"{server.url}/data/a.tar", "bytes=0-9")[::2] == (200, DATA)


def test_changed_object_has_another_tag_and_bytes(folder: Path) -> None:
    with faulty_server(folder, Faults({"": ["", "changed"]})) as server:
        first, second = (ask(f"{server.url}/data/a.tar") for _ in range(2))
        assert first[1]["ETag"] != second[1]["ETag"]
        assert bytes(a ^ 255 for a in second[2]) == DATA


def test_replaced_object_is_served_after_some_requests(folder: Path) -> None:
    with faulty_server(folder) as server:
        server.replace("data/a.tar", b"new", after_requests=1)
        first, second = (ask(f"{server.url}/data/a.tar") for _ in range(2))
        assert (first[2], second[2]) == (DATA, b"new")
        assert first[1]["ETag"] != second[1]["ETag"]


def test_slow_down_is_503(folder: Path) -> None:
    with faulty_server(folder, Faults({"": ["503..."]})) as server:
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError) as error:
                ask(f"{server.url}/data/a.tar")
            assert error.value.code == 503
            assert b"<Code>SlowDown</Code>" in error.value.read()
            error.value.close()
        assert server.counts.faults == {"503": 3}


def test_reset_gives_no_answer(folder: Path) -> None:
    with (
        faulty_server(folder, Faults({"": ["reset"]})) as server,
        pytest.raises(http.client.RemoteDisconnected),
    ):
        ask(f"{server.url}/data/a.tar")


def test_drip_takes_its_time(folder: Path) -> None:
    with faulty_server(folder, Faults({"": ["drip"]}, drip_bytes_per_s=1000)) as server:
        start = time.monotonic()
        assert ask(f"{server.url}/data/a.tar", "bytes=0-499")[2] == DATA[:500]
        assert 0.4 < time.monotonic() - start < 5


def test_hang_comes_before_the_answer(folder: Path) -> None:
    with faulty_server(folder, Faults({"": ["hang"]}, hang_seconds=0.3)) as server:
        start = time.monotonic()
        assert ask(f"{server.url}/data/a.tar")[2] == DATA
        assert time.monotonic() - start > 0.3


def test_faults_are_drawn_from_seed_path_and_number() -> None:
    faults = Faults(probability=0.5, seed=3)
    drawn = [faults.draw("/a", i) for i in range(200)]
    assert drawn == [faults.draw("/a", i) for i in range(200)]
    assert drawn != [faults.draw("/b", i) for i in range(200)]
    assert drawn != [Faults(probability=0.5, seed=4).draw("/a", i) for i in range(200)]
    assert 70 < drawn.count("") < 130
    assert set(drawn) == {"", *FAULTS}
    assert Faults(probability=1, ends=".tar").draw("/a.json", 0) == ""


def test_closing_ends_what_hangs_and_leaves_no_thread(folder: Path) -> None:
    before = threading.active_count()
    with faulty_server(folder, Faults({"": ["hang..."]}, hang_seconds=1000)) as server:
        host = server.url.removeprefix("http://")
        idle = http.client.HTTPConnection(host)
        idle.connect()
        waiting = http.client.HTTPConnection(host)
        waiting.request("GET", "/data/a.tar")
        while not server.counts.faults:
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        waiting.getresponse()
    waiting.close()
    idle.close()
    assert threading.active_count() == before
    with pytest.raises(urllib.error.URLError):
        ask(f"{server.url}/data/a.tar")


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers with what it was asked."""

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = f"{self.command} {self.path} {self.headers['Host']} {self.headers['X-Signed']} "
        self.send_response(200)
        self.send_header("ETag", '"up"')
        if not self.path.endswith("endless"):
            self.send_header("Content-Length", str(len(said) + len(data)))
        self.end_headers()
        self.wfile.write(said.encode() + data)

    do_PUT = do_GET


@contextmanager
def upstream() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_upstream_is_asked_as_the_client_asked() -> None:
    with upstream() as url, faulty_server(url) as server:
        headers = {"Host": "bucket.example", "X-Signed": "yes"}
        request = urllib.request.Request(
            f"{server.url}/b/k%20y?list-type=2", bytes(700_000), headers, method="PUT"
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            body = answer.read()
        said = b"PUT /b/k%20y?list-type=2 bucket.example yes "
        assert body == said + bytes(700_000)
        assert answer.headers["ETag"] == '"up"'
        assert server.counts.paths == {"/b/k y": 1}


def test_upstream_body_without_a_length_ends_with_the_connection() -> None:
    with upstream() as url, faulty_server(url) as server:
        status, headers, body = ask(f"{server.url}/endless")
        assert (status, headers["Content-Length"]) == (200, None)
        assert body.startswith(b"GET /endless ")


def test_upstream_answers_meet_faults_too() -> None:
    plan = {"/key": ["503", "cut", "reset"]}
    with upstream() as url, faulty_server(url, Faults(plan)) as server:
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(f"{server.url}/key", method="PUT", data=b"x")
        error.value.close()
        with pytest.raises(http.client.IncompleteRead):
            ask(f"{server.url}/key")
        with pytest.raises(http.client.RemoteDisconnected):
            ask(f"{server.url}/key", method="PUT", data=b"x")
        assert server.counts.faults == {"503": 1, "cut": 1, "reset": 1}


def test_upstream_that_is_gone_is_a_closed_connection() -> None:
    with upstream() as url:
        pass
    with faulty_server(url) as server, pytest.raises(http.client.RemoteDisconnected):
        ask(f"{server.url}/key")
