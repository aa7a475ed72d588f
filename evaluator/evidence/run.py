"""Runs the arms: data once, then training and evaluation, several arms side by side; resumable."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import click

from evaluator.artifacts import Model, read_json, write_json
from evaluator.errors import EvaluatorError
from evaluator.evidence import commands
from evaluator.evidence.commands import Place
from evaluator.evidence.experiment import Arm, Data

ARM_FILE = "arm.json"


class Step(Model):
    """One command of an arm, and what became of it."""

    command: str
    seconds: float
    exit_code: int
    last_line: str


class ArmRecord(Model):
    """`arm.json`: the commands that made an arm, also where one of them failed."""

    format: Literal["semiformula-evidence-arm"]
    format_version: Literal[1]
    arm: str
    commit: str
    experiment: dict[str, object]
    steps: list[Step]
    done: bool


class Failed(Exception):
    """A command that ended with an exit code other than 0; its record is the last step."""


class Runner:
    """Starts commands, each in its own process, with a share of the machine's cores."""

    def __init__(self, place: Place, jobs: int) -> None:
        self.place, self.jobs = place, jobs
        self.commit = commit()
        self._data = threading.Lock()  # shared by arms: made once, and with all cores
        self._stop = threading.Event()
        self._running: set[subprocess.Popen[str]] = set()

    def stop(self) -> None:
        """End what runs, with the signal that makes the trainer write a checkpoint."""
        self._stop.set()
        for process in list(self._running):
            process.terminate()

    def __call__(self, argv: Sequence[str], log: Path, all_cores: bool = False) -> Step:
        """Run one command; its output goes to `log`. Raises KeyboardInterrupt once stopped."""
        threads = max(1, len(os.sched_getaffinity(0)) // (1 if all_cores else self.jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(argv)}\n")
            file.flush()
            at = file.tell()
            if self._stop.is_set():
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, "-m", *argv],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            self._running.add(process)
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        if self._stop.is_set():
            raise KeyboardInterrupt
        said = log.read_bytes()[at:].decode("utf-8", "replace").strip().splitlines()
        return Step(
            command=" ".join(argv),
            seconds=round(time.perf_counter() - started, 1),
            exit_code=code,
            last_line=said[-1][:300] if said else "",
        )

    def products(self) -> None:
        """The procedural products, and links to every category."""
        if not (self.place.products / "demo.json").is_file():
            self._ready(commands.demo_data(self.place))
        links = {name: self.place.products / name for name in commands.PRODUCTS}
        inspection = self.place.photographs / "inspection"
        if inspection.is_dir():
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
        for argv in todo:
            if " ".join(argv) not in made:
                steps.append(self(argv, folder / "log.txt"))
            done = steps[-1].exit_code == 0
            record = record.model_copy(
                update={"steps": steps, "done": done and argv is todo[-1], "commit": self.commit}
            )
            write_json(folder / ARM_FILE, record)
            if not done:
                break
        return record

    def _record(self, folder: Path, arm: Arm) -> ArmRecord:
        asked = arm.experiment.made_of()
        path = folder / ARM_FILE
        if path.is_file():
            record = read_json(ArmRecord, path)
            if record.experiment != asked:
                raise EvaluatorError(
                    f"{arm.path}: has changed since {path} was written; remove that folder, or "
                    "give the experiment another name"
                )
            return record
        return ArmRecord(
            format="semiformula-evidence-arm",
            format_version=1,
            arm=arm.name,
            commit=self.commit,
            experiment=asked,
            steps=[],
            done=False,
        )


def run_arms(place: Place, arms: Sequence[Arm], jobs: int) -> list[ArmRecord]:
    """Run arms, `jobs` at a time, in their order; an arm that fails stops no other.

    Arms that take others' runs wait for them. Ctrl-C ends all with their checkpoints; the same
    call goes on.
    """
    runner = Runner(place, jobs)
    runner.products()
    records: list[ArmRecord] = []
    own = [arm for arm in arms if arm.experiment.runs is None]
    borrowing = [arm for arm in arms if arm.experiment.runs is not None]
    started, count = time.perf_counter(), 0
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for batch in (own, borrowing):
                waiting = {pool.submit(runner.arm, arm): arm for arm in batch}
                for future in as_completed(waiting):
                    count += 1
                    arm = waiting[future]
                    try:
                        record = future.result()
                    except EvaluatorError as error:
                        click.echo(f"{arm.name}: {error.message}", err=True)
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
