import contextlib
import os
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
    storage = FaultyBucket(f"memory://{tmp_path}", Faults(f"0:0.3:{tmp_path / 'log'}"))
    for i in range(4):
        write(storage, f"{i}")
        assert storage.read(f"{i}") == bytes(100)
    assert set((tmp_path / "log").read_text().split()) <= {"request", "answer", "lost"}


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
