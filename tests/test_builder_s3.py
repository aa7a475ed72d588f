"""Against a real S3 service, which this file starts, breaks and revives."""

import hashlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from builder import bucket as bucket_module
from builder.bucket import Bucket
from builder.build import build
from builder.cli import main
from builder.errors import BuilderError
from builder.plan import make_plan
from builder.sources import find_source
from builder.status import finish, status_of
from builder.storage import open_storage
from builder.work import Done, build_shard, work
from tests.s3_service import Service, fresh_bucket, put_folder, running_service, s3fs
from tests.test_builder_build import hashes, recipe
from tests.test_builder_sources import THREE_FILES, grey_png


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as service:
        yield service


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    """A fresh bucket."""
    with fresh_bucket() as url:
        yield url


def remote_hashes(url: str) -> dict[str, str]:
    storage = Bucket(url)
    found = {}
    for entry in storage.walk():
        with storage.open(entry.name) as file:
            found[entry.name] = hashlib.sha256(file.read()).hexdigest()
    return dict(sorted(found.items()))


def here(
    url: str, indices: Sequence[int], deep: bool, say: Callable[[str], None]
) -> Iterator[Done]:
    """An engine without processes."""
    for index in indices:
        yield build_shard(url, index, deep)


def run_here(normals: str, out: str, engine=here) -> None:
    build(recipe(), find_source(normals, None, "CC0-1.0"), out, jobs=1, engine=engine)


def builder(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def small_recipe(folder: Path) -> Path:
    path = folder / "small.toml"
    fields = (Path(__file__).parent.parent / "builder/recipes/fine.toml").read_text().splitlines()
    wanted = {"samples": 20, "samples_per_shard": 6, "size_px": 32}
    named = {f"{key} =": f"{key} = {value}" for key, value in wanted.items()}
    lines = [
        next((new for key, new in named.items() if line.startswith(key)), line) for line in fields
    ]
    path.write_text("\n".join(lines))
    return path


def test_commands_on_a_bucket_give_the_bytes_of_a_local_build(
    url: str, dataset: Path, photographs: Path, tmp_path: Path
):
    words = [sys.executable, "-W", "default", "-m", "builder", "build", small_recipe(tmp_path)]
    words += ["--normals", photographs, "--licence", "CC0-1.0", "--out", f"{url}/a/b"]
    made = subprocess.run([*words, "--jobs", "2"], capture_output=True, text=True, check=True)
    assert "shards: 4 built, 0 verified as they stood, 4 in all" in made.stdout
    assert made.stderr == ""  # no word of unclosed sessions
    assert remote_hashes(f"{url}/a/b") == hashes(dataset)
    assert "finished: dataset.json stands" in builder("status", f"{url}/a/b").output
    assert builder("show", f"{url}/a/b", "--out", str(tmp_path / "a.png")).exit_code == 0


def test_killed_server_that_comes_back_is_waited_for(
    service: Service, url: str, dataset: Path, photographs: Path
):
    def breaking(url: str, indices: Sequence[int], *words) -> Iterator[Done]:
        servers = dict(zip(indices, ["proxy", "account", "container", "object"], strict=True))
        for index in indices:
            service.signal(servers[index], signal.SIGKILL)
            revival = threading.Timer(0.5, service.start)
            revival.start()
            yield from here(url, [index], *words)
            revival.join()

    run_here(str(photographs), f"{url}/d", breaking)
    assert remote_hashes(f"{url}/d") == hashes(dataset)


def test_killed_server_that_stays_away_is_one_line_and_the_command_goes_on_later(
    service: Service, url: str, dataset: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaking(url: str, indices: Sequence[int], *words) -> Iterator[Done]:
        yield from here(url, indices[:2], *words)
        monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "1")
        service.signal("object", signal.SIGKILL)
        yield from here(url, indices[2:], *words)

    with pytest.raises(
        BuilderError, match=r"could not .* tr(y|ies) over .* s \(.*\); what is finished"
    ):
        run_here(str(photographs), f"{url}/d", breaking)
    stuck = builder("status", f"{url}/d")
    assert stuck.exit_code == 1
    assert stuck.output.startswith(f"Error: {url}/d/plan.json: could not read in ")
    assert stuck.output.count("\n") == 1
    service.start()
    assert status_of(open_storage(f"{url}/d")).done == 2
    run_here(str(photographs), f"{url}/d")
    assert remote_hashes(f"{url}/d") == hashes(dataset)


def test_server_that_never_answers_is_given_up(
    service: Service, url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bucket_module, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(bucket_module, "SLOWEST_BYTES_PER_SECOND", 2**30)
    storage = Bucket(url)
    assert list(storage.entries("")) == []
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "0")
    service.signal("proxy", signal.SIGSTOP)
    start = time.monotonic()
    try:
        with pytest.raises(BuilderError, match="could not read"):
            storage.read("a")
        with pytest.raises(BuilderError, match=r"could not write in 1 try .*no answer in time"):
            put(storage, "a", bytes(30 * 2**20))  # more than the sockets take in
    finally:
        service.signal("proxy", signal.SIGCONT)
    assert time.monotonic() - start < 10


def put(storage: Bucket, name: str, data: bytes) -> None:
    with storage.write(name) as file:
        file.write(data)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "guessed"}, "could not .*; check the credentials and the URL"),
        ({"AWS_ACCESS_KEY_ID": "nobody:x"}, "could not .*; check the credentials and the URL"),
        ({"AWS_ACCESS_KEY_ID": None}, r"could not .* \(.*credentials.*; check the credentials"),
    ],
    ids=["wrong-secret", "wrong-key", "none"],
)
def test_credentials_that_do_not_fit_are_one_line_at_once(
    url: str,
    environment: dict[str, str | None],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("HOME", str(tmp_path))  # where a credentials file would lie
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    start = time.monotonic()
    for operation in (
        lambda storage: storage.read("plan.json"),
        lambda storage: storage.size("plan.json"),
        lambda storage: list(storage.entries("")),
        lambda storage: put(storage, "plan.json", b"1"),
    ):
        with pytest.raises(BuilderError, match=line):
            operation(Bucket(f"{url}/x"))
    assert time.monotonic() - start < 10


def test_bucket_that_is_not_there_is_one_line_at_once(service: Service, photographs: Path):
    start = time.monotonic()
    for words in (["status"], ["work"], ["finish"], ["show"]):
        failed = builder(*words, "s3://no-such-bucket/d")
        assert failed.exit_code == 1
        assert failed.output == (
            "Error: s3://no-such-bucket/d: bucket 'no-such-bucket' does not exist; create it, or "
            "mend the URL\n"
        )
    words = ["fine", "--normals", str(photographs), "--out", "s3://no-such-bucket/d"]
    assert "bucket 'no-such-bucket' does not exist" in builder("plan", *words).output
    with pytest.raises(BuilderError, match="bucket 'no-such-bucket' does not exist"):
        put(Bucket("s3://no-such-bucket/d"), "a", b"1")
    assert time.monotonic() - start < 10


def test_objects_that_somebody_damaged_are_found_and_built_again(url: str, dataset: Path):
    put_folder(dataset, url)
    storage = open_storage(url)
    put(storage, "data/train-00000-of-00004.tar", b"garbage")
    storage.delete("data/train-00001-of-00004.tar")
    put(storage, "records/train-00002-of-00004.json", b"")
    put(storage, "records/train-00003-of-00004.json", bytes(100_000))
    found = status_of(storage)
    assert (found.done, found.missing, found.bad) == (0, 0, 4)
    with pytest.raises(BuilderError, match="0 of 4 shards are missing, 4 bad"):
        finish(storage)
    assert work(url, "0/1", here).built == 4
    finish(storage)
    assert remote_hashes(url) == hashes(dataset)


def test_photographs_of_a_bucket_give_the_plan_of_a_folder(
    url: str, dataset: Path, photographs: Path, tmp_path: Path
):
    put_folder(photographs, f"{url}/{photographs.name}")
    source = find_source(f"{url}/{photographs.name}", None, "CC0-1.0")
    make_plan(open_storage(str(tmp_path / "out")), recipe(), source, jobs=1)
    expected = hashes(dataset)
    assert {name: expected[name] for name in hashes(tmp_path / "out")} == hashes(tmp_path / "out")


def test_manifest_with_its_data_in_a_bucket_is_as_from_a_folder(url: str, tmp_path: Path):
    (tmp_path / "three.toml").write_text(THREE_FILES)
    for name in ("train/000.png", "train/003.png", "test/000.png", "test/001.png"):
        grey_png(tmp_path / "root" / "a" / name)
    grey_png(tmp_path / "root/a/test/Label/001_label.PNG")
    put_folder(tmp_path / "root", f"{url}/root")
    local = find_source(str(tmp_path / "three.toml"), tmp_path / "root", None)
    remote = find_source(str(tmp_path / "three.toml"), f"{url}/root", None)
    assert remote.report == local.report
    assert [p.name for p in remote.photographs] == [
        "a/train/000.png",
        "a/train/003.png",
        "a/test/000.png",
    ]
    with pytest.raises(BuilderError, match="no image of three found"):
        find_source(str(tmp_path / "three.toml"), f"{url}/elsewhere", None)


def test_bucket_without_photographs_is_one_line(url: str):
    with pytest.raises(BuilderError, match=r"no images found .* among 0 files"):
        find_source(f"{url}/empty", None, None)


def test_listing_of_several_pages_is_whole(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bucket_module, "LISTED_AT_ONCE", 2)
    storage = Bucket(f"{url}/p")
    names = ["a", "b", "c", "d/e", "d/f", "d/g/h"]
    for i, name in enumerate(names):
        put(storage, name, bytes(i))
    assert [entry.name for entry in storage.entries("")] == ["a", "b", "c"]
    assert [(entry.name, entry.bytes) for entry in storage.walk()] == list(
        zip(names, range(6), strict=True)
    )
    assert [entry.name for entry in storage.walk("d")] == ["d/e", "d/f", "d/g/h"]
    assert list(storage.entries("d")) == list(storage.walk("d"))[:2]
    assert abs(next(storage.entries("")).modified - time.time()) < 60


def test_large_object_goes_in_parts_and_leaves_no_local_copy(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bucket_module, "PART_BYTES", 5 * 2**20)
    storage = Bucket(url)
    data = np.random.default_rng(0).bytes(12 * 2**20 + 1)
    put(storage, "large", data)
    with storage.open("large") as file:
        assert file.read() == data
    assert storage.size("large") == len(data)
    about = s3fs.S3FileSystem(skip_instance_cache=True).info(f"{url}/large")
    assert about["ETag"].strip('"').endswith("-3")  # three parts
    assert list(tmp_path.iterdir()) == []


def test_writer_that_fails_leaves_nothing(url: str):
    storage = Bucket(url)

    def interrupted() -> None:
        with storage.write("a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(storage.walk()) == []
    with pytest.raises(FileNotFoundError):
        storage.open("a").__enter__()
