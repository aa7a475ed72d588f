import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from builder import selftest
from builder.bucket import Bucket
from builder.chaos import CHAOS, Faults, FaultyBucket, FaultyFolder, disturbed
from builder.cli import main
from builder.errors import BuilderError
from builder.storage import Folder, open_storage


def always(log: Path) -> Faults:
    return Faults(f"0:1:{log}")


def write(storage: Folder | Bucket, name: str) -> None:
    with storage.write(name) as file:
        file.write(bytes(100))


def test_faulty_folder_fails_in_a_line_or_keeps_half(tmp_path: Path):
    storage = FaultyFolder(tmp_path / "root", always(tmp_path / "log"))
    outcomes = set()
    for i in range(20):
        with contextlib.suppress(BuilderError):
            write(storage, f"data/{i}")
        outcomes.add(storage.size(f"data/{i}"))
    assert outcomes == {50, None}
    assert not list(tmp_path.rglob(".*"))
    with pytest.raises(BuilderError, match="cannot be read"):
        storage.read("data/0")
    assert set((tmp_path / "log").read_text().split("\n")) == {
        "failed write",
        "lost end",
        "failed read",
        "",
    }


def test_faulty_folder_never_keeps_half_a_plan(tmp_path: Path):
    storage = FaultyFolder(tmp_path / "root", always(tmp_path / "log"))
    for _ in range(20):
        with pytest.raises(BuilderError, match=r"cannot be written \(No space left on device: inj"):
            write(storage, "plan.json")


def test_faulty_bucket_is_waited_for(tmp_path: Path):
    faults = Faults(f"0:0.3:{tmp_path / 'log'}")
    faults._random.seed(0)  # else another in every process
    storage = FaultyBucket(f"memory://{tmp_path}", faults)
    for i in range(4):
        write(storage, f"{i}")
        assert storage.read(f"{i}") == bytes(100)
    assert set((tmp_path / "log").read_text().splitlines()) == {"request lost", "answer lost"}


def test_storage_is_disturbed_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert type(open_storage(str(tmp_path / "a"))) is Folder
    monkeypatch.setenv(CHAOS, f"0:0.5:{tmp_path}")
    assert type(open_storage(str(tmp_path / "b"))) is FaultyFolder
    assert type(disturbed(Bucket("memory://c"))) is FaultyBucket
    monkeypatch.setenv(CHAOS, "often")
    with pytest.raises(BuilderError, match="SEMIFORMULA_CHAOS=often: expected SEED"):
        open_storage(str(tmp_path / "c"))


def test_chaos_ends_with_the_calm_bytes(photographs: Path, tmp_path: Path):
    words = ["selftest", "--chaos", "--samples", "48", "--kills", "1", "--seed", "3"]
    words += ["--normals", str(photographs), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(main, words)
    assert run.exit_code == 0, run.output
    first, *_, last = run.output.splitlines()
    assert first.startswith("calm: 48 samples in 16 shards")
    assert last.startswith("same bytes as the calm build, after 1 kills (1 parent); ")
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 1
    assert again.output == (f"Error: {tmp_path}/out/calm: is there already; choose another --out\n")


def test_chaos_names_what_differs(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    finish = selftest._finish_calmly

    def then_damaged(folder: Path, arguments: list[str]) -> None:
        finish(folder, arguments)
        if (folder / "chaos").exists():
            os.truncate(folder / "chaos/data/train-00001-of-00016.tar", 1000)

    monkeypatch.setattr(selftest, "_finish_calmly", then_damaged)
    with pytest.raises(BuilderError, match=r"DIFFERENT .* data/train-00001-of-00016\.tar; both"):
        selftest.chaos(
            tmp_path / "out", samples=16, kills=0, seed=0, normals=str(photographs), say=print
        )


def test_chaos_with_fewer_kills_than_asked_for_fails(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(selftest, "ROUNDS_A_KILL", 0)
    with pytest.raises(
        BuilderError, match="same bytes, but only 0 of 2 kills came in time; try more"
    ):
        selftest.chaos(
            tmp_path / "out", samples=16, kills=2, seed=0, normals=str(photographs), say=print
        )


@pytest.fixture
def unreaped_group() -> Iterator[int]:
    """A process group of one that has ended and that nobody waits for."""
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process.pid
    process.wait()


def test_ended_worker_that_nobody_reaps_is_not_waited_for(unreaped_group: int):
    selftest._wait_for_group(unreaped_group, 0.2)


def test_worker_that_lives_on_is_one_line():
    code = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    with pytest.raises(BuilderError, match=r"a worker outlived its killed parent by 1 s"):
        selftest._wait_for_group(process.pid, 1.0)
    process.kill()
    process.wait()


def test_error_after_a_run_was_read_is_passed_on(tmp_path: Path):
    def failing() -> None:
        with selftest._running(tmp_path, ["--version"], {}) as process:
            process.communicate()
            raise BuilderError("outlived")

    with pytest.raises(BuilderError, match="outlived"):
        failing()
