import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import UnidentifiedImageError

from builder import bucket as bucket_module
from builder.bucket import Bucket, is_final, retry_seconds
from builder.errors import BuilderError
from builder.plan import make_plan
from builder.sources import find_source
from builder.status import finish
from builder.storage import Folder, Storage, TooLarge, is_remote, make_room, open_storage
from builder.work import local_engine, work
from tests.test_builder_build import hashes, recipe, run


def put(storage: Storage, name: str, data: bytes) -> None:
    with storage.write(name) as file:
        file.write(data)


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty place, local, and remote in this process's memory."""
    if request.param == "folder":
        return Folder(tmp_path / "root")
    return Bucket(f"memory://{tmp_path}/root")


def test_empty_storage_lists_nothing(storage: Storage):
    if isinstance(storage, Folder):
        assert list(storage.walk()) == list(storage.entries("")) == []
    assert storage.size("a") is None
    assert not storage.exists("a/b")
    storage.delete("a")


def test_written_files_are_listed_and_read(storage: Storage):
    for name in ("a", "b/c", "b/d/e"):
        put(storage, name, name.encode())
    assert [(one.name, one.bytes) for one in storage.entries("")] == [("a", 1)]
    assert [one.name for one in storage.entries("b")] == ["b/c"]
    assert sorted(one.name for one in storage.walk()) == ["a", "b/c", "b/d/e"]
    assert sorted(one.name for one in storage.walk("b")) == ["b/c", "b/d/e"]
    assert storage.read("b/c") == b"b/c"
    assert list(storage.read_many(["a", "none", "b/c"])) == [b"a", None, b"b/c"]
    assert list(storage.read_many(["none"])) == [None]
    with storage.open("b/d/e") as file:
        assert file.read() == b"b/d/e"
    put(storage, "a", b"other")
    assert storage.size("a") == 5
    storage.delete("a")
    assert not storage.exists("a")
    with pytest.raises(FileNotFoundError):
        storage.read("a")


def test_reads_are_bounded(storage: Storage):
    put(storage, "a", bytes(70_000))
    with pytest.raises(TooLarge, match=r"root/a: larger than 10 bytes, not one of our files"):
        storage.read("a", 10)
    assert [len(data or b"") for data in storage.read_many(["a", "a"])] == [65536, 65536]


def test_writer_that_fails_leaves_nothing(storage: Storage):
    put(storage, "b", b"")

    def interrupted() -> None:
        with storage.write("a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [one.name for one in storage.walk()] == ["b"]


def test_error_of_the_block_is_not_blamed_on_the_disk(tmp_path: Path):
    def undecodable() -> None:
        with Folder(tmp_path).write("a"):
            raise UnidentifiedImageError("no image")

    with pytest.raises(UnidentifiedImageError, match="no image"):
        undecodable()
    assert list(tmp_path.iterdir()) == []


def test_walk_of_a_folder_follows_no_links(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a" / "file")
    assert [one.name for one in Folder(tmp_path).walk()] == ["a/file"]


def test_link_is_no_file_of_the_folder(tmp_path: Path):
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to("file")
    folder = Folder(tmp_path)
    assert folder.size("link") is None
    assert list(folder.read_many(["link", "file"])) == [None, b"1"]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "name", ["data/train-00001-of-00004.tar", "records/train-00001-of-00004.json"]
)
def test_linked_file_is_built_again(deep: bool, name: str, dataset: Path, tmp_path: Path):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    (out / "dataset.json").unlink()
    done = work(str(out), "0/1", local_engine(1), deep=deep)
    assert (done.built, done.kept) == (1, 3)
    assert finish(open_storage(str(out))).samples == 20


def test_driver_that_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(BuilderError, match=r"needs more packages: pip install 'semiformula\[s3\]'"):
        open_storage("s3://bucket/without-driver")


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("ftpp://a/b", r"ftpp://a/b: no storage of this kind \(Protocol not known: ftpp\)"),
        ("s3://", r"s3://: names no bucket; expected s3://BUCKET/PREFIX"),
        ("s3:///prefix", "names no bucket"),
    ],
)
def test_url_that_names_no_storage_is_one_line(url: str, line: str):
    with pytest.raises(BuilderError, match=line):
        open_storage(url)


def test_file_urls_are_folders(tmp_path: Path):
    storage = open_storage(f"file://{tmp_path}")
    assert isinstance(storage, Folder)
    assert storage.path == tmp_path
    assert [is_remote(url) for url in ("a/b", "file:///a", "s3://a")] == [False, False, True]


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "inf"])
def test_deadline_that_is_no_number_is_one_line(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", given)
    with pytest.raises(BuilderError, match=f"SEMIFORMULA_RETRY_SECONDS={given}: expected seconds"):
        retry_seconds()


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ConnectionError(), False),
        (TimeoutError(), False),
        (OSError(5, "busy"), False),
        (PermissionError(), True),
        (NotImplementedError(), True),
        (ValueError("Invalid endpoint"), True),
    ],
)
def test_errors_worth_another_try(error: Exception, final: bool):
    assert is_final(error) == final


def failing(times: int) -> Callable[[], str]:
    left = [times]

    def operation() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("not now.\n")
        return "done"

    return operation


def test_fault_that_passes_is_waited_for():
    assert Bucket("memory://any")._retry("read", "a", failing(3)) == "done"


def test_fault_that_stays_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "0")
    line = (
        r"memory://any/a: could not read in 1 try over 0 s \(not now\); what is finished is "
        "kept: run the same command again when the service is back"
    )
    with pytest.raises(BuilderError, match=line):
        Bucket("memory://any")._retry("read", "a", failing(1))


def test_wait_is_announced_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bucket_module, "QUIET_SECONDS", -1.0)
    Bucket("memory://any")._retry("read", "a", failing(3))
    assert capfd.readouterr().err == "memory://any/a: no answer (not now); trying for 120 s more\n"


def test_read_only_storage_refuses_a_write_at_once():
    pytest.importorskip("aiohttp", reason="the extra [http] is not installed")
    with pytest.raises(BuilderError, match="can be read only; write to a folder"):
        put(Bucket("http://127.0.0.1:1"), "file", b"1")


def test_room_is_counted_on_the_disk(tmp_path: Path):
    storage = Folder(tmp_path / "not" / "made")
    assert make_room(storage, 1) == ""
    assert " GB needed, " in make_room(storage, 2**60)


def test_full_disk_is_one_line_and_the_same_command_goes_on(
    dataset: Path, photographs: Path, tmp_path: Path
):
    out = tmp_path / "out"
    source = find_source(str(photographs), None, "CC0-1.0")
    make_plan(open_storage(str(out)), recipe(), source, jobs=1)
    sizes = [path.stat().st_size for path in (dataset / "data").iterdir()]
    room = max(sizes) - 1  # for all shards but the largest

    def no_more_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    words = [sys.executable, "-m", "builder", "work", str(out), "--jobs", "1", "--task", "0/1"]
    stopped = subprocess.run(words, capture_output=True, text=True, preexec_fn=no_more_room)
    assert stopped.returncode == 1
    assert re.fullmatch(
        rf"Error: {out}/data/train-0000.-of-00004\.tar: cannot be written \(File too large\); what "
        r"is finished is kept: free space and run the same command again\n",
        stopped.stderr,
    )
    assert not list(out.rglob(".*"))
    whole = hashes(dataset)
    assert all(whole[name] == value for name, value in hashes(out).items())
    subprocess.run(words, check=True, capture_output=True)
    run(photographs, out)
    assert hashes(out) == whole


def test_full_temporary_folder_is_one_line(tmp_path: Path):
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    program = (
        "from builder.bucket import Bucket\n"
        "with Bucket('memory://x').write('a') as file:\n    file.write(bytes(2000))\n"
    )
    failed = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        preexec_fn=no_room,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert f"temporary folder {tmp_path}: cannot be written (File too large)" in failed.stderr
    assert list(tmp_path.iterdir()) == []
