"""What the arms' reports say: scores by arm, category, metric and training seed, with draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from evaluator.artifacts import read_json
from evaluator.cells import cell_statistics
from evaluator.compare import resample
from evaluator.errors import EvaluatorError
from evaluator.evidence.commands import Place
from evaluator.evidence.experiment import Arm
from evaluator.evidence.run import ARM_FILE, ArmRecord
from evaluator.report import Bootstrap, Metric, Report

METRICS: tuple[Metric, ...] = ("pixel_auroc", "aupro_30", "image_auroc")
SETTINGS = Bootstrap(draws=2000, seed=0, level=0.95)

Draws = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """One arm on one category under one metric, in percent.

    `seeds` [training seeds] are means over PaDiM's seeds, `sds` their spread over these; `draws`
    [bootstrap draws] of the mean over training seeds are paired between arms.
    """

    seeds: Draws
    sds: Draws
    draws: Draws
    images: int

    @property
    def value(self) -> float:
        """The mean over training seeds."""
        return float(self.seeds.mean())


@dataclass(frozen=True)
class Result:
    """An arm that is done: its record, its report, and its scores by category and metric."""

    arm: Arm
    record: ArmRecord
    report: Report
    scores: Mapping[tuple[str, Metric], Scored]

    @property
    def categories(self) -> list[str]:
        """The categories evaluated."""
        return [record.category for record in self.report.categories]


def gather(place: Place, arms: Sequence[Arm]) -> tuple[list[Result], dict[str, str]]:
    """The arms that are done, and of each other one what became of it."""
    results, others = [], {}
    for arm in tqdm(arms, unit="arm", disable=None):
        path = place.runs / "arms" / arm.name / ARM_FILE
        if not path.is_file():
            others[arm.name] = "not run"
            continue
        record = read_json(ArmRecord, path)
        if record.experiment != arm.experiment.made_of():
            raise EvaluatorError(f"{arm.path}: has changed since {path} was written; run it again")
        if record.done:
            results.append(_result(place, arm, record))
        else:
            last = record.steps[-1] if record.steps else None
            failed = last is not None and last.exit_code != 0
            others[arm.name] = f"failed: {last.last_line}" if failed and last else "not finished"
    return results, others


def _result(place: Place, arm: Arm, record: ArmRecord) -> Result:
    folder = place.report(arm.name)
    report = read_json(Report, folder / "report.json")
    scores: dict[tuple[str, Metric], Scored] = {}
    for category in report.categories:
        cells = [cell for cell in report.scores if cell.category == category.category]
        draws = _draws(folder, report, category.category)
        for metric in METRICS:
            if metric not in cells[0].metrics:
                continue
            values = 100 * np.array([cell.metrics[metric] for cell in cells])
            spread = values.std(axis=1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
            scores[category.category, metric] = Scored(
                seeds=values.mean(axis=1),
                sds=spread,
                draws=draws[metric],
                images=len(category.images),
            )
    return Result(arm, record, report, scores)


def _draws(folder: Path, report: Report, category: str) -> dict[Metric, Draws]:
    """Bootstrap draws of the mean over all seeds, kept beside the report's cells."""
    cells = [cell for cell in report.scores if cell.category == category]
    kept = folder / f"draws-{category}-{cells[0].statistics[0].sha256[:12]}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as file:
            return {metric: file[metric] for metric in METRICS if metric in file}
    statistics = [one for cell in cells for one in cell_statistics(folder, cell)]
    found = resample(category, {"arm": statistics}, SETTINGS, metrics=METRICS)
    draws = {metric: found["arm", metric].draws for metric in METRICS if ("arm", metric) in found}
    np.savez(kept, **draws)  # type: ignore[arg-type]
    return draws
