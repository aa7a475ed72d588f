"""The builder on Ray: a cluster started here, one that runs already, and nodes that die."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.farm import (
    calm_hashes,
    children,
    finished,
    kill_session,
    of_session,
    plan_only,
    start,
    wait_for_shards,
)

pytest.importorskip("ray", reason="ray is not installed (extra `ray`)")

MANY = {"samples": 600, "samples_per_shard": 2}
# What keeps every port of the tests' clusters on 127.0.0.1.
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def calm(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return calm_hashes(photographs, tmp_path_factory.mktemp("calm") / "out", **MANY)


@pytest.fixture
def planned(photographs: Path, tmp_path: Path) -> Path:
    return plan_only(photographs, tmp_path / "out", **MANY)


@pytest.fixture
def cluster() -> Iterator[dict[str, object]]:
    """Two nodes; nothing of them is left afterwards."""
    with started_cluster() as about:
        yield about


@contextlib.contextmanager
def started_cluster(*words: str) -> Iterator[dict[str, object]]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path must be short
        (Path(folder) / "ray").mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster", *words],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, **LOCAL, "RAY_TMPDIR": folder},
        )
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            kill_session(process.pid)
            process.wait()


def building(raylet: int) -> list[int]:
    """The processes of a node that build a shard."""
    return [pid for pid in children(raylet) if b"_build" in Path(f"/proc/{pid}/comm").read_bytes()]


@pytest.mark.slow
def test_ray_cluster_that_loses_a_node_builds_the_same_bytes(cluster, planned: Path, calm):
    process = start(
        "work", str(planned), "--engine", "ray", "--address", cluster["address"], **LOCAL
    )
    wait_for_shards(planned, process)
    while not building(cluster["second"]):
        assert process.poll() is None
        time.sleep(0.005)
    node = [*children(cluster["second"]), cluster["second"]]
    for pid in node:
        os.kill(pid, signal.SIGKILL)
    assert len(list(planned.glob("records/*.json"))) < 300
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert output.count("\n") == 1
    assert output.startswith("shards: ")
    assert finished(planned) == calm


@pytest.mark.slow
def test_ray_started_here_builds_the_same_bytes_and_leaves_nothing(planned: Path, calm):
    relative = os.path.relpath(planned)
    process = start("work", relative, "--engine", "ray", "--jobs", "2")
    output, errors = process.communicate(timeout=90)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("shards: 300 built, 0 stood already; 600 samples in ")
    assert finished(planned) == calm
    assert of_session(process.pid) == []


@pytest.mark.slow
def test_terminated_work_on_ray_ends_at_once_and_leaves_nothing(planned: Path):
    process = start("work", str(planned), "--engine", "ray", "--jobs", "2")
    wait_for_shards(planned, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors == f"Terminated; the same command goes on in {planned}.\n"
    assert of_session(process.pid) == []
    assert not (planned / "dataset.json").exists()


@pytest.mark.slow
def test_shard_whose_ray_workers_die_again_and_again_ends_the_work(planned: Path):
    process = start("work", str(planned), "--engine", "ray", "--jobs", "1")
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        for pid in of_session(process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"_build" in Path(f"/proc/{pid}/comm").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    output, errors = process.communicate()
    assert process.returncode == 1
    assert output == ""
    *said, error = errors.splitlines()  # Ray's own lines tell of each dead worker
    assert all(line.startswith("(raylet)") for line in said)
    assert "its Ray worker died 4 times (WorkerCrashedError; out of memory?)" in error
    assert of_session(process.pid) == []


@pytest.mark.slow
def test_ray_cluster_without_a_core_is_said(planned: Path):
    program = "import builder.ray_engine as e; e.QUIET_SECONDS = 1; from builder.cli import main; "
    words = ["work", str(planned), "--engine", "ray", "--address"]
    with started_cluster("bare") as about:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{program} main({[*words, about['address']]!r})"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **LOCAL},
            start_new_session=True,
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith(
            "no node of the Ray cluster has had a core for 1 s; `ray status` on its head node"
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == f"Interrupted; the same command goes on in {planned}.\n"


def test_ray_address_that_does_not_answer_is_one_line(planned: Path):
    process = start("work", str(planned), "--engine", "ray", "--address", "127.0.0.1:9")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("Error: --address 127.0.0.1:9: no answer ([Errno 111] ")
    assert errors.count("\n") == 1


def test_ray_that_cannot_start_is_one_line(planned: Path, tmp_path: Path):
    deep = tmp_path / ("a" * 100)  # a socket's path there is too long
    deep.mkdir()
    process = start("work", str(planned), "--engine", "ray", TMPDIR=str(deep))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("Error: no Ray cluster started here (")
    assert "AF_UNIX path length cannot exceed" in errors
    assert errors.count("\n") == 1


def test_ray_that_is_not_installed_is_one_line(planned: Path):
    program = "import sys; sys.modules['ray'] = None; from builder.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", program, "work", str(planned), "--engine", "ray"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == (
        "Error: ray is not installed; pip install 'semiformula[ray]' brings all it needs\n"
    )


def test_ray_node_that_does_not_see_the_plan_says_so(tmp_path: Path):
    program = (
        "import sys; from builder.ray_engine import _build; print(_build(sys.argv[1], 0, False))"
    )
    absent = str(tmp_path / "absent")
    run = subprocess.run(
        [sys.executable, "-c", program, absent], capture_output=True, text=True, check=True
    )
    assert f" does not see {absent}; give a URL that every node reaches" in run.stdout
