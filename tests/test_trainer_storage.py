"""Folders, web servers that fail, and any other fsspec URL, behind one interface."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest

from trainer import ranges
from trainer.errors import TrainerError
from trainer.faulty import Faults, FaultyServer, faulty_server
from trainer.patience import Patience, is_final, retry_seconds
from trainer.storage import Storage, Unfetched, is_remote, open_storage

pytest.importorskip("aiohttp", reason="the extra [http] is not installed")

DATA = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 64 kB, and little patience."""
    monkeypatch.setattr(ranges, "PART_BYTES", 2**16)
    monkeypatch.setattr(ranges, "DRIP_SECONDS", 0.3)
    monkeypatch.setattr(ranges, "ANSWER_SECONDS", 1.0)
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file of 300,000 bytes in `data/`."""
    (tmp_path / "served/data").mkdir(parents=True)
    (tmp_path / "served/data/0.tar").write_bytes(DATA)
    return tmp_path / "served"


def fetched(storage: Storage, tmp_path: Path, size: int = len(DATA)) -> bytes:
    with (tmp_path / "local").open("w+b") as file:
        storage.fetch("data/0.tar", size, file)
        file.seek(0)
        return file.read()


def faulty(folder: Path, *faults: str, **more: float) -> FaultyServer:
    return faulty_server(folder, Faults(plan={"0.tar": faults}, **more))  # type: ignore[arg-type]


def test_folder_gives_and_takes_files(folder: Path, tmp_path: Path) -> None:
    storage = open_storage(str(folder))
    assert storage.local == folder
    assert storage.read("data/0.tar") == DATA
    assert fetched(storage, tmp_path) == DATA
    storage.put("run/a.json", b"{}")
    storage.put("run/b", folder / "data/0.tar")
    assert storage.names() == ["data/0.tar", "run/a.json", "run/b"]
    assert storage.names("run") == ["run/a.json", "run/b"]
    assert storage.names("missing") == []
    assert (folder / "run/b").read_bytes() == DATA
    storage.delete("run/b")
    storage.delete("run/b")
    assert storage.names("run") == ["run/a.json"]
    assert open_storage(f"file://{folder}").read("run/a.json") == b"{}"


def test_folder_refuses_in_one_line(folder: Path, tmp_path: Path) -> None:
    storage = open_storage(str(folder))
    with pytest.raises(FileNotFoundError):
        storage.read("none")
    with pytest.raises(TrainerError, match=r"larger than 10 bytes, not one of our files"):
        storage.read("data/0.tar", max_bytes=10)
    with pytest.raises(Unfetched, match=r"0\.tar: 300000 bytes, expected 7"):
        fetched(storage, tmp_path, size=7)
    os.mkfifo(folder / "pipe")
    (folder / "data/0.tar").chmod(0)
    with pytest.raises(TrainerError, match="cannot be read"):
        storage.read("data")


def test_url_or_path() -> None:
    assert [is_remote(url) for url in ("/a", "a/b", "file:///a", "s3://b", "http://h/a")] == [
        False, False, False, True, True,
    ]  # fmt: skip


def test_any_fsspec_url_is_a_storage(tmp_path: Path) -> None:
    storage = open_storage("memory://semiformula-storage/set")
    storage.put("data/0.tar", DATA)
    (tmp_path / "b").write_bytes(b"two")
    storage.put("b", tmp_path / "b")
    assert storage.local is None
    assert storage.read("b") == b"two"
    assert fetched(storage, tmp_path) == DATA
    assert storage.names() == ["b", "data/0.tar"]
    assert storage.names("data") == ["data/0.tar"]
    storage.delete("b")
    with pytest.raises(FileNotFoundError):
        storage.read("b")
    fsspec.filesystem("memory").rm("/semiformula-storage", recursive=True)


def test_http_is_fetched_by_ranges(folder: Path, tmp_path: Path) -> None:
    with faulty_server(folder) as server:
        storage = open_storage(server.url)
        pieces: list[int] = []
        with (tmp_path / "local").open("w+b") as file:
            storage.fetch("data/0.tar", len(DATA), file, pieces.append)
        assert (tmp_path / "local").read_bytes() == DATA
        assert sum(pieces) == len(DATA)
        assert server.counts.paths == {"/data/0.tar": 5}
        assert storage.read("data/0.tar") == DATA
        with pytest.raises(FileNotFoundError):
            storage.read("none")
        with pytest.raises(TrainerError, match="larger than 10 bytes"):
            storage.read("data/0.tar", max_bytes=10)
        with pytest.raises(TrainerError, match=r"can be read only"):
            storage.put("a", b"1")


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "empty", "drip"])
def test_part_that_failed_is_asked_for_again_alone(
    folder: Path, tmp_path: Path, fault: str
) -> None:
    with faulty(folder, "", fault, fault) as server:
        assert fetched(open_storage(server.url), tmp_path) == DATA
        assert server.counts.faults[fault] == 2
        # Five parts, two of them more than once; what came of a part is not asked for again.
        assert server.counts.requests <= 5 + 2 * 2
        assert server.counts.bytes <= len(DATA) + 2000


@pytest.mark.parametrize("faults", [["hang"], ["whole"], ["", "", "whole"]])
def test_slow_and_whole_answers_cost_time_alone(
    folder: Path, tmp_path: Path, faults: Sequence[str]
) -> None:
    with faulty(folder, *faults, hang_seconds=1.5) as server:
        assert fetched(open_storage(server.url), tmp_path) == DATA


@pytest.mark.parametrize("faults", [["whole..."], ["whole", "whole", "whole", "whole", "whole"]])
def test_server_without_ranges_is_read_whole(
    folder: Path, tmp_path: Path, faults: Sequence[str]
) -> None:
    with faulty(folder, *faults) as server:
        assert fetched(open_storage(server.url), tmp_path) == DATA


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("503...", "Service Unavailable|503"),
        ("empty...", "0 of 300000 bytes of a part came"),
        ("reset...", "isconnected|reset"),
        ("drip...", "no answer in time"),
    ],
)
def test_fault_that_stays_is_one_line_at_the_deadline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "1")
    monkeypatch.setattr(ranges, "PART_BYTES", 2**20)
    start = time.monotonic()
    with faulty(folder, fault, drip_bytes_per_s=100) as server:
        storage = open_storage(server.url)
        line = rf"/data/0\.tar: could not read in \d+ tr(y|ies) over \d+ s \(.*({said})"
        with pytest.raises(Unfetched, match=line) as error:
            fetched(storage, tmp_path)
        assert "\n" not in error.value.message
    assert time.monotonic() - start < 4


def test_server_that_cuts_many_answers_is_read_piece_by_piece(folder: Path, tmp_path: Path) -> None:
    with faulty(folder, *["cut"] * 15) as server:
        assert fetched(open_storage(server.url), tmp_path) == DATA


def test_object_of_another_length_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "0.3")
    with faulty_server(folder) as server:
        storage = open_storage(server.url)
        for size in (len(DATA) - 1, len(DATA) + 1):
            with pytest.raises(Unfetched, match=r"it has 300000 bytes, expected|has no byte"):
                fetched(storage, tmp_path, size)
        with (tmp_path / "local").open("w+b") as file, pytest.raises(FileNotFoundError):
            storage.fetch("none", 3, file)


def test_what_cannot_mend_itself_is_one_line_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(TrainerError, match=r"s3://: names no bucket; expected s3://BUCKET/PREFIX"):
        open_storage("s3://")
    with pytest.raises(TrainerError, match=r"nonsense://a: no storage of this kind"):
        open_storage("nonsense://a")
    assert is_final(PermissionError("denied"))
    assert not is_final(ConnectionResetError())
    with pytest.raises(TrainerError, match=r"a: could not read \(denied\); check the credentials"):
        Patience("a: could not read").pause(PermissionError("denied"))
    assert time.monotonic() - start < 1


def test_patience_ends_and_headway_renews_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "0")
    patience = Patience("a: could not read")
    assert patience.pause(OSError("once")) is None
    assert patience.over(OSError("once")) == "a: could not read in 1 try over 0 s (once)"
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "1000")
    patience = Patience("a: could not read")
    pauses = [patience.pause(OSError("again")) for _ in range(20)]
    assert all(pause is not None and 0 <= pause <= 20 for pause in pauses)
    assert patience.attempts == 20
    patience.pause(OSError("again"), headway=True)
    assert patience.attempts == 1


@pytest.mark.parametrize("given", ["soon", "-1", "nan"])
def test_retry_seconds_that_are_none_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", given)
    with pytest.raises(TrainerError, match=f"SEMIFORMULA_RETRY_SECONDS={given}: expected seconds"):
        retry_seconds()
