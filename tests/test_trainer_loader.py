"""The loader: order, memory used again, workers that die, signals, and nothing left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.shards_by_hand import write_dataset
from tests.slots import Slot, Slots, dataset_of
from trainer.errors import TrainerError
from trainer.loader import PREFETCH_BATCHES, batches_from, next_batch
from trainer.samples import Rows, Samples, never
from trainer.stops import Stopped

pytestmark = pytest.mark.usefixtures("one_thread")


def open_samples(folder: Path) -> Samples:
    dataset = dataset_of(folder)
    return Samples(dataset, Slots(folder, dataset))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order_whatever_the_workers(tmp_path: Path, workers: int) -> None:
    held = write_dataset(tmp_path)
    rng = np.random.default_rng(0)
    parts = [rng.permutation(10)[: 3 + step % 2].tolist() for step in range(25)]
    with batches_from(open_samples(tmp_path), iter(parts), workers, False) as stream:
        for part in parts:
            batch = next_batch(stream, never)
            assert batch.index.tolist() == part
            for row, index in enumerate(part):
                np.testing.assert_array_equal(batch.images[row].numpy(), held["images"][index])
                np.testing.assert_array_equal(batch.theta[row].numpy(), held["thetas"][index])
        with pytest.raises(StopIteration):
            next_batch(stream, never)


def test_batches_that_are_kept_stay_as_they_are(tmp_path: Path) -> None:
    held = write_dataset(tmp_path)
    parts = [[step % 10, (step + 3) % 10] for step in range(30)]
    with batches_from(open_samples(tmp_path), iter(parts), 1, False) as stream:
        kept = list(stream)  # more than there are slots
    for part, batch in zip(parts, kept, strict=True):
        for row, index in enumerate(part):
            np.testing.assert_array_equal(batch.images[row].numpy(), held["images"][index])


def test_memory_is_used_again_when_no_view_is_left(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with batches_from(open_samples(tmp_path), itertools.repeat([0, 1]), 1, False) as stream:
        view = next_batch(stream, never).images[0].permute(2, 0, 1)
        places = {next_batch(stream, never).images.data_ptr() for _ in range(20)}
        assert view.data_ptr() not in places
        assert 1 < len(places) <= PREFETCH_BATCHES + 2
        place = view.data_ptr()
        del view
        assert place in {next_batch(stream, never).images.data_ptr() for _ in range(20)}


def test_part_larger_than_the_first_comes_whole(tmp_path: Path) -> None:
    held = write_dataset(tmp_path)
    with batches_from(
        open_samples(tmp_path), iter([[1], list(range(10)), [2]]), 1, False
    ) as stream:
        batches = list(stream)
    assert [len(batch.index) for batch in batches] == [1, 10, 1]
    np.testing.assert_array_equal(batches[1].images.numpy(), np.stack(held["images"]))


class Blank(Samples):
    """Hands over rows as they are: many, and at once."""

    def read_into(
        self, rows: Rows, indices: Sequence[int], stop: Callable[[], bool] = never
    ) -> int:
        rows.index[: len(indices)] = indices
        return len(indices)


@pytest.mark.parametrize("room", ["for most", "for none"])
def test_parts_larger_than_a_pipe_wait_for_nobody(tmp_path: Path, room: str) -> None:
    write_dataset(tmp_path, size_px=2)
    dataset, size = dataset_of(tmp_path), 150_000  # 300 kB; a pipe holds some 200
    first = [] if room == "for none" else [[0] * size]
    parts = [[0], *([n] * (size + n) for n in range(6))]
    samples = Blank(dataset, Slots(tmp_path, dataset))
    with limit(20), batches_from(samples, iter(first + parts), 1, False) as stream:
        for part in first + parts:
            assert next_batch(stream, never).index.tolist() == part


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """End what waits for ever."""

    def over(number: int, frame: object) -> None:
        pytest.fail("waits for ever")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_is_one_line(tmp_path: Path, workers: int) -> None:
    write_dataset(tmp_path, edit=lambda name, data: data[:40] if name == "000000005.webp" else data)
    parts = iter([[0], [5]])
    with batches_from(open_samples(tmp_path), parts, workers, False) as stream:
        next_batch(stream, never)
        with pytest.raises(TrainerError, match="000000005: not readable as WEBP"):
            next_batch(stream, never)


def test_killed_worker_is_one_line(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with batches_from(open_samples(tmp_path), itertools.repeat([0]), 2, False) as stream:
        next_batch(stream, never)
        worker = stream.workers[1]
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(TrainerError, match="a loader worker was killed by SIGKILL; the same"):
            list(stream)


class Waiting(Slots):
    """A node whose shards never come."""

    def shard(self, shard: int, stop: Callable[[], bool]) -> Slot | None:
        while not stop():
            time.sleep(0.01)
        raise Stopped


@pytest.mark.parametrize("workers", [0, 1])
def test_stop_ends_the_wait_for_the_first_batch(tmp_path: Path, workers: int) -> None:
    write_dataset(tmp_path)
    dataset = dataset_of(tmp_path)
    samples = Samples(dataset, Waiting(tmp_path, dataset))
    start = time.monotonic()
    with (
        pytest.raises(Stopped),
        batches_from(samples, itertools.repeat([0]), workers, False) as stream,
    ):
        next_batch(stream, lambda: time.monotonic() > start + 0.3)
    assert time.monotonic() < start + 5


def test_workers_ignore_what_the_trainer_is_told(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with batches_from(open_samples(tmp_path), itertools.repeat([0, 3]), 1, False) as stream:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            assert stream.workers[0].pid is not None
            os.kill(stream.workers[0].pid, number)
        for _ in range(10):
            assert next_batch(stream, never).index.tolist() == [0, 3]


def test_end_of_the_stream_leaves_no_worker_and_no_file(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with batches_from(open_samples(tmp_path), itertools.repeat([0]), 2, False) as stream:
        next_batch(stream, never)
        workers = [worker.pid for worker in stream.workers]
    assert not any(is_alive(pid) for pid in workers if pid is not None)
    del stream
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("kind", ["Slots", "Waiting"])
def test_killed_trainer_leaves_nothing(tmp_path: Path, kind: str) -> None:
    write_dataset(tmp_path)
    command = [sys.executable, "-m", "tests.test_trainer_loader", str(tmp_path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        for pid in (parent.pid, *workers):  # what has a name there may be left there
            assert "/dev/shm" not in Path(f"/proc/{pid}/maps").read_text()
        parent.kill()
    end = time.monotonic() + 5
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that ended, but whose parent has not looked, does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def run_until_killed(folder: Path, kind: type[Slots]) -> None:
    dataset = dataset_of(folder)
    samples = Samples(dataset, kind(folder, dataset))
    with batches_from(samples, itertools.repeat([0, 1]), 2, False) as stream:
        print(*(worker.pid for worker in stream.workers), flush=True)
        while True:
            next_batch(stream, never)


if __name__ == "__main__":
    run_until_killed(Path(sys.argv[1]), {"Slots": Slots, "Waiting": Waiting}[sys.argv[2]])
