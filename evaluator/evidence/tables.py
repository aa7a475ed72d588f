"""The results as CSV: arms.csv, differences.csv, commands.csv."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence

from evaluator.evidence import commands
from evaluator.evidence.commands import Place
from evaluator.evidence.differences import Difference
from evaluator.evidence.experiment import Arm
from evaluator.evidence.gathered import METRICS, Result
from evaluator.evidence.record import ArmRecord


def arms_csv(results: Sequence[Result]) -> str:
    """A line for each arm, category, metric and training seed, with what the number hangs on."""
    rows = [
        [
            *("arm", "question", "category", "metric", "training_seed", "mean", "sd"),
            *("padim_seeds", "dataset_sha256", "weights_sha256", "protocol_sha256", "commit"),
            "command",
        ]
    ]
    for result in results:
        backbones = result.report.backbones
        for category in result.categories:
            for metric in METRICS:
                score = result.scores.get((category, metric))
                if score is None:
                    continue
                for index, seed in enumerate(result.arm.experiment.seeds):
                    export = backbones[index].export
                    rows.append(
                        [
                            result.arm.name,
                            result.arm.experiment.question,
                            category,
                            metric,
                            str(seed),
                            f"{score.seeds[index]:.4f}",
                            f"{score.sds[index]:.4f}",
                            " ".join(map(str, result.report.seeds)),
                            export.dataset.content_sha256 if export else "",
                            backbones[index].weights_sha256,
                            result.report.protocol_sha256,
                            _commit(result, seed),
                            f"make evidence ONLY={result.arm.name}",
                        ]
                    )
    return _csv(rows)


def _commit(result: Result, seed: int) -> str:
    """Of the command that made the weights; of the evaluation where that is another arm's."""
    steps = result.record.steps
    own = f"/arms/{result.arm.name}/seed{seed}"
    made = [step for step in steps[:-1] if f"{own} " in f"{step.command} "]
    return (made or steps)[-1].commit


def differences_csv(found: Sequence[Difference]) -> str:
    """A line for each arm, group of categories and metric."""
    rows = [
        [
            *("arm", "baseline", "categories", "metric", "difference", "low", "high"),
            *("p", "p_holm", "told_apart"),
        ]
    ]
    for one in found:
        numbers = (one.difference, one.low, one.high)
        rows.append(
            [
                *(one.arm, one.baseline, one.categories, one.metric),
                *(f"{number:.4f}" for number in numbers),
                *(f"{p:.3g}" for p in (one.p, one.p_holm)),
                "yes" if one.distinct else "no",
            ]
        )
    return _csv(rows)


def commands_csv(place: Place, arms: Sequence[Arm], records: Mapping[str, ArmRecord]) -> str:
    """A line for each command that ran, of all arms, also of those that failed.

    What arms share comes first, without an arm: it ran when the first of them needed it.
    """
    begun = [arm for arm in arms if arm.name in records]
    shared = [commands.demo_data(place)]
    for arm in begun:
        if arm.experiment.data is not None:
            shared += commands.of_data(place, arm.experiment.data)
    rows = [["arm", "commit", "seconds", "exit_code", "command"]]
    lines = dict.fromkeys(place.named(shlex.join(argv)) for argv in shared)
    rows += [["", "", "", "", line] for line in lines]
    rows += [
        [
            *(arm.name, step.commit, f"{step.seconds:.0f}", str(step.exit_code)),
            place.named(step.command),
        ]
        for arm in begun
        for step in records[arm.name].steps
    ]
    return _csv(rows)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
