"""What `trainer selftest --chaos` does to runs: kills, damage, and a look for what they left.

A run and all its processes, the launcher's and the loader's too, carry a mark in their environment,
by which /proc tells them from any others.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError

MARK = "SEMIFORMULA_SELFTEST"
PROC = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")
TEMPORARY = (".*.tmp-*", ".*.part*", "*.tmp")  # names of files that are being written
# In turn; a helper is a loader's worker or the fetcher, the launcher with one process the trainer.
STRIKES = ("SIGTERM", "all killed", "SIGUSR1", "launcher killed", "rank killed", "helper killed")


@dataclass(frozen=True)
class Process:
    """A living process of a run."""

    pid: int
    parent: int
    command: str


def living(mark: str) -> list[Process]:
    """The processes with this mark that have not ended."""
    wanted = f"{MARK}={mark}\0".encode()
    found = []
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):
            if wanted not in (folder / "environ").read_bytes():
                continue
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            if state not in "ZX":
                found.append(Process(int(folder.name), int(parent), command))
    return found


def wait_for_end(mark: str, seconds: float) -> None:
    """Wait until no process with this mark lives; TrainerError that names those who outlive it."""
    end = time.monotonic() + seconds
    while left := living(mark):
        if time.monotonic() > end:
            kill(left)
            named = "; ".join(f"{process.pid} {process.command[-80:]}" for process in left[:4])
            raise TrainerError(
                f"{len(left)} processes outlived the run by {seconds:.0f} s: {named}"
            )
        time.sleep(0.05)


def kill(processes: list[Process], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to each that is still there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def strike(kind: str, mark: str, launcher: int, world: int, moments: random.Random) -> bool:
    """Do one of STRIKES to a run; False when there was nobody left to strike."""
    processes = living(mark)
    first = [process for process in processes if process.pid == launcher]
    ranks = first if world == 1 else [p for p in processes if p.parent == launcher]
    known = {process.pid for process in (*first, *ranks)}
    helpers = [process for process in processes if process.pid not in known]
    victims, number = {
        "SIGTERM": (first, signal.SIGTERM),
        "SIGUSR1": (ranks, signal.SIGUSR1),  # torchrun itself would end by it at once
        "all killed": (processes, signal.SIGKILL),
        "launcher killed": (first, signal.SIGKILL),
        "rank killed": (ranks, signal.SIGKILL),
        "helper killed": (helpers or ranks, signal.SIGKILL),
    }[kind]
    if victims and kind != "all killed":
        victims = [moments.choice(victims)]
    kill(victims, number)
    return bool(victims)


def damage_cache(cache: Path, moments: random.Random) -> list[str]:
    """Flip, cut or remove a third of the files in the cache; what was done to each."""
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.stat().st_size)
    done = []
    for path in moments.sample(files, -(-len(files) // 3)):
        kind = moments.choice(sorted(HURT))
        HURT[kind](path, moments)
        done.append(kind)
    return done


def damage_checkpoint(records: list[dict[str, Any]], out: Path, moments: random.Random) -> str:
    """Flip or cut the newest checkpoint, if the one before is whole; what was done, or ""."""
    whole = [
        sha256((out / record["file"]).read_bytes()).hexdigest() == record["sha256"]
        for record in records[:2]
    ]
    if whole != [True, True]:
        return ""
    kind = moments.choice(["cut", "flipped"])
    HURT[kind](out / records[0]["file"], moments)
    return kind


def _cut(path: Path, moments: random.Random) -> None:
    os.truncate(path, moments.randrange(path.stat().st_size))


def _flip(path: Path, moments: random.Random) -> None:
    with path.open("r+b") as file:
        position = moments.randrange(path.stat().st_size)
        file.seek(position)
        value = file.read(1)[0] ^ (1 << moments.randrange(8))
        file.seek(position)
        file.write(bytes([value]))


def _remove(path: Path, moments: random.Random) -> None:
    path.unlink()


HURT = {"cut": _cut, "flipped": _flip, "removed": _remove}


def shared_memory() -> set[str]:
    """The names of this user's shared-memory files."""
    found = set()
    for path in SHARED_MEMORY.glob("*"):
        with suppress(OSError):
            if path.stat().st_uid == os.getuid():
                found.add(path.name)
    return found


def leftovers(folders: list[Path], temporary: Path, shared_before: set[str]) -> list[str]:
    """Files that nobody needs any more: half-written ones, those of $TMPDIR, shared memory.

    Shared memory that a living process has mapped is another program's.
    """
    found = [path for folder in folders for name in TEMPORARY for path in folder.rglob(name)]
    found += [path for path in temporary.rglob("*") if not path.is_dir()]
    new = shared_memory() - shared_before
    used = _mapped() if new else set()
    found += [SHARED_MEMORY / name for name in sorted(new) if f"{SHARED_MEMORY / name}" not in used]
    return [str(path) for path in found]


def _mapped() -> set[str]:
    return {line.split(maxsplit=5)[-1].strip() for path in _maps() for line in path.splitlines()}


def _maps() -> Iterator[str]:
    for path in PROC.glob("[0-9]*/maps"):
        with suppress(OSError):
            yield path.read_text()
