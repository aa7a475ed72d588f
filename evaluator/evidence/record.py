"""What is kept of an arm, `arm.json`: its commands, and all that they follow from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Literal

from pydantic import Field

from evaluator.artifacts import Model, read_json, sha256_of, sha256_of_file
from evaluator.errors import EvaluatorError
from evaluator.evidence.commands import Place
from evaluator.evidence.experiment import Arm, recipe_path
from evaluator.report import ExportedBackbone

ARM_FILE = "arm.json"
WEIGHTS_OF = "weights of "


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
    inputs: dict[str, str] = Field(description="the categories; hashes of recipe and weights")
    steps: list[Step]
    done: bool


def new_record(place: Place, arm: Arm) -> ArmRecord:
    """The record of an arm that is begun."""
    return ArmRecord(
        format="semiformula-evidence-arm",
        format_version=1,
        arm=arm.name,
        experiment=arm.experiment.made_of(),
        inputs=inputs_of(place, arm),
        steps=[],
        done=False,
    )


def record_path(place: Place, arm: Arm) -> Path:
    """Where the record of an arm lies."""
    return place.runs / "arms" / arm.name / ARM_FILE


def read_record(place: Place, arm: Arm) -> ArmRecord:
    """The record of an arm; EvaluatorError when it was made of anything else than today's."""
    record = read_json(ArmRecord, record_path(place, arm))
    refuse_other(place, arm, record, evaluation=True)
    return record


def refuse_other(place: Place, arm: Arm, record: ArmRecord, *, evaluation: bool) -> None:
    """EvaluatorError when an arm was made of anything else than today's.

    Without `evaluation`, seeds, options of PaDiM and categories may differ: what was trained stays
    of use.
    """
    free = () if evaluation else ("seeds", "padim")
    now = new_record(place, arm)
    what = []
    if any(
        now.experiment[key] != record.experiment.get(key)
        for key in now.experiment
        if key not in free
    ):
        what.append(str(arm.path))
    for key in sorted({*now.inputs, *record.inputs}):
        a, b = now.inputs.get(key), record.inputs.get(key)
        more_seeds = key.startswith(WEIGHTS_OF) and (a is None or b is None)
        if a != b and (evaluation or not (more_seeds or key == "categories")):
            what.append(key)
    if what:
        path = record_path(place, arm)
        again = "run `evaluator evidence run` again" if evaluation else "remove its folder"
        raise EvaluatorError(
            f"{arm.name}: {', '.join(what)} changed since {path} was written; {again}"
        )


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
            found[f"{WEIGHTS_OF}{experiment.runs}, seed {seed}"] = exported.weights.sha256
    for text in (*(experiment.train or []), experiment.backbone or ""):
        for name in re.findall(r"\{data\}/([^,]+)", text):
            for file in sorted({name.format(seed=seed) for seed in experiment.seeds}):
                path = place.photographs / file
                found[f"DATA/{file}"] = sha256_of_file(path) if path.is_file() else "no such file"
    return found


def commit() -> str:
    """The checkout's commit, with `+` where files differ from it; `unknown` outside one."""
    here = Path(__file__).parent

    def git(*argv: str) -> str:
        try:
            result = subprocess.run(
                ["git", *argv], cwd=here, capture_output=True, text=True, check=False
            )
        except OSError:  # no git here
            return ""
        return result.stdout.strip() if result.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../..")
    return head + ("+" if changed else "")
