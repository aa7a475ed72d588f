"""The results as CSV: arms.csv, differences.csv, commands.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from evaluator.evidence.differences import Difference
from evaluator.evidence.experiment import Arm
from evaluator.evidence.gathered import METRICS, Result


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
                            result.record.commit,
                            f"make evidence ONLY={result.arm.name}",
                        ]
                    )
    return _csv(rows)


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


def commands_csv(
    results: Sequence[Result], others: Mapping[str, str], arms: Sequence[Arm], runs: str, data: str
) -> str:
    """A line for each command of each arm, also of those that failed or never ran.

    The folders of this machine are written RUNS and DATA.
    """
    rows = [["arm", "commit", "seconds", "exit_code", "command"]]
    done = {result.arm.name: result for result in results}
    for arm in arms:
        result = done.get(arm.name)
        if result is None:
            rows.append([arm.name, "", "", "", others[arm.name]])
            continue
        for step in result.record.steps:
            command = step.command.replace(runs, "RUNS").replace(data, "DATA")
            rows.append(
                [
                    *(arm.name, result.record.commit, f"{step.seconds:.0f}"),
                    *(str(step.exit_code), command),
                ]
            )
    return _csv(rows)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
