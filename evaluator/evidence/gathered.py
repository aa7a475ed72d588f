"""What the arms' reports say: scores by arm, category, metric and training seed, with draws."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from evaluator.artifacts import read_json, sha256_of, write_bytes
from evaluator.cells import cell_statistics
from evaluator.compare import Resampled, resample
from evaluator.evidence.commands import Place
from evaluator.evidence.experiment import Arm
from evaluator.evidence.record import ArmRecord, read_record, record_path
from evaluator.report import Bootstrap, Metric, Report

METRICS: tuple[Metric, ...] = ("pixel_auroc", "aupro_30", "image_auroc")
SETTINGS = Bootstrap(draws=2000, seed=0, level=0.95)

Draws = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """One arm on one category under one metric, in percent.

    `seeds` [training seeds] are means over PaDiM's seeds, `sds` their spread over these. `draws`
    [bootstrap draws] of the mean over training seeds are paired between arms, and so is `without`:
    for each kind of image, good and defective, the number without one of them.
    """

    seeds: Draws
    sds: Draws
    draws: Draws
    without: tuple[Draws, ...]

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
    def arch(self) -> str:
        """The network of its backbones."""
        return self.report.backbones[0].arch

    @property
    def categories(self) -> list[str]:
        """The categories evaluated."""
        return [record.category for record in self.report.categories]


def gather(place: Place, arms: Sequence[Arm]) -> tuple[list[Result], dict[str, str]]:
    """The arms that are done, and of each other one what became of it."""
    results, others = [], {}
    for arm in tqdm(arms, unit="arm", disable=None):
        if not record_path(place, arm).is_file():
            others[arm.name] = "not run"
            continue
        record = read_record(place, arm)
        if record.done:
            results.append(_result(place, arm, record))
        else:
            last = record.steps[-1] if record.steps else None
            failed = last is not None and last.exit_code != 0
            said = place.named(last.last_line) if last else ""
            others[arm.name] = f"failed: {said}" if failed else "not finished"
    return results, others


def records(place: Place, arms: Sequence[Arm]) -> dict[str, ArmRecord]:
    """The records of the arms that were begun, by name."""
    paths = {arm.name: record_path(place, arm) for arm in arms}
    return {name: read_json(ArmRecord, path) for name, path in paths.items() if path.is_file()}


def _result(place: Place, arm: Arm, record: ArmRecord) -> Result:
    folder = place.report(arm.name)
    report = read_json(Report, folder / "report.json")
    scores: dict[tuple[str, Metric], Scored] = {}
    for category in report.categories:
        cells = [cell for cell in report.scores if cell.category == category.category]
        resampled = _resampled(folder, report, category.category)
        for metric in METRICS:
            if metric not in cells[0].metrics:
                continue
            values = 100 * np.array([cell.metrics[metric] for cell in cells])
            spread = values.std(axis=1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
            scores[category.category, metric] = Scored(
                seeds=values.mean(axis=1),
                sds=spread,
                draws=resampled[metric].draws,
                without=resampled[metric].without,
            )
    return Result(arm, record, report, scores)


def _resampled(folder: Path, report: Report, category: str) -> dict[Metric, Resampled]:
    """Bootstrap draws and jackknife of the mean over all seeds, kept beside the report's cells.

    What is kept is found by all that it follows from, and worked out again where it is damaged.
    """
    cells = [cell for cell in report.scores if cell.category == category]
    hashes = [stored.sha256 for cell in cells for stored in cell.statistics]
    key = sha256_of(json.dumps([hashes, SETTINGS.model_dump(), METRICS]).encode())
    kept = folder / "cells" / f"draws-{key[:16]}.npz"
    try:
        return _read(kept)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        pass
    statistics = [one for cell in cells for one in cell_statistics(folder, cell)]
    found = resample(category, {"arm": statistics}, SETTINGS, metrics=METRICS)
    resampled = {metric: one for (_, metric), one in found.items()}
    arrays: dict[str, Draws] = {}
    for metric, one in resampled.items():
        arrays |= {f"{metric} draws": one.draws, f"{metric} value": np.array(one.value)}
        arrays |= {f"{metric} without {n}": part for n, part in enumerate(one.without)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(kept, buffer.getvalue())
    return resampled


def _read(kept: Path) -> dict[Metric, Resampled]:
    with np.load(kept, allow_pickle=False) as file:
        return {
            metric: Resampled(
                value=float(file[f"{metric} value"]),
                draws=file[f"{metric} draws"],
                without=(file[f"{metric} without 0"], file[f"{metric} without 1"]),
            )
            for metric in METRICS
            if f"{metric} value" in file
        }
