"""What a worker process still does once it was told to end, or nobody waits for its results."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from builder.signals import Terminated, heeding_sigterm
from builder.workers import WorkerKilled, results, worker_pool


def terminated_in_hand(folder: Path, number: int) -> None:
    """A shard that takes longer than a worker has to clear up; SIGTERM comes in its midst."""
    path = folder / f"{number}.half"
    path.touch()
    (folder / f"{number}.begun").touch()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)
    finally:
        path.unlink()


def test_terminated_worker_clears_up_and_begins_nothing_more(tmp_path: Path):
    tasks = [partial(terminated_in_hand, tmp_path, number) for number in range(4)]
    with pytest.raises(WorkerKilled), worker_pool(1) as pool:
        list(results(pool, tasks))
    assert [path.name for path in tmp_path.iterdir()] == ["0.begun"]


def slow(folder: Path, number: int) -> int:
    (folder / str(number)).touch()
    time.sleep(0.4)
    return number


def test_pool_that_is_left_ends_what_is_in_hand_alone(tmp_path: Path):
    def interrupted() -> None:
        with worker_pool(1) as pool:
            for _ in results(pool, [partial(slow, tmp_path, number) for number in range(9)]):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.iterdir()) in (["0"], ["0", "1"])


def in_a_library(told: bool) -> None:
    try:
        if told:
            os.kill(os.getpid(), signal.SIGTERM)
    except Terminated:
        pass
    raise RuntimeError("the library's own")


@pytest.mark.parametrize(("told", "error"), [(True, Terminated), (False, RuntimeError)])
def test_sigterm_that_a_library_turns_into_an_error_still_terminates(told: bool, error: type):
    with pytest.raises(error), heeding_sigterm():
        in_a_library(told)
