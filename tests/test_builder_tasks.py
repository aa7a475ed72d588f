"""Which shards a task looks after, and what happens when its processes are ended or killed."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import BuilderError
from builder.work import share_of
from tests.farm import (
    alive,
    calm_hashes,
    children,
    finished,
    plan_only,
    rest,
    start,
    wait_for_shards,
)

MANY = {"samples": 600, "samples_per_shard": 2}

SCHEDULERS = {
    "slurm": {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"},
    "slurm from 1": {
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_MAX": "4",
    },
    "slurm in steps": {
        "SLURM_ARRAY_TASK_ID": "11",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_ARRAY_TASK_MIN": "5",
        "SLURM_ARRAY_TASK_MAX": "14",
        "SLURM_ARRAY_TASK_STEP": "3",
    },
    "kubernetes": {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "4"},
    "aws batch": {"AWS_BATCH_JOB_ARRAY_INDEX": "2", "AWS_BATCH_JOB_ARRAY_SIZE": "4"},
    "cloud run": {"CLOUD_RUN_TASK_INDEX": "2", "CLOUD_RUN_TASK_COUNT": "4"},
    "google batch": {"BATCH_TASK_INDEX": "2", "BATCH_TASK_COUNT": "4"},
    "grid engine": {
        "SGE_TASK_ID": "12",
        "SGE_TASK_FIRST": "10",
        "SGE_TASK_LAST": "13",
        "SGE_TASK_STEPSIZE": "1",
    },
    "grid engine in steps": {
        "SGE_TASK_ID": "5",
        "SGE_TASK_FIRST": "1",
        "SGE_TASK_LAST": "8",
        "SGE_TASK_STEPSIZE": "2",
    },
}

# They name a task but not how many there are, or none at all: walk what is missing.
WITHOUT_TOTAL = {
    "nothing": {},
    "pbs": {"PBS_ARRAY_INDEX": "2"},
    "lsf": {"LSB_JOBINDEX": "2"},
    "kubernetes alone": {"JOB_COMPLETION_INDEX": "2"},
    "empty total": {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": ""},
    "total that is no number": {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "many"},
    "grid engine outside of arrays": {"SGE_TASK_ID": "undefined", "SGE_TASK_LAST": "undefined"},
    # sbatch --array=3,7,9: a task's place among them is not known to it.
    "slurm with gaps": {
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_ARRAY_TASK_MIN": "3",
        "SLURM_ARRAY_TASK_MAX": "9",
    },
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which no scheduler speaks."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SGE_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    return monkeypatch


@given(shards=st.integers(1, 300), tasks=st.integers(1, 400))
def test_tasks_share_the_shards_without_rest_or_overlap(shards: int, tasks: int):
    shares = [share_of(shards, f"{i}/{tasks}") for i in range(tasks)]
    assert sorted(index for share in shares for index in share) == list(range(shards))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("variables", SCHEDULERS.values(), ids=SCHEDULERS)
def test_task_auto_is_what_the_scheduler_says(variables: dict[str, str], environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert list(share_of(11, "auto")) == [2, 6, 10]


@pytest.mark.parametrize("variables", WITHOUT_TOTAL.values(), ids=WITHOUT_TOTAL)
def test_task_auto_without_a_total_walks_all_in_an_order_of_its_own(variables, environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    first, second = share_of(1000, "auto"), share_of(1000, "auto")
    assert sorted(first) == sorted(second) == list(range(1000))
    assert list(first) != list(second)


def test_task_auto_beyond_its_total_is_refused(environment):
    environment.setenv("JOB_COMPLETION_INDEX", "4")
    environment.setenv("JOB_COMPLETIONS", "4")
    with pytest.raises(BuilderError, match="tasks are numbered from 0 to 3"):
        share_of(11, "auto")


@pytest.mark.parametrize("task", ["", "1", "4/4", "-1/4", "1/0", "1/4/2", "one/4", "1 / 4"])
def test_task_that_is_none_is_refused(task: str):
    with pytest.raises(BuilderError, match="--task"):
        share_of(10, task)


@pytest.fixture(scope="module")
def calm(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of an undisturbed build of 300 tiny shards."""
    return calm_hashes(photographs, tmp_path_factory.mktemp("calm") / "out", **MANY)


@pytest.fixture
def planned(photographs: Path, tmp_path: Path) -> Path:
    return plan_only(photographs, tmp_path / "out", **MANY)


def worker(out: Path) -> subprocess.Popen[str]:
    scratch = str(out.parent / "scratch")
    return start("work", str(out), "--jobs", "2", SEMIFORMULA_SCRATCH=scratch)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes; the first child is Python's resource tracker."""
    return children(process.pid)[1:]


@pytest.mark.parametrize("whole_group", [False, True], ids=["parent", "all"])
def test_terminated_work_ends_at_once_with_one_line(whole_group: bool, planned: Path, calm):
    """Kubernetes signals the first process of a container, Slurm all processes of a task."""
    process = worker(planned)
    wait_for_shards(planned, process)
    pids = workers(process)
    start = time.monotonic()
    for pid in [*(pids if whole_group else []), process.pid]:
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    seconds = time.monotonic() - start
    assert process.returncode == 143
    assert errors == f"Terminated; the same command goes on in {planned}.\n"
    assert seconds < 5
    assert not any(alive(pid) for pid in pids)
    assert not list(planned.glob("*/.*"))
    assert (planned.parent / "scratch").exists()
    assert not list(planned.parent.glob("scratch/*.npy"))
    assert rest(planned) == calm


@pytest.mark.parametrize("whole_group", [False, True], ids=["parent", "all"])
def test_terminated_work_leaves_nothing_of_long_shards(
    whole_group: bool, photographs: Path, tmp_path: Path
):
    """They take longer than a worker has to clear up; more of them wait in the queue."""
    long = plan_only(photographs, tmp_path / "out", samples=400_000, samples_per_shard=40_000)
    process = worker(long)
    while len(list(long.glob("data/.*"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    for pid in [*(workers(process) if whole_group else []), process.pid]:
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert list((long / "data").iterdir()) == []


def test_killed_worker_is_replaced_by_half_as_many_once(planned: Path, calm):
    process = worker(planned)
    wait_for_shards(planned, process)
    os.kill(workers(process)[-1], signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert errors == "a worker process was killed; going on with 1 instead of 2\n"
    assert process.returncode == 0
    assert output.startswith("shards: ")
    assert finished(planned) == calm


def test_worker_killed_twice_ends_the_work_with_one_line(planned: Path, calm):
    process = worker(planned)
    wait_for_shards(planned, process)
    first = workers(process)
    os.kill(first[-1], signal.SIGKILL)
    while not (second := set(workers(process)) - set(first)):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(second.pop(), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    said, error = errors.splitlines()
    assert said == "a worker process was killed; going on with 1 instead of 2"
    assert error.startswith("Error: a worker process was killed, or could not start (out of m")
    assert rest(planned) == calm
