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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Literal

import click
from pydantic import Field

from evaluator.artifacts import Model, read_json, sha256_of, write_json
from evaluator.errors import EvaluatorError
from evaluator.evidence import commands
from evaluator.evidence.commands import Place
from evaluator.evidence.experiment import Arm, Data, recipe_path
from evaluator.report import ExportedBackbone

ARM_FILE = "arm.json"


class Stopped(Exception):
    """The evidence run was asked to end; what this command did goes on with the next one."""


class Step(Model):
    """One command of an arm, the commit it ran at, and what became of it."""

    command: str
    commit: str
    seconds: float
    exit_code: int
    last_line: str


class ArmRecord(Model):
    """`arm.json`: the commands that made an arm, also where one of them failed."""

    format: Literal["semiformula-evidence-arm"]
    format_version: Literal[1]
    arm: str
    experiment: dict[str, object]
    inputs: dict[str, str] = Field(description="hashes of recipe, categories and borrowed weights")
    steps: list[Step]
    done: bool


class Runner:
    """Starts commands, each in its own process, with a share of the machine's cores."""

    def __init__(self, place: Place, jobs: int) -> None:
        self.place, self.jobs = place, jobs
        self.commit = commit()
        self._data = threading.Lock()  # shared by arms: made once, and with all cores
        self._starting = threading.Lock()  # none starts beside `stop`
        self._stopped = False
        self._running: set[subprocess.Popen[str]] = set()

    def stop(self) -> None:
        """End what runs, with the one signal that makes the trainer write a checkpoint."""
        with self._starting:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def __call__(self, argv: Sequence[str], log: Path, all_cores: bool = False) -> Step:
        """Run one command; its output goes to `log`. Raises KeyboardInterrupt once stopped."""
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
            commit=self.commit,
            seconds=round(time.perf_counter() - started, 1),
            exit_code=code,
            last_line=said[-1][:300] if said else "",
        )

    def products(self) -> None:
        """The procedural products, and links to every category."""
        inspection = self.place.photographs / "inspection"
        if not inspection.is_dir():
            raise EvaluatorError(
                f"{inspection}: no such folder; give --data FOLDER, which holds it"
            )
        if not (self.place.products / "demo.json").is_file():
            self._ready(commands.demo_data(self.place))
        links = {name: self.place.products / name for name in commands.PRODUCTS}
        links |= {path.name: path for path in inspection.iterdir() if path.is_dir()}
        link_all(self.place.inspection, links)

    def dataset(self, data: Data) -> None:
        """The dataset of an arm, once."""
        with self._data:
            if (self.place.dataset(data) / "dataset.json").is_file():
                return
            links = {name: self.place.photographs / "normals" / name for name in data.normals}
            for path in links.values():
                if not path.is_dir():
                    raise EvaluatorError(f"{path}: no such folder; give --data FOLDER")
            if data.textures:
                drawn = self.place.textures(data.textures)
                self._ready(commands.textures(self.place, data.textures))
                links["textures"] = drawn
            link_all(self.place.normals(data), links)
            self._ready(commands.build(self.place, data))

    def _ready(self, argv: Sequence[str]) -> None:
        step = self(argv, self.place.runs / "data.log", all_cores=True)
        if step.exit_code:
            raise EvaluatorError(f"{step.command}: {step.last_line}")

    def arm(self, arm: Arm) -> ArmRecord:
        """Train and evaluate one arm; what an earlier run finished is not done again."""
        folder = self.place.runs / "arms" / arm.name
        experiment = arm.experiment
        record = self._record(folder, arm)
        if record.done:
            return record
        todo = []
        for seed in experiment.seeds:
            if experiment.train is not None:
                todo.append(commands.pretrain(self.place, arm, seed))
            elif experiment.restate is not None:
                todo.append(commands.restate(self.place, arm, seed))
        todo.append(commands.padim(self.place, arm))
        if experiment.data is not None:
            self.dataset(experiment.data)
        steps = [step for step in record.steps if step.exit_code == 0]
        made = {step.command for step in steps}
        for number, argv in enumerate(todo, 1):
            if shlex.join(argv) not in made:
                # One echo, for arms that run side by side.
                click.echo(f"{arm.name}: {number} of {len(todo)}: {shlex.join(argv)}")
                steps.append(self(argv, folder / "log.txt"))
            well = steps[-1].exit_code == 0
            record = record.model_copy(update={"steps": steps, "done": well and argv is todo[-1]})
            write_json(folder / ARM_FILE, record)
            if not well:
                break
        return record

    def _record(self, folder: Path, arm: Arm) -> ArmRecord:
        path = folder / ARM_FILE
        if path.is_file():
            return read_record(self.place, arm, path)
        return ArmRecord(
            format="semiformula-evidence-arm",
            format_version=1,
            arm=arm.name,
            experiment=arm.experiment.made_of(),
            inputs=inputs_of(self.place, arm),
            steps=[],
            done=False,
        )


def read_record(place: Place, arm: Arm, path: Path) -> ArmRecord:
    """The record of an arm; EvaluatorError when it was made of anything else than today's."""
    record = read_json(ArmRecord, path)
    what = [] if record.experiment == arm.experiment.made_of() else [str(arm.path)]
    now = inputs_of(place, arm)
    what += [
        key for key in sorted({*now, *record.inputs}) if now.get(key) != record.inputs.get(key)
    ]
    if what:
        raise EvaluatorError(
            f"{arm.name}: {', '.join(what)} changed since {path} was written; remove that folder "
            "to make the arm again"
        )
    return record


def inputs_of(place: Place, arm: Arm) -> dict[str, str]:
    """What an arm is made of beside its experiment, by name: hashes, and the categories."""
    experiment = arm.experiment
    found = {"categories": ", ".join(sorted(path.name for path in place.inspection.iterdir()))}
    if experiment.data is not None:
        recipe = recipe_path(place.experiments, experiment.data)
        found[f"recipe {recipe.name}"] = sha256_of(recipe.read_bytes())
    if experiment.runs is not None:
        for seed in experiment.seeds:
            run = place.run(experiment.runs, seed)
            if not (run / "backbone.json").is_file():
                raise EvaluatorError(f"{arm.name}: {run} is not there; its arm has to be run first")
            exported = read_json(ExportedBackbone, run / "backbone.json")
            found[f"weights of {experiment.runs}, seed {seed}"] = exported.weights.sha256
    return found


def run_arms(place: Place, arms: Sequence[Arm], jobs: int) -> list[ArmRecord]:
    """Run arms, `jobs` at a time, in their order; an arm that fails stops no other.

    Arms that take others' runs wait for them. Ctrl-C and SIGTERM end all with their checkpoints;
    the same call goes on.
    """
    click.echo(f"Each arm's log, with its rate and time left: {place.runs / 'arms'}/ARM/log.txt")
    runner = Runner(place, jobs)
    runner.products()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run_all(runner, arms)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_all(runner: Runner, arms: Sequence[Arm]) -> list[ArmRecord]:
    records: list[ArmRecord] = []
    own = [arm for arm in arms if arm.experiment.runs is None]
    borrowing = [arm for arm in arms if arm.experiment.runs is not None]
    started, count = time.perf_counter(), 0
    with ThreadPoolExecutor(runner.jobs) as pool:
        try:
            for batch in (own, borrowing):
                waiting = {pool.submit(runner.arm, arm): arm for arm in batch}
                for future in as_completed(waiting):
                    count += 1
                    arm = waiting[future]
                    try:
                        record = future.result()
                    except (EvaluatorError, OSError) as error:
                        said = error.message if isinstance(error, EvaluatorError) else str(error)
                        click.echo(f"{arm.name}: {said}", err=True)
                        continue
                    records.append(record)
                    spent = (time.perf_counter() - started) / 60
                    left = spent / count * (len(arms) - count)
                    state = "done" if record.done else f"FAILED: {record.steps[-1].last_line}"
                    click.echo(
                        f"{arm.name}: {state} ({count} of {len(arms)}, {spent:.0f} min so far, "
                        f"about {left:.0f} left)"
                    )
        except KeyboardInterrupt:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return records


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


def commit() -> str:
    """The checkout's commit, with `+` where files differ from it; `unknown` outside one."""
    here = Path(__file__).parent

    def git(*argv: str) -> str:
        result = subprocess.run(
            ["git", *argv], cwd=here, capture_output=True, text=True, check=False
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../..")
    return head + ("+" if changed else "")
