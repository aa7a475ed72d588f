"""What the tests of farms share: a dataset of many tiny shards, and processes to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from builder.build import build
from builder.plan import make_plan
from builder.sources import find_source
from builder.status import finish
from builder.storage import open_storage
from builder.work import local_engine, work
from tests.test_builder_build import hashes, recipe


def calm_hashes(photographs: Path, out: Path, **changes: object) -> dict[str, str]:
    """The hashes of an undisturbed local build."""
    build(recipe(**changes), find_source(str(photographs), None, "CC0-1.0"), out, jobs=1)
    return hashes(out)


def plan_only(photographs: Path, out: Path, **changes: object) -> Path:
    source = find_source(str(photographs), None, "CC0-1.0")
    make_plan(open_storage(str(out)), recipe(**changes), source, jobs=1)
    return out


def rest(out: Path) -> dict[str, str]:
    """Build what is missing, finish, and say what then stands."""
    work(str(out), "0/1", local_engine(1))
    return finished(out)


def finished(out: Path) -> dict[str, str]:
    finish(open_storage(str(out)))
    return hashes(out)


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """The builder's command line in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "builder", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def wait_for_shards(out: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    while len(list(out.glob("records/*.json"))) < count:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def of_session(session: int) -> list[int]:
    """The processes that a session still has."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.name))
    return found


def kill_session(session: int) -> None:
    for pid in of_session(session):
        os.kill(pid, signal.SIGKILL)
