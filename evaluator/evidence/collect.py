"""From finished arms to the results folder: CSV files, pictures and the page, atomically each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from evaluator.artifacts import sha256_of, write_bytes
from evaluator.errors import EvaluatorError
from evaluator.evidence import commands
from evaluator.evidence.commands import Place
from evaluator.evidence.differences import differences, pooled_noise
from evaluator.evidence.experiment import Arm
from evaluator.evidence.gathered import METRICS, Result, gather, records
from evaluator.evidence.page import page
from evaluator.evidence.pictures import bars, losses
from evaluator.evidence.questions import Questions, read_questions
from evaluator.evidence.tables import arms_csv, commands_csv, differences_csv


def collect(place: Place, arms: list[Arm], out: Path) -> str:
    """Write the results of the arms that are done to `out`, README.md last; a line of summary.

    Raises EvaluatorError where no arm is done, or arms were evaluated on different categories.
    """
    questions = read_questions(place.experiments, arms)
    results, others = gather(place, arms)
    if not results:
        raise EvaluatorError(f"{place.runs}: no arm is done; run `evaluator evidence run` first")
    categories = results[0].categories
    for name in ("all", "chosen"):
        if name in categories:
            raise EvaluatorError(f"{place.inspection}: a category may not be called {name!r}")
    for result in results:
        if _seen(result) != _seen(results[0]):
            raise EvaluatorError(
                f"{place.report(result.arm.name)}: other photographs, masks or protocol than in "
                f"{place.report(results[0].arm.name)}; remove one and run its arm again"
            )
    chosen = [name for name in categories if name not in questions.untouched]
    groups = {"chosen": chosen, "all": categories, **{name: [name] for name in categories}}
    found = differences(results, groups)
    write_bytes(out / "arms.csv", arms_csv(results).encode())
    write_bytes(out / "differences.csv", differences_csv(found).encode())
    write_bytes(out / "commands.csv", commands_csv(place, arms, records(place, arms)).encode())
    pictures = _pictures(place, questions, results, out)
    titles = {arm.name: arm.experiment.title for arm in arms}
    of_chosen = [one for one in found if one.categories == "chosen"]
    for metric in METRICS[:2]:
        if any(one.metric == metric for one in of_chosen):
            name = f"differences-{metric}.png"
            write_bytes(out / name, bars(of_chosen, metric, titles))
            pictures.append(name)
    noises = {
        (name, metric): pooled_noise(results, members, metric)
        for name, members in groups.items()
        for metric in METRICS
    }
    text = page(questions, arms, results, others, found, noises, pictures, _photographs(results[0]))
    write_bytes(out / "README.md", text.encode())
    told = sum(one.distinct for one in of_chosen)
    return (
        f"{out}: {len(results)} of {len(arms)} arms, {told} of {len(of_chosen)} differences on "
        f"{', '.join(chosen)} told apart"
    )


def _seen(result: Result) -> tuple[object, ...]:
    """What pairs the draws of two arms: the very same photographs under the same protocol."""
    return (_photographs(result), result.report.protocol_sha256)


def _photographs(result: Result) -> str:
    """A short name of the photographs and masks that were evaluated."""
    evaluated = [(record.category, record.sha256) for record in result.report.categories]
    return sha256_of(json.dumps(evaluated).encode())[:16]


def _pictures(
    place: Place, questions: Questions, results: Sequence[Result], out: Path
) -> list[str]:
    """Pictures of procedural images alone; a command that fails leaves its picture out."""
    names = {result.arm.name: result for result in results}
    shown = [names[name] for name in questions.shown if name in names]
    made = []
    trained = [result for result in shown if result.arm.experiment.train is not None]
    if trained:
        write_bytes(out / "losses.png", losses(place, trained))
        made.append("losses.png")
    pictured = names.get(questions.pictured)
    if pictured is not None and pictured.arm.experiment.train is not None:
        run = place.run(pictured.arm.name, pictured.arm.experiment.seeds[0])
        if _ran("trainer", "show", str(run), "--out", str(out / "figure5.png")):
            made.append("figure5.png")
    if shown and all((place.inspection / name).exists() for name in questions.products):
        backbones = [
            part
            for result in shown
            for part in ("--backbone", f"{result.arm.name}={_spec(place, result)}")
        ]
        report = place.runs / "figure6"
        if _ran(
            *("evaluator", "padim", "--data", str(place.inspection), "--layout", "mvtec"),
            *("--categories", ",".join(questions.products), "--out", str(report)),
            *("--features", str(place.runs / "features"), "--features-max", "8"),
            *("--seeds", "1", "--bootstrap", "0", *backbones),
        ):
            write_bytes(out / "figure6.png", _smaller(report / "figure6.png"))
            made.append("figure6.png")
    return made


def _spec(place: Place, result: Result) -> str:
    return commands.spec(place, result.arm, result.arm.experiment.seeds[0])


def _ran(*argv: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-m", *argv], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        click.echo(f"left out: {' '.join(argv[:2])}: {' '.join(last)}", err=True)
    return done.returncode == 0


def _smaller(path: Path) -> bytes:
    """A picture of 300 dpi at a third of its size, for a page on a screen."""
    import io

    from PIL import Image

    with Image.open(path, formats=["PNG"]) as picture:
        small = picture.convert("RGB")
        small.thumbnail((picture.width // 3, picture.height // 3), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
