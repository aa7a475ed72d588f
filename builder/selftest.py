"""`builder selftest --chaos`: a dataset built among kills and damage has a calm build's bytes."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from builder.artifacts import TEMPORARY
from builder.chaos import CHAOS
from builder.demo_render import PRODUCTS, render_normal
from builder.errors import BuilderError
from builder.recipe import RECIPES

SHARDS, SIZE_PX, JOBS = 16, 64, 2
FAULT_PROBABILITY = 0.01  # of each operation on a file
VICTIMS = ("parent", "worker", "parent and workers")  # in turn
ROUNDS_A_KILL = 3  # a run may end before its moment comes
MOST_FILES_WRITTEN = 10  # by a run before it is killed

Say = Callable[[str], None]


@dataclass
class Account:
    """What was done to a dataset on its way."""

    kills: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """For people."""
        parts = []
        for what, counts in (
            ("kills", self.kills),
            ("files damaged between runs", self.damage),
            ("injected storage errors", self.faults),
        ):
            listed = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
            parts.append(f"{counts.total()} {what}{f' ({listed})' if listed else ''}")
        return "; ".join(parts)


def chaos(
    folder: Path, *, samples: int, kills: int, seed: int, normals: str | None, say: Say
) -> Account:
    """Build calmly, then among chaos, in `folder`; the final files must be the same bytes.

    Raises BuilderError that names the files which differ, or when fewer kills than asked for came.
    """
    moments = random.Random(seed)
    calm, tried = folder / "calm", folder / "chaos"
    for place in (calm, tried):
        if place.exists():
            raise BuilderError(f"{place}: is there already; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    words = _build_words(folder, samples, normals)
    start = time.monotonic()
    _finish_calmly(folder, [*words, "--out", str(calm)])
    expected = _hashes(calm)
    spent = time.monotonic() - start
    say(f"calm: {samples} samples in {len(list(calm.glob('data/*')))} shards, {spent:.1f} s")
    account = Account()
    for number in range(1, ROUNDS_A_KILL * kills + 1):
        if account.kills.total() == kills:
            break
        _round(folder, tried, words, number, moments, account, say)
    done = _damage(tried, moments, account)
    say(f"last: {done}; build in peace")
    _finish_calmly(folder, [*words, "--out", str(tried)])
    log = folder / "faults.log"
    account.faults.update(log.read_text().splitlines() if log.exists() else [])
    found = _hashes(tried)
    different = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if different:
        raise BuilderError(
            f"{account.line()}; DIFFERENT from the calm build: {', '.join(different)}; "
            f"both are kept in {folder}"
        )
    if account.kills.total() < kills:
        raise BuilderError(
            f"same bytes, but only {account.kills.total()} of {kills} kills came in time; try more "
            f"--samples, or another --seed; all is kept in {folder}"
        )
    return account


def _build_words(folder: Path, samples: int, normals: str | None) -> list[str]:
    """The build command but for its --out, with a small recipe and photographs written first."""
    if normals is None:
        normals = str(folder / "photographs")
        for product in PRODUCTS:
            for i in range(2):
                path = Path(normals) / product / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = render_normal(product, "train", i, size_px=SIZE_PX, seed=0)
                Image.fromarray(pixels).save(path)
    text = (RECIPES / "fine.toml").read_text(encoding="utf-8")
    changes = {"samples": samples, "samples_per_shard": -(-samples // SHARDS), "size_px": SIZE_PX}
    for key, value in changes.items():
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    recipe = folder / "small.toml"
    recipe.write_text(text, encoding="utf-8")
    return ["build", str(recipe), "--normals", normals, "--jobs", str(JOBS)]


def _round(
    folder: Path,
    out: Path,
    words: list[str],
    number: int,
    moments: random.Random,
    account: Account,
    say: Say,
) -> None:
    """Damage what stands, start a run on a faulty storage, and kill it at some moment."""
    done = _damage(out, moments, account)
    # `work` needs a plan, and believes the size of a shard; `build` hashes what stands.
    planned = (out / "plan.json").exists()
    command = moments.choice(["build", "work"]) if planned else "build"
    arguments = [*words, "--out", str(out)]
    if command == "work":
        arguments = ["work", str(out), "--task", "auto", "--jobs", str(JOBS)]
    faults = f"{moments.random()}:{FAULT_PROBABILITY}:{folder / 'faults.log'}"
    victim = VICTIMS[account.kills.total() % len(VICTIMS)]
    with _running(folder, arguments, {CHAOS: faults}) as process:
        killed = _kill(process, victim, out, moments)
        _, errors = process.communicate()
        _wait_for_group(process.pid)
    if killed:
        account.kills[victim] += 1
        said = f"killed the {victim} after {killed:.1f} s"
    elif process.returncode:
        said = f"ended by a fault: {errors.strip().splitlines()[-1].removeprefix('Error: ')}"
    else:
        said = "went through"
    say(f"round {number}: {done}; {command}: {said}")


@contextmanager
def _running(
    folder: Path, arguments: list[str], variables: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """The builder as a process with a group of its own, which an exception ends."""
    scratch = {"SEMIFORMULA_SCRATCH": str(folder / "scratch")}  # of its own, to be removed with it
    environment = {key: value for key, value in os.environ.items() if key != CHAOS}
    with subprocess.Popen(
        [sys.executable, "-m", "builder", *arguments],
        env={**environment, **scratch, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def _finish_calmly(folder: Path, arguments: list[str]) -> None:
    with _running(folder, arguments, {}) as process:
        _, errors = process.communicate()
    if process.returncode:
        line = errors.strip().splitlines()[-1].removeprefix("Error: ")
        raise BuilderError(f"undisturbed `builder {arguments[0]}` failed: {line}")


def _kill(process: subprocess.Popen[str], victim: str, out: Path, moments: random.Random) -> float:
    """SIGKILL the victim once the run has written some files.

    Returns the seconds that it had, 0 when it had ended by then.
    """
    start, clock = time.time(), time.monotonic()
    wanted = moments.randrange(MOST_FILES_WRITTEN)
    moment = moments.uniform(0, 1)
    while process.poll() is None:
        workers = _workers(process.pid)
        ready = workers or victim != "worker"
        if ready and time.monotonic() - clock > moment and _written(out, start) >= wanted:
            target = moments.choice(workers) if victim == "worker" else process.pid
            with suppress(ProcessLookupError):
                (os.killpg if victim == "parent and workers" else os.kill)(target, signal.SIGKILL)
                return time.monotonic() - clock
        time.sleep(0.01)
    return 0.0


def _written(out: Path, since: float) -> int:
    """How many files were written since, the half-written ones included."""
    count = 0
    for path in out.glob("*/*"):  # hidden ones too
        with suppress(FileNotFoundError):
            count += path.stat().st_mtime > since
    return count


def _workers(pid: int) -> list[int]:
    """The worker processes of a run; on systems without /proc the run itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        return [pid]
    found = []
    for child in children.read_text().split():
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def _wait_for_group(pid: int, seconds: float = 30.0) -> None:
    """Workers end by themselves when their parent is gone."""
    end = time.monotonic() + seconds
    while _group_lives(pid):
        if time.monotonic() > end:
            raise BuilderError(f"a worker outlived its killed parent by {seconds:.0f} s")
        time.sleep(0.02)


def _group_lives(group: int) -> bool:
    """Whether a process of the group runs; what has ended and is not reaped (Z) does not."""
    if not Path("/proc/self/stat").exists():
        with suppress(ProcessLookupError):
            os.killpg(group, 0)
            return True
        return False
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, found = path.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state != "Z":
                return True
    return False


def _damage(out: Path, moments: random.Random, account: Account) -> str:
    """Hurt a quarter of what stands; the plan is spared: no one may guess what it said."""
    files = sorted(path for path in out.glob("*/*") if not path.name.startswith("."))
    done = []
    for path in moments.sample(files, len(files) // 4):
        kind = moments.choice(list(_HURT))
        _HURT[kind](path, moments)
        done.append(kind)
    for folder in sorted(path for path in out.glob("*") if path.is_dir()):
        leftover = folder / f".{folder.name}-00000.tar{TEMPORARY}{moments.randrange(10**6)}"
        leftover.write_bytes(moments.randbytes(100))
        done.append("leftovers planted")
    account.damage.update(done)
    listed = Counter(done)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(listed.items())) or "no damage"


def _cut(path: Path, moments: random.Random) -> None:
    os.truncate(path, moments.randrange(path.stat().st_size + 1))


def _flip(path: Path, moments: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    path.write_bytes(data)


def _remove(path: Path, moments: random.Random) -> None:
    path.unlink()


_HURT = {"cut": _cut, "flipped": _flip, "deleted": _remove}


def _hashes(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
