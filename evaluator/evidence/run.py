"""Runs the arms: data once, then training and evaluation, several arms side by side; resumable."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import FrameType

import click

from evaluator.artifacts import read_json, write_json
from evaluator.errors import EvaluatorError
from evaluator.evidence import commands
from evaluator.evidence.commands import Place
from evaluator.evidence.experiment import Arm, Data
from evaluator.evidence.record import ArmRecord, Step, commit, new_record, record_path, refuse_other


class Stopped(Exception):
    """The evidence run was asked to end; what this command did goes on with the next one."""


class Runner:
    """Starts commands, each in its own process, with a share of the machine's cores."""

    def __init__(self, place: Place, jobs: int) -> None:
        self.place, self.jobs = place, jobs
        self._data = threading.Lock()  # shared by arms: made once, and with all cores
        self._starting = threading.Lock()  # none starts beside `stop`
        self._stopped = False
        self._running: set[subprocess.Popen[str]] = set()

    def stop(self) -> None:
        """End what runs, with the one signal that makes the trainer write a checkpoint."""
        with self._starting:
            self._stopped = True
            running = set(self._running)
            for process in running:
                process.terminate()
        for process in running:
            process.wait()

    def __call__(self, argv: Sequence[str], log: Path, all_cores: bool = False) -> Step:
        """Run one command; its output goes to `log`. Raises Stopped once stopped."""
        threads = max(1, len(os.sched_getaffinity(0)) // (1 if all_cores else self.jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(argv)}\n")
            file.flush()
            at = file.tell()
            with self._starting:
                if self._stopped:
                    raise Stopped
                imported = commit()  # now: a long run may see the checkout change
                process = subprocess.Popen(
                    [sys.executable, "-m", *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment,
                    # A second signal, the terminal's beside ours, would end it without a
                    # checkpoint.
                    start_new_session=True,
                )
                self._running.add(process)
            code = process.wait()
            with self._starting:
                self._running.discard(process)
                if self._stopped:
                    raise Stopped
        said = log.read_bytes()[at:].decode("utf-8", "replace").strip().splitlines()
        return Step(
            command=shlex.join(argv),
            commit=imported,
            seconds=round(time.perf_counter() - started, 1),
            exit_code=code,
            last_line=said[-1][:300] if said else "",
        )

    def products(self) -> None:
        """The procedural products, and links to every category."""
        links = commands.inspection_links(self.place)
        if not (self.place.products / "demo.json").is_file():
            self._ready(commands.demo_data(self.place))
        link_all(self.place.inspection, links)

    def dataset(self, data: Data) -> None:
        """The dataset of an arm, once."""
        with self._data:
            if (self.place.dataset(data) / "dataset.json").is_file():
                return
            link_all(self.place.normals(data), commands.normals_links(self.place, data))
            for argv in commands.of_data(self.place, data):
                self._ready(argv)

    def _ready(self, argv: Sequence[str]) -> None:
        step = self(argv, self.place.runs / "data.log", all_cores=True)
        if step.exit_code:
            raise EvaluatorError(f"{step.command}: {step.last_line}")

    def arm(self, arm: Arm) -> ArmRecord:
        """Train and evaluate one arm; what an earlier run finished is not done again."""
        path = record_path(self.place, arm)
        record = self._record(arm)
        if record.done:
            return record
        if arm.experiment.data is not None:
            self.dataset(arm.experiment.data)
        todo = commands.of_arm(self.place, arm)
        steps = [step for step in record.steps if step.exit_code == 0]
        made = {step.command for step in steps}
        for number, argv in enumerate(todo, 1):
            if shlex.join(argv) not in made:
                click.echo(f"{arm.name}: {number} of {len(todo)}: {shlex.join(argv)}")
                steps.append(self(argv, path.parent / "log.txt"))
            well = steps[-1].exit_code == 0
            record = record.model_copy(update={"steps": steps, "done": well and argv is todo[-1]})
            write_json(path, record)
            if not well:
                break
        return record

    def _record(self, arm: Arm) -> ArmRecord:
        path, now = record_path(self.place, arm), new_record(self.place, arm)
        if not path.is_file():
            return now
        before = read_json(ArmRecord, path)
        if before.experiment != now.experiment or before.inputs != now.inputs:
            refuse_other(self.place, arm, before, evaluation=False)
            trained = [step for step in before.steps if not step.command.startswith("evaluator ")]
            return now.model_copy(update={"steps": trained})
        return before


def run_arms(place: Place, arms: Sequence[Arm], jobs: int) -> list[ArmRecord]:
    """Run arms, `jobs` at a time, in their order; an arm that fails stops no other.

    Arms that take others' runs begin when these are done. Ctrl-C, SIGTERM and SIGHUP end all with
    their checkpoints; the same call goes on.
    """
    commands.inspection_links(place)  # refuses a wrong DATA in the plainest words
    refuse_missing_normals(place, arms)
    click.echo(f"Each arm's log, with its rate and time left: {place.runs / 'arms'}/ARM/log.txt")
    runner = Runner(place, jobs)
    numbers = [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # nohup's
            signal.signal(number, _interrupt)
    try:
        return _run_all(runner, arms)
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def refuse_missing_normals(place: Place, arms: Sequence[Arm]) -> None:
    """EvaluatorError for kinds of normal images that arms paint on and DATA does not hold."""
    missing: dict[str, str] = {}
    for arm in arms:
        for kind in arm.experiment.data.normals if arm.experiment.data else []:
            if not (place.photographs / "normals" / kind).is_dir():
                missing.setdefault(kind, str(arm.path))
    if missing:
        raise EvaluatorError(
            f"{place.photographs / 'normals'}: no folder {', '.join(missing)}; add it, or name "
            f"other `normals` in {next(iter(missing.values()))} and the others that name it"
        )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_all(runner: Runner, arms: Sequence[Arm]) -> list[ArmRecord]:
    records: list[ArmRecord] = []
    names = {arm.name for arm in arms}
    own = [arm for arm in arms if arm.experiment.runs not in names]
    started, count = time.perf_counter(), 0
    with ThreadPoolExecutor(runner.jobs) as pool:
        try:
            runner.products()
            waiting = {pool.submit(runner.arm, arm): arm for arm in own}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    count += 1
                    arm = waiting.pop(future)
                    spent = (time.perf_counter() - started) / 60
                    left = spent / count * (len(arms) - count)
                    record, state = _outcome(future)
                    if record is not None:
                        records.append(record)
                    click.echo(
                        f"{arm.name}: {state} ({count} of {len(arms)}, {spent:.0f} min so far, "
                        f"about {left:.0f} left)"
                    )
                    borrowing = [other for other in arms if other.experiment.runs == arm.name]
                    waiting |= {pool.submit(runner.arm, other): other for other in borrowing}
        except KeyboardInterrupt:
            runner.stop()  # before the pool waits for its threads, and they for their commands
            pool.shutdown(cancel_futures=True)
            raise
    return records


def _outcome(future: Future[ArmRecord]) -> tuple[ArmRecord | None, str]:
    """The record of an arm, where there is one, and what became of the arm."""
    try:
        record = future.result()
    except EvaluatorError as error:
        return None, f"FAILED: {error.message}"
    except OSError as error:
        return None, f"FAILED: {error}"
    return record, "done" if record.done else f"FAILED: {record.steps[-1].last_line}"


def link_all(folder: Path, links: dict[str, Path]) -> None:
    """A folder of links, each made once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(target.absolute())
        elif link.resolve() != target.resolve():
            raise EvaluatorError(
                f"{link}: leads to {link.resolve()}, --data has {target.absolute()}; give the same "
                "--data, or other --runs"
            )
