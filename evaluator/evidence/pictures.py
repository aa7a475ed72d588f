"""The pictures of the results page: ordered bars with intervals, and losses over images seen."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluator.evidence.commands import Place
from evaluator.evidence.differences import Difference
from evaluator.evidence.gathered import Result
from evaluator.report import Metric

DPI = 110
TITLES: dict[Metric, str] = {
    "pixel_auroc": "pixel AUROC",
    "aupro_30": "AUPRO 0.3",
    "image_auroc": "image AUROC",
}
TOLD, OTHER = "#1f5fa8", "#9aa5b1"


def bars(found: Sequence[Difference], metric: Metric, titles: dict[str, str]) -> bytes:
    """A PNG: each arm minus its baseline under one metric, largest first, with 95 % intervals."""
    rows = sorted((d for d in found if d.metric == metric), key=lambda one: one.difference)
    figure = Figure(figsize=(8, 0.8 + 0.26 * len(rows)), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    for index, one in enumerate(rows):
        half = 0.0 if math.isnan(one.low) else (one.high - one.low) / 2
        axes.barh(
            index,
            one.difference,
            xerr=half,
            color=TOLD if one.distinct else OTHER,
            height=0.7,
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_yticks(
        range(len(rows)),
        [f"{titles[one.arm]}  −  {one.baseline}" for one in rows],
        fontsize=7.5,
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"{TITLES[metric]}, percentage points\n(dark: told apart after Holm)")
    axes.grid(True, axis="x", alpha=0.3)
    axes.margins(y=0.01)
    return _png(figure)


def losses(place: Place, results: Sequence[Result]) -> bytes:
    """A PNG: the training loss of each arm and seed over images seen, relative to its start."""
    figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    for number, result in enumerate(results):
        for seed in result.arm.experiment.seeds:
            lines = _metrics(place.run(result.arm.name, seed))
            if not lines:
                continue
            first = lines[0]["loss"]
            axes.plot(
                [line["samples"] for line in lines],
                [line["loss"] / first for line in lines],
                color=f"C{number}",
                linewidth=1,
                label=result.arm.experiment.title
                if seed == result.arm.experiment.seeds[0]
                else None,
            )
    axes.set_xlabel("images seen")
    axes.set_ylabel("training loss / its first 10 steps'")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7.5)
    return _png(figure)


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
