"""A run in object storage: what is pushed and read back, and which side counts when they differ."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.runs_by_hand import Trained, config_by_hand, run_by_hand, save_by_hand
from tests.shards_by_hand import flip_byte
from trainer.artifacts import write_json
from trainer.checkpoint import newest_good
from trainer.errors import TrainerError
from trainer.mirror import OtherWriter, pull
from trainer.rundir import RunDir, run_dir
from trainer.storage import Folder, Unfetched

pytestmark = pytest.mark.usefixtures("one_thread")


class Bucket(Folder):
    """Stands for an object store: a folder of which puts can fail, wait, or arrive wrong."""

    down = False
    error: Exception | None = None  # what else a put may raise
    wrong = 0  # how many of the next files arrive with another byte

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.open = threading.Event()
        self.open.set()
        self.put_names: list[str] = []

    def put(self, name: str, source: Path | bytes) -> None:
        self.open.wait(30)
        if self.down:
            raise Unfetched(f"{self.where(name)}: could not write in 3 tries over 1 s (503)")
        if self.error is not None:
            raise self.error
        super().put(name, source)
        self.put_names.append(name)
        if self.wrong:
            self.wrong -= 1
            flip_byte(self.local / name, -1)


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    (tmp_path / "bucket").mkdir()
    return Bucket(tmp_path / "bucket")


def mirror(tmp_path: Path, name: str = "mirror") -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    return folder


def trained_here(place: RunDir, *steps: int, keep: int = 2) -> None:
    """Do what the trainer does: run.json at the start, then checkpoints with their files."""
    write_json(place.folder / "run.json", run_by_hand())
    place.begin()
    trained = Trained()
    trained.step()
    for step in steps:
        (place.folder / "metrics.jsonl").write_text("".join(f"line {i}\n" for i in range(step)))
        (place.folder / "ledger.json").write_text(f'{{"step": {step}}}\n')
        (place.folder / "figure5").mkdir(exist_ok=True)
        (place.folder / "figure5" / f"epoch-{step:04d}.png").write_bytes(b"picture")
        length = (place.folder / "metrics.jsonl").stat().st_size
        save_by_hand(place.folder, trained, step, keep, metrics_bytes=length)
        place.push()


def steps_in(folder: Path) -> list[int]:
    index = json.loads((folder / "checkpoint.json").read_text())
    return [record["step"] for record in index["checkpoints"]]


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def whole(folder: Path) -> bool:
    """Whether every checkpoint that checkpoint.json names is there as it says."""
    for record in json.loads((folder / "checkpoint.json").read_text())["checkpoints"]:
        data = (folder / record["file"]).read_bytes()
        if (len(data), hashlib.sha256(data).hexdigest()) != (record["bytes"], record["sha256"]):
            return False
    return True


def test_bucket_holds_what_the_page_says(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    assert place.settle()
    assert files_in(bucket.local) == {
        "run.json", "metrics.jsonl", "ledger.json", "figure5/epoch-0005.png",
        "checkpoint-00000005.safetensors", "checkpoint.json",
    }  # fmt: skip
    assert whole(bucket.local)
    assert bucket.put_names[-1] == "checkpoint.json"
    for name in files_in(bucket.local):
        assert (bucket.local / name).read_bytes() == (place.folder / name).read_bytes()
    assert not list(place.folder.glob(".push-*"))
    assert not list(place.folder.glob(".read-back"))


def test_older_checkpoints_leave_the_bucket_after_the_index(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    trained_here(place, 6, 7, 8, keep=2)
    place.settle()
    assert steps_in(bucket.local) == [8, 7]
    assert whole(bucket.local)
    kept = {name for name in files_in(bucket.local) if name.startswith("checkpoint-")}
    assert kept == {"checkpoint-00000007.safetensors", "checkpoint-00000008.safetensors"}


def test_what_is_there_is_not_sent_again(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5, 6)
    place.settle()
    sent = bucket.put_names.copy()
    place.push()
    place.settle()
    assert bucket.put_names == sent
    assert len([name for name in sent if name == "run.json"]) == 1


def test_bare_machine_goes_on_from_the_bucket(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5, 6)
    place.settle()
    other = RunDir(mirror(tmp_path, "other"), bucket)
    good = newest_good(other.folder, config_by_hand())
    assert good is not None
    assert good.record.step == 6
    for name in ("run.json", "metrics.jsonl", "ledger.json"):
        assert (other.folder / name).read_bytes() == (place.folder / name).read_bytes()
    trained_here(other, 7)
    assert other.settle()
    assert steps_in(bucket.local) == [7, 6]
    assert whole(bucket.local)


def test_pushes_that_come_late_are_one(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place)
    bucket.open.clear()
    trained = Trained()
    trained.step()
    for step in (5, 6, 7, 8):  # the network stands still, training goes on, files are removed
        save_by_hand(place.folder, trained, step, keep=1)
        place.push()
    bucket.open.set()
    assert place.settle()
    assert steps_in(bucket.local) == [8]
    assert whole(bucket.local)
    assert bucket.put_names.count("checkpoint.json") <= 2
    assert not list(place.folder.glob(".push-*"))


def test_storage_that_is_down_costs_a_warning_until_the_end(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    bucket.down = True
    trained_here(place, 6)
    assert not place.settle()
    error = capsys.readouterr().err
    assert error.startswith(f"Warning: {bucket.local}/checkpoint-00000006.safetensors: could not")
    assert error.endswith("training goes on, and the next checkpoint sends it again.\n")
    assert error.count("\n") == 1
    assert steps_in(bucket.local) == [5]
    assert whole(bucket.local)
    bucket.down = False
    trained_here(place, 7)
    assert place.settle()
    assert steps_in(bucket.local) == [7, 6]
    assert whole(bucket.local)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "(No space left on device)"),
        (ValueError("no such thing"), "(ValueError: no such thing)"),
    ],
)
def test_push_that_fails_otherwise_is_a_warning_and_is_settled(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    bucket.error = error
    trained_here(place, 6)
    assert not place.settle()
    assert capsys.readouterr().err == (
        f"Warning: {bucket.local}: the push failed {said}; training goes on, and the next "
        "checkpoint sends it again.\n"
    )
    bucket.error = None
    trained_here(place, 7)
    assert place.settle()
    assert steps_in(bucket.local) == [7, 6]


def test_product_that_is_not_there_ends_the_run_in_one_line(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    (place.folder / "backbone.safetensors").write_bytes(b"weights")
    (place.folder / "backbone.json").write_bytes(b"{}")
    bucket.down = True
    with pytest.raises(TrainerError) as error:
        place.finish()
    assert error.value.message == (
        f"{bucket.local}/backbone.safetensors: could not write in 3 tries over 1 s (503); the run "
        f"is finished and its backbone in {place.folder}"
    )
    bucket.down = False
    place.finish()
    assert (bucket.local / "backbone.safetensors").read_bytes() == b"weights"
    assert bucket.put_names[-1] == "backbone.json"


def test_start_needs_a_place_that_can_be_written(bucket: Bucket, tmp_path: Path) -> None:
    bucket.down = True
    with pytest.raises(TrainerError, match=r"run\.json: could not write"):
        trained_here(RunDir(mirror(tmp_path), bucket))


@pytest.mark.parametrize(("times", "arrives"), [(1, True), (2, True), (3, False)])
def test_wrong_bytes_are_sent_again(
    bucket: Bucket, tmp_path: Path, times: int, arrives: bool
) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place)
    bucket.wrong = times
    trained_here(place, 5)
    assert place.settle() == arrives
    assert (bucket.local / "checkpoint.json").exists() == arrives
    if arrives:
        assert whole(bucket.local)


def test_damaged_newest_in_the_bucket_is_passed_over(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5, 6)
    place.settle()
    flip_byte(bucket.local / "checkpoint-00000006.safetensors", -5)
    other = RunDir(mirror(tmp_path, "other"), bucket)
    error = capsys.readouterr().err
    assert error == (
        f"Warning: {bucket.local}/checkpoint-00000006.safetensors: SHA-256 differs from its "
        "record; it is damaged: going on from checkpoint-00000005.safetensors, step 5.\n"
    )
    assert steps_in(other.folder) == [5]
    other.begin()
    assert steps_in(bucket.local) == [5]  # before the lines of metrics beyond it are gone


def test_bucket_without_a_good_checkpoint_is_an_error(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    (bucket.local / "checkpoint-00000005.safetensors").unlink()
    with pytest.raises(TrainerError, match="no checkpoint is good, start another --out"):
        RunDir(mirror(tmp_path, "other"), bucket)


def test_mirror_that_is_further_on_counts(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    bucket.down = True
    trained_here(place, 6)
    place.settle()
    bucket.down = False
    again = RunDir(place.folder, bucket)
    assert steps_in(again.folder) == [6, 5]
    again.push()
    assert again.settle()
    assert steps_in(bucket.local) == [6, 5]
    assert whole(bucket.local)


def test_mirror_of_a_run_that_went_on_elsewhere_gives_way(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    other = RunDir(mirror(tmp_path, "other"), bucket)
    trained_here(other, 6)
    other.settle()
    bucket.down = True
    trained_here(place, 9)  # further on, but not on what the bucket holds
    place.settle()
    bucket.down = False
    capsys.readouterr()
    again = RunDir(place.folder, bucket)
    assert steps_in(again.folder) == [6, 5]
    assert capsys.readouterr().err == f"{place.folder}: going on from what {bucket.url} holds.\n"


def test_damaged_mirror_takes_the_bucket(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5, 6)
    place.settle()
    flip_byte(place.folder / "checkpoint-00000006.safetensors", -5)
    again = RunDir(place.folder, bucket)
    good = newest_good(again.folder, config_by_hand())
    assert good is not None
    assert good.record.step == 6


def test_kill_between_write_and_word_of_it_is_no_other_writer(
    bucket: Bucket, tmp_path: Path
) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    before = (bucket.local / "checkpoint.json").read_bytes()
    trained_here(place, 6)
    place.settle()
    # The mirror knows both: what it sent last, and what was there before.
    (bucket.local / "checkpoint.json").write_bytes(before)
    again = RunDir(place.folder, bucket)
    assert steps_in(again.folder) == [6, 5]
    again.push()
    assert again.settle()
    assert steps_in(bucket.local) == [6, 5]


def test_run_removed_from_the_bucket_starts_anew(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    for name in bucket.names():
        bucket.delete(name)
    again = RunDir(place.folder, bucket)
    assert files_in(again.folder) == {".mirror.json"}


def test_place_with_something_else_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    (bucket.local / "thesis.txt").write_text("do not overwrite")
    with pytest.raises(TrainerError, match=r"holds thesis\.txt and no run\.json"):
        RunDir(mirror(tmp_path), bucket)


def test_two_trainers_in_one_place_stop_at_once(bucket: Bucket, tmp_path: Path) -> None:
    first = RunDir(mirror(tmp_path), bucket)
    trained_here(first, 5)
    first.settle()
    second = RunDir(mirror(tmp_path, "other"), bucket)
    trained_here(second, 6)
    second.settle()
    trained_here(first, 7)
    with pytest.raises(OtherWriter, match="is another trainer at work in the same --out"):
        first.settle()
    with pytest.raises(OtherWriter):
        first.push()
    with pytest.raises(OtherWriter):
        first.finish()
    assert steps_in(bucket.local) == [6, 5]


def test_index_of_another_version_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5)
    place.settle()
    path = bucket.local / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    with pytest.raises(TrainerError, match="format_version is 1, this version reads 2 only"):
        RunDir(mirror(tmp_path, "other"), bucket)


class Flipping(Bucket):
    """A storage of which every third reading of a small file has another byte."""

    reads = 0

    def read(self, name: str, max_bytes: int = 2**28) -> bytes:
        data = super().read(name, max_bytes)
        self.reads += 1
        return data if self.reads % 3 else data[:-2] + b"x" + data[-1:]


def test_wrong_bytes_in_a_small_file_are_read_again(bucket: Bucket, tmp_path: Path) -> None:
    flipping = Flipping(bucket.local)
    place = RunDir(mirror(tmp_path), flipping)
    trained_here(place, 5, 6, 7)
    assert place.settle()
    other = RunDir(mirror(tmp_path, "other"), flipping)
    assert steps_in(other.folder) == steps_in(bucket.local)
    assert flipping.reads > 10


class OutOfReach(Bucket):
    """A storage that can be listed and read, but brings no large file."""

    def fetch(
        self,
        name: str,
        size: int,
        file: BinaryIO,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        raise Unfetched(f"{self.where(name)}: could not be fetched whole")

    def read(self, name: str, max_bytes: int = 2**28) -> bytes:
        if "checkpoint-" in "".join(self.put_names):
            raise Unfetched(f"{self.where(name)}: could not read in 3 tries over 1 s (503)")
        self.put_names.append("checkpoint-") if name == "checkpoint.json" else None
        return super().read(name, max_bytes)


def test_outage_while_pulling_is_no_damage(bucket: Bucket, tmp_path: Path) -> None:
    place = RunDir(mirror(tmp_path), bucket)
    trained_here(place, 5, 6)
    place.settle()
    with pytest.raises(TrainerError, match=r"checkpoint\.json: could not read in 3 tries"):
        pull(OutOfReach(bucket.local), mirror(tmp_path, "other"))


def test_local_folder_is_the_place_itself(tmp_path: Path) -> None:
    with run_dir(str(tmp_path / "run"), tmp_path / "cache") as place:
        assert place.folder == tmp_path / "run"
        trained_here(place, 5)
        assert place.settle()
        place.finish()
    assert not (tmp_path / "cache").exists()


def test_url_has_a_mirror_below_the_cache(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/run"
    with run_dir(f"{url}/", tmp_path / "cache") as place:
        assert place.folder.parent == tmp_path / "cache" / "runs"
        trained_here(place, 5)
        assert place.settle()
        with pytest.raises(TrainerError, match="another `trainer pretrain` is at work there"):
            locked_again(url, tmp_path / "cache")
    with run_dir(url, tmp_path / "elsewhere") as place:
        assert steps_in(place.folder) == [5]


def locked_again(url: str, cache: Path) -> None:
    """Ask for the same place from another process, as POSIX locks are a process's."""
    from multiprocessing import get_context

    with get_context("spawn").Pool(1) as pool:
        pool.apply(hold, (url, cache))


def hold(url: str, cache: Path) -> None:
    context: AbstractContextManager[RunDir] = run_dir(url, cache)
    with context:
        pass
