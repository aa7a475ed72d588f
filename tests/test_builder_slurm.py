"""The printed Slurm script on a real Slurm, with tasks cancelled, requeued and killed midway."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.farm import calm_hashes, children, plan_only
from tests.test_builder_build import hashes

TASKS = 5
MANY = {"samples": 1500, "samples_per_shard": 1}


def answer_of_slurm() -> str:
    """Why no job can be run here, or an empty string."""
    if shutil.which("sbatch") is None:
        return "no sbatch here"
    try:
        words = ("sinfo", "--noheader", "--responding", "--format=%T")
        shown = subprocess.run(words, capture_output=True, text=True, timeout=10).stdout
    except subprocess.TimeoutExpired:
        return "slurmctld does not answer"
    if not re.search("idle|mixed|allocated", shown):
        return "no node of Slurm is up (sinfo)"
    return ""


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=40)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def slurm() -> None:
    if lacking := answer_of_slurm():
        pytest.skip(lacking)


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def begun(out: Path, task: int) -> bool:
    """Whether a shard of the task's share stands."""
    names = [path.name for path in out.glob("records/*.json")]
    return any(int(name.split("-")[1]) % TASKS == task for name in names)


def process_of(out: Path, task: int) -> int:
    """The process id of a running task."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(out) in words and f"{task}/{TASKS}" in words:
            return int(path.parent.name)
    raise AssertionError(f"task {task} does not run")


def submit(out: Path, logs: Path, tasks: int) -> list[str]:
    """The ids of the arrays, then that of the job that finishes."""
    words = [sys.executable, "-m", "builder", "launch", "slurm", str(out), "--submit"]
    words += ["--tasks", str(tasks), "--cpus-per-task", "1", "--max-array-size", "3"]
    printed = run(*words, "--time", "5", "--logs", str(logs))
    match = re.match(r"submitted: work ([\d ]+); finish (\d+)\nwatch: ", printed)
    assert match is not None, printed
    return [*match[1].split(), match[2]]


def in_queue(job: str) -> bool:
    return bool(run("squeue", "--noheader", "--jobs", job, check=False).strip())


@pytest.mark.slow
def test_disturbed_slurm_arrays_build_the_same_bytes(photographs: Path, tmp_path: Path):
    calm = calm_hashes(photographs, tmp_path / "calm", **MANY)
    out, logs = plan_only(photographs, tmp_path / "o u't", **MANY), tmp_path / "logs"
    first, second, finish = ids = submit(out, logs, TASKS)
    try:
        wait(lambda: begun(out, 0))
        run("scancel", f"{first}_0")
        wait(lambda: begun(out, 1))
        run("scontrol", "requeue", f"{first}_1")
        wait(lambda: begun(out, 2))
        os.kill(children(process_of(out, 2))[-1], signal.SIGKILL)  # a worker: replaced
        run("scontrol", "update", f"jobid={first}_1", "starttime=now")
        wait(lambda: begun(out, 3))
        os.kill(process_of(out, 3), signal.SIGKILL)  # a whole task
        wait(lambda: not in_queue(finish))
        assert not (out / "dataset.json").exists()
        said = next(logs.glob(f"finish-{finish}.log")).read_text()
        assert re.search(r"Error: .* [1-9]\d* of 1500 shards are missing, 0 bad", said)
        assert "going on with 1 instead of 1" in (logs / f"work-{first}_2.log").read_text()
        requeued = (logs / f"work-{first}_1.log").read_text()
        assert f"Terminated; the same command goes on in {out}.\n" in requeued
        assert "shards: " in requeued
        assert (logs / f"work-{second}_1.log").read_text().startswith("shards: 300 built")
        again = submit(out, logs, 2)
        ids += again
        wait(lambda: not in_queue(again[-1]))
    finally:
        run("scancel", *ids, check=False)
    assert hashes(out) == calm
