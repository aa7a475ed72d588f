"""The table of normals that the processes of a node share, and what killed ones leave of it."""

import fcntl
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builder.dataset import read_index
from builder.errors import BuilderError
from builder.scratch import normals_table, scratch_folder
from builder.storage import open_storage
from tests.shards_by_hand import flip_byte
from tests.test_builder_build import run


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    monkeypatch.setenv("SEMIFORMULA_SCRATCH", str(folder))
    return folder


def table_of(dataset: Path):
    storage = open_storage(str(dataset))
    index = read_index(storage)
    return normals_table(storage, index.normals, index.recipe)


def left_by_a_killed_process(dataset: Path, scratch: Path) -> Path:
    with table_of(dataset):
        files = {path: path.read_bytes() for path in scratch.iterdir()}
    for path, data in files.items():
        path.write_bytes(data)
    [table] = scratch.glob("*.npy")
    return table


def test_last_user_removes_the_table(dataset: Path, scratch: Path):
    with table_of(dataset) as one:
        with table_of(dataset) as other:
            assert np.array_equal(one.pixels, other.pixels)
        assert len(list(scratch.glob("*.npy"))) == 1
        assert (len(one.pixels), one.categories) == (6, ["steel"] * 3 + ["wood"] * 3)
    assert [path.suffix for path in scratch.iterdir()] == [".lock"]


@pytest.mark.parametrize("position", [-1, 60])
def test_table_that_was_damaged_is_made_again(position: int, dataset: Path, scratch: Path):
    with table_of(dataset) as table:
        expected = np.array(table.pixels)
    flip_byte(left_by_a_killed_process(dataset, scratch), position)
    with table_of(dataset) as table:
        assert np.array_equal(table.pixels, expected)


def test_table_without_its_list_is_made_again(dataset: Path, scratch: Path):
    left_by_a_killed_process(dataset, scratch).with_suffix(".json").unlink()
    with table_of(dataset) as table:
        assert len(table.categories) == 6


def test_table_that_stands_whole_is_taken(dataset: Path, scratch: Path):
    path = left_by_a_killed_process(dataset, scratch)
    number = path.stat().st_ino
    with table_of(dataset):
        assert path.stat().st_ino == number


def test_grey_photographs_give_a_table_for_each_number_of_channels(scratch: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "grey" / "part"
    folder.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (32, 32)).astype(np.uint8)).save(folder / f"{i}.png")
    for channels in (1, 3):
        run(folder.parent, tmp_path / f"{channels}", channels=channels, samples=2)
    with ExitStack() as held:
        shapes = [held.enter_context(table_of(tmp_path / x)).pixels.shape for x in ("1", "3")]
    assert shapes == [(2, 32, 32, 1), (2, 32, 32, 3)]


def test_what_killed_processes_left_is_swept(dataset: Path, scratch: Path):
    scratch.mkdir()
    for name in ("normals-0.npy", "normals-0.json", ".normals-0.npy.tmp-1-2", "normals-1.npy"):
        (scratch / name).write_bytes(b"left")
    (scratch / ".normals-1.json.tmp-1-2").write_bytes(b"in use")
    for number in "01":
        (scratch / f"normals-{number}.lock").touch()
    with (scratch / "normals-1.lock").open("ab") as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        with table_of(dataset):
            assert {path.name for path in scratch.iterdir() if path.name[-5:] != ".lock"} >= {
                "normals-1.npy",
                ".normals-1.json.tmp-1-2",
            }
            assert not list(scratch.glob("*normals-0.[nj]*"))


def test_lock_that_cannot_be_opened_is_one_line(dataset: Path, scratch: Path):
    with table_of(dataset):
        [lock] = scratch.glob("*.lock")
    lock.unlink()
    lock.mkdir()
    line = r"scratch folder .*cannot be used \(Is a directory\)"
    with pytest.raises(BuilderError, match=line), table_of(dataset):
        pass


def test_default_folder_behind_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SEMIFORMULA_SCRATCH")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / f"semiformula-{os.getuid()}").symlink_to(tmp_path / "other")
    with pytest.raises(BuilderError, match="others may write to it"):
        scratch_folder()
