"""The page's line plots as inline SVG: ROC, PRO, learning curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluator.page_numbers import escaped, pointer, share
from evaluator.report import Metric, Report
from evaluator.table import TITLES

WIDTH, HEIGHT = 320.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 18.0, 10.0, 40.0
LOWEST_FPR = 1e-4
LIMITS = (0.01, 0.05, 0.3)  # of AUPRO


@dataclass(frozen=True)
class Axis:
    """Range, ticks with their labels, and the title; `log` spaces by ratios."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end."""
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        at = math.log(value) if self.log else value
        return (at - low) / (high - low)


@dataclass(frozen=True)
class Line:
    """A curve of one backbone; `path` says where its values stand in report.json."""

    backbone: int
    name: str
    x: Sequence[float]
    y: Sequence[float]
    path: str
    dots: bool = False


def plot(title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[float] = ()) -> str:
    """One plot with ticks, grid, marks (dotted verticals) and a curve per backbone."""
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom = TOP + up
    parts = []
    for value, label in x.ticks:
        at = LEFT + across * x.place(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP:g}V{bottom:g}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15:g}" class="mid">{escaped(label)}</text>')
    for value, label in y.ticks:
        at = bottom - up * y.place(value)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{WIDTH - RIGHT:g}"/>')
        parts.append(
            f'<text x="{LEFT - 6:g}" y="{at + 3.5:.1f}" class="end">{escaped(label)}</text>'
        )
    for value in marks:
        at = LEFT + across * x.place(value)
        parts.append(f'<path class="limit" d="M{at:.1f} {TOP:g}V{bottom:g}"/>')
    parts.append(
        f'<text x="{LEFT + across / 2:g}" y="{HEIGHT - 6:g}" class="mid">{escaped(x.title)}</text>'
        f'<text transform="translate(11 {TOP + up / 2:g}) rotate(-90)" class="mid">'
        f"{escaped(y.title)}</text>"
    )
    for line in lines:
        points = [
            (LEFT + across * x.place(a), bottom - up * y.place(b))
            for a, b in zip(line.x, line.y, strict=True)
        ]
        drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        colour = f"line{line.backbone % 8}"
        parts.append(
            f'<polyline class="{colour}" points="{drawn}" data-curve="{escaped(line.path)}">'
            f"<title>{escaped(line.name)}</title></polyline>"
        )
        if line.dots:
            parts += [
                f'<circle class="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.6">'
                f"<title>{escaped(line.name)}: {share(value)} % at {at:g}</title></circle>"
                for (a, b), at, value in zip(points, line.x, line.y, strict=True)
            ]
    return (
        f'<figure class="curve"><figcaption>{escaped(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escaped(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def plots(report: Report, data: Any, category: str) -> str:
    """All plots of a category."""
    found = [index for index, cell in enumerate(report.scores) if cell.category == category]
    shown = [
        _rates(report, found, "tpr", "ROC of the pixels", "defective pixels found, %"),
        _rates(
            report, found, "pro", "PRO: mean over the defects", "mean share of a defect found, %"
        ),
        _learning(report, data, found, category, "pixel_auroc"),
        _learning(report, data, found, category, "image_auroc"),
    ]
    return "".join(shown)


def _rates(report: Report, found: Sequence[int], key: str, title: str, rate: str) -> str:
    """TPR or PRO over the false positive rate, which is logarithmic: its low end decides."""
    lines = []
    for order, index in enumerate(found):
        cell = report.scores[index]
        if cell.curves is None:
            continue
        kept = [i for i, fpr in enumerate(cell.curves.fpr) if fpr >= LOWEST_FPR]
        values = getattr(cell.curves, key)
        lines.append(
            Line(
                order,
                cell.backbone,
                [cell.curves.fpr[i] for i in kept],
                [values[i] for i in kept],
                pointer(("scores", index, "curves", key)),
            )
        )
    if not lines:
        return ""
    decades = [(10.0**power, f"{100 * 10.0**power:g} %") for power in range(-4, 1)]
    x = Axis("good pixels flagged (false positive rate)", LOWEST_FPR, 1.0, decades, log=True)
    y = Axis(rate, 0.0, 1.0, [(i / 5, f"{20 * i}") for i in range(6)])
    return plot(title, lines, x, y, LIMITS if key == "pro" else ())


def _learning(
    report: Report, data: Any, found: Sequence[int], category: str, metric: Metric
) -> str:
    """A metric, mean over the seeds, over the number of normal images, all of them last."""
    all_of_them = next(c.train for c in report.categories if c.category == category)
    lines = []
    for order, index in enumerate(found):
        cell = report.scores[index]
        points = [(p.train, p.metrics[metric]) for p in cell.learning_curve if metric in p.metrics]
        if not points or metric not in cell.metrics:
            continue
        points = sorted([*points, (all_of_them, cell.metrics[metric])])
        lines.append(
            Line(
                order,
                cell.backbone,
                [float(train) for train, _ in points],
                [sum(values) / len(values) for _, values in points],
                pointer(("scores", index, "learning_curve")),
                dots=True,
            )
        )
    if not lines:
        return ""
    counts = sorted({value for line in lines for value in line.x})
    low, high, step = _range([value for line in lines for value in line.y])
    ticks = [
        (low + i * step, f"{100 * (low + i * step):g}")
        for i in range(round((high - low) / step) + 1)
    ]
    x = Axis(
        "normal images to fit on",
        counts[0],
        max(counts[-1], counts[0] + 1),
        _spaced([(count, f"{count:g}") for count in counts]),
        log=True,
    )
    return plot(f"{TITLES[metric]}: learning curve", lines, x, Axis("%", low, high, ticks))


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """Round limits around values in [0, 1], and the distance of the ticks."""
    for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
        low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
        high = max(high, low + step)
        if (high - low) / step <= 6.01:
            break
    return round(low, 4), round(high, 4), step


def _spaced(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leaves out labels that would touch the next one: ratios below 1.35."""
    kept: list[tuple[float, str]] = []
    for tick in reversed(ticks):
        if not kept or kept[-1][0] / tick[0] > 1.35:
            kept.append(tick)
    return kept
