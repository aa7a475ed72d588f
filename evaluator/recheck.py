"""Works out every number of a report again, from the stored statistics and without images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluator.artifacts import read_json
from evaluator.cells import cell_statistics, image_scores
from evaluator.curve import by_metric
from evaluator.errors import EvaluatorError
from evaluator.metrics import CURVE_FPR, curves, measure
from evaluator.report import Report, Scores
from evaluator.summary import summarise
from evaluator.table import csv_text, markdown

TOLERANCE = 1e-9  # other machines add up in another order
ROUNDED = 2e-4  # of percents with four decimals


def recheck(folder: Path) -> str:
    """Compare report.json, table.csv and table.md with what the statistics say; one line.

    Raises EvaluatorError with the first number that differs, and for files that are missing or
    damaged.
    """
    report = read_json(Report, folder / "report.json")
    compared = 0
    for cell in report.scores:
        for where, found, stored in _cell_numbers(folder, cell):
            _same(
                folder / "report.json", f"{cell.category}, {cell.backbone}: {where}", found, stored
            )
            compared += 1
    again = summarise(report, lambda cell: cell_statistics(folder, cell))
    for part in ("table", "comparisons"):
        found, stored = getattr(again, part), getattr(report, part)
        if len(found) != len(stored):
            raise EvaluatorError(
                f"{folder / 'report.json'}: {len(stored)} rows in {part!r}, the statistics give "
                f"{len(found)}; evaluate again"
            )
        for index, (mine, theirs) in enumerate(zip(found, stored, strict=True)):
            for key, value in mine.model_dump().items():
                where = f"{part}[{index}].{key}"
                _same(folder / "report.json", where, value, getattr(theirs, key), ROUNDED)
                compared += 1
    for name, text in (("table.csv", csv_text(report.table)), ("table.md", markdown(report))):
        if _text(folder / name) != text:
            raise EvaluatorError(f"{folder / name}: not what report.json says; evaluate again")
    return (
        f"{folder}: {len(report.scores)} cells, {compared} numbers worked out again from the "
        "statistics, all equal; table.csv and table.md agree with report.json"
    )


def _cell_numbers(folder: Path, cell: Scores) -> Iterator[tuple[str, Any, Any]]:
    """(where, worked out, stored) for each number that a cell's statistics determine."""
    statistics = cell_statistics(folder, cell)
    metrics = by_metric([measure(one) for one in statistics])
    yield "names of the metrics", sorted(metrics), sorted(cell.metrics)
    for metric, values in metrics.items():
        for seed, value in enumerate(values):
            yield f"{metric}, seed {seed}", value, cell.metrics[metric][seed]
    if cell.curves is not None:
        tpr, pro = curves(statistics[0], CURVE_FPR)
        yield "curves.fpr", list(CURVE_FPR), cell.curves.fpr
        yield "curves.tpr", tpr.tolist(), cell.curves.tpr
        yield "curves.pro", pro.tolist(), cell.curves.pro
    images = image_scores(statistics, statistics[0].region_image)
    yield "number of images", len(images), len(cell.images)
    for index, (mine, theirs) in enumerate(zip(images, cell.images, strict=True)):
        for key in ("score", "pixel_auroc", "regions_aupro_30"):
            yield f"images[{index}].{key}", getattr(mine, key), getattr(theirs, key)


def _same(path: Path, where: str, found: Any, stored: Any, tolerance: float = TOLERANCE) -> None:
    if not _equal(found, stored, tolerance):
        raise EvaluatorError(
            f"{path}: {where} is {stored!r:.60}, the statistics give {found!r:.60}; evaluate again"
        )


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(*pair, tolerance) for pair in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=tolerance)
    return bool(a == b)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluatorError(f"{path}: cannot be read ({error})") from None
