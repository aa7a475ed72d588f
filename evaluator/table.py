"""Scores -> rows with means and spreads, table.csv, and Markdown beside the printed numbers."""

from __future__ import annotations

import csv
import functools
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from evaluator.compare import MEAN, distinct_groups, undecidable
from evaluator.metrics import mean_and_sd
from evaluator.report import (
    CategoryRecord,
    Group,
    Metric,
    ProtocolMove,
    Report,
    Scores,
    TableRow,
)

METRICS: tuple[Metric, ...] = get_args(Metric)
TITLES: dict[Metric, str] = {
    "pixel_auroc": "Pixel AUROC",
    "aupro_30": "AUPRO up to 30 % false positives",
    "aupro_05": "AUPRO up to 5 %",
    "aupro_01": "AUPRO up to 1 %",
    "pixel_ap": "Pixel average precision",
    "pixel_f1_max": "Pixel F1-max (threshold fitted on test)",
    "image_auroc": "Image AUROC",
    "image_ap": "Image average precision",
    "image_f1_max": "Image F1-max (threshold fitted on test)",
}
PRINTED: tuple[Metric, ...] = ("pixel_auroc", "aupro_30", "image_auroc")  # table.md; all in the CSV
GROUPS: dict[Group, str] = {
    "low": "the paper's four low ones",
    "other": "the paper's other eleven",
    "own": "not in the paper",
    "all": "all",
}


@dataclass(frozen=True)
class PaperTable:
    """Table 1 of the paper: pixel AUROC in percent by category and pre-training."""

    columns: tuple[str, ...]
    group: dict[str, Literal["low", "other"]]
    values: dict[str, tuple[float, ...]]


@functools.cache
def paper_table() -> PaperTable:
    """The numbers printed in the paper, from `data_manifests/paper_table1.csv`."""
    text = (importlib.resources.files("data_manifests") / "paper_table1.csv").read_text("utf-8")
    head, *rows = list(csv.reader(io.StringIO(text)))
    return PaperTable(
        columns=tuple(head[2:]),
        group={row[1]: "low" if row[0] == "low" else "other" for row in rows},
        values={row[1]: tuple(float(value) for value in row[2:]) for row in rows},
    )


def group_of(category: str) -> Literal["low", "other", "own"]:
    """The paper's group of a category: `low` (its four low ones), `other`, else `own`."""
    return paper_table().group.get(category, "own")


def members_of(categories: Sequence[CategoryRecord]) -> dict[Group, list[str]]:
    """The categories of each group that has any, groups in the paper's order."""
    found: dict[Group, list[str]] = {
        group: [c.category for c in categories if group in (c.group, "all")] for group in GROUPS
    }
    return {group: members for group, members in found.items() if members}


def table_rows(
    categories: Sequence[CategoryRecord], backbones: Sequence[str], scores: Sequence[Scores]
) -> list[TableRow]:
    """Mean and sd over seeds, in percent: per category, then per group of categories.

    A group's value of one seed is the mean over its categories; its sd is over seeds. A metric
    that a category does not have (no masks) has no row, nor has the mean of its group.
    """
    cells = {(cell.category, cell.backbone): cell.metrics for cell in scores}
    members = members_of(categories)
    rows = []
    for metric in METRICS:
        rows += [
            _row(record.group, record.category, backbone, metric, values)
            for record in categories
            for backbone in backbones
            if (values := cells[record.category, backbone].get(metric))
        ]
        for group, names in members.items():
            for backbone in backbones:
                per_category = [cells[name, backbone].get(metric) for name in names]
                columns = list(zip(*(v for v in per_category if v is not None), strict=True))
                if all(v is not None for v in per_category):
                    means = [sum(column) / len(names) for column in columns]
                    rows.append(_row(group, MEAN, backbone, metric, means))
    return rows


def _row(
    group: Group, category: str, backbone: str, metric: Metric, values: Sequence[float]
) -> TableRow:
    mean, sd = mean_and_sd([100 * value for value in values])
    return TableRow(
        group=group,
        category=category,
        backbone=backbone,
        metric=metric,
        mean=round(min(mean, 100.0), 4),
        sd=None if sd is None else round(sd, 4),
        n_seeds=len(values),
    )


def csv_text(rows: Sequence[TableRow]) -> str:
    """table.csv: percent with four decimals; sd is empty for a single seed, low and high where
    nothing was resampled."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(TableRow.model_fields)
    for row in rows:
        numbers = ["" if v is None else f"{v:.4f}" for v in (row.mean, row.sd, row.low, row.high)]
        writer.writerow([row.group, row.category, row.backbone, row.metric, *numbers, row.n_seeds])
    return buffer.getvalue()


SAME = "≈"  # beside a cell that cannot be told apart from the best of its line
FEW_IMAGES = 10  # of a kind: percentile intervals of fewer are visibly too narrow
NAMED = 5  # categories that a note names


def markdown(report: Report) -> str:
    """One table per printed metric, categories down, backbones across, printed numbers beside."""
    names = [backbone.name for backbone in report.backbones]
    group = {record.category: record.group for record in report.categories}
    n_seeds = len(report.seeds)
    parts = []
    for metric in PRINTED:
        if not any(row.metric == metric for row in report.table):
            continue
        lines = _lines(report, metric, names, group)
        paper = _paper_columns(metric, list(group))
        rows = [
            [label, *cells, *(_mean_or_dash(column, members) for column in paper.values())]
            for label, members, cells in lines
        ]
        head = ["category", *names, *paper]
        spread = f"mean ± sd of {n_seeds} seeds" if n_seeds > 1 else "one seed"
        parts.append(f"**{TITLES[metric]}, % ({spread})**\n\n{_aligned(head, rows)}")
        parts += _published_table(report, metric, lines)
    if report.comparisons:
        parts.append(
            f"{SAME}: not told apart from the best of its line (paired bootstrap over images, "
            f"Holm-corrected, {report.bootstrap.level:.0%})."
        )
    elif any(SAME in part for part in parts):
        parts.append(f"{SAME}: the same as the best of its line; nothing was resampled.")
    return "\n\n".join(parts + notes(report)) + "\n"


def notes(report: Report) -> list[str]:
    """What limits the comparisons of this report, a sentence each; nothing without comparisons."""
    if not report.comparisons:
        return []
    draws, level = report.bootstrap.draws, report.bootstrap.level
    found = [
        f"{one.category} ({one.test_good} good, {one.test_defective} defective)"
        for one in report.categories
        if min(one.test_good, one.test_defective) < FEW_IMAGES
    ]
    sentences = []
    if told := undecidable(report.comparisons, draws, level):
        sentences.append(f"{told[0].upper()}{told[1:]}.")
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        sentences.append(
            f"Fewer than {FEW_IMAGES} test images of a kind: {', '.join(found[:NAMED])}{more}. "
            "There the p-values allow for it, but the intervals are too narrow."
        )
    return sentences


def _paper_columns(metric: Metric, categories: Sequence[str]) -> dict[str, dict[str, float]]:
    """The columns of the paper's Table 1, each by category; none where it has none of these."""
    if metric != "pixel_auroc" or not any(name in paper_table().values for name in categories):
        return {}
    return {
        f"paper: {column}": {name: printed[index] for name, printed in paper_table().values.items()}
        for index, column in enumerate(paper_table().columns)
    }


def _published_table(
    report: Report, metric: Metric, lines: Sequence[tuple[str, list[str], list[str]]]
) -> list[str]:
    """The published numbers in a table of their own, lines as above it; none without any."""
    columns: dict[str, dict[str, float]] = {}
    for entry in report.published:
        if entry.metric == metric:
            values = columns.setdefault(f"{entry.source}, {entry.arch}", {})
            values[entry.category] = entry.value
    rows = [
        [label, *(_mean_or_dash(column, members) for column in columns.values())]
        for label, members, _ in lines
        if any(set(members) <= set(column) for column in columns.values())
    ]
    if not rows:
        return []
    table = _aligned(["category", *columns], rows)
    return [f"**{TITLES[metric]}, % (printed elsewhere, not measured here)**\n\n{table}"]


def _mean_or_dash(column: Mapping[str, float], members: Sequence[str]) -> str:
    """The value of a category, or the mean over the same categories; a dash when one is missing."""
    if not all(member in column for member in members):
        return "–"
    return f"{sum(column[member] for member in members) / len(members):.1f}"


def _lines(
    report: Report, metric: Metric, names: list[str], group: Mapping[str, str]
) -> list[tuple[str, list[str], list[str]]]:
    """(label, categories it covers, one cell per backbone) of one table, groups in order."""
    found = {
        (row.group, row.category, row.backbone): row for row in report.table if row.metric == metric
    }
    lines = []
    every: dict[Group, list[str]] = {
        kind: [name for name, its_group in group.items() if kind in (its_group, "all")]
        for kind in GROUPS
    }
    means = distinct_groups(every)
    for kind, members in every.items():
        listed = [] if kind == "all" else members
        for category in listed:
            rows = [found.get((kind, category, name)) for name in names]
            lines.append((category, [category], _cells(report, rows)))
        if kind in means:
            rows = [found.get((kind, MEAN, name)) for name in names]
            lines.append((f"mean of {len(members)}: {GROUPS[kind]}", members, _cells(report, rows)))
    return lines


def _cells(report: Report, rows: Sequence[TableRow | None]) -> list[str]:
    """The cells of one line, marked where they cannot be told apart from its best."""
    same = best_and_same(report, [row for row in rows if row is not None])[1]
    return ["–" if row is None else _cell(row, row.backbone in same) for row in rows]


def best_and_same(report: Report, rows: Sequence[TableRow]) -> tuple[str | None, set[str]]:
    """Of the rows of one line: the backbone with the highest mean (the first one of several), and
    those that cannot be told apart from it; where nothing was resampled, those with its mean."""
    if len(rows) < 2:
        return None, set()
    best = max(rows, key=lambda row: row.mean)
    here = (best.group, best.category, best.metric)
    distinct = {
        pair.b if pair.a == best.backbone else pair.a: pair.distinct
        for pair in report.comparisons
        if (pair.group, pair.category, pair.metric) == here and best.backbone in (pair.a, pair.b)
    }
    same = {
        row.backbone
        for row in rows
        if row is not best and not distinct.get(row.backbone, row.mean != best.mean)
    }
    return best.backbone, same


def _cell(row: TableRow, same: bool) -> str:
    text = f"{row.mean:.1f}" if row.sd is None else f"{row.mean:.1f} ± {row.sd:.1f}"
    return f"{text} {SAME}" if same else text


def moves_text(moves: Sequence[ProtocolMove]) -> str:
    """A table of how far the same weights move under other protocols; empty without any."""
    protocols = list(dict.fromkeys(move.protocol for move in moves))
    found = {(m.category, m.backbone, m.metric, m.protocol): m for m in moves}
    lines = dict.fromkeys((m.category, m.backbone, m.metric) for m in moves if m.metric in PRINTED)
    if not lines:
        return ""
    rows = []
    for category, backbone, metric in lines:
        cells = []
        for protocol in protocols:
            move = found.get((category, backbone, metric, protocol))
            cells.append("–" if move is None else f"{move.mean:.1f} ({move.difference:+.1f})")
        rows.append([f"{category}, {backbone}, {TITLES[metric]}", *cells])
    head = ["the same weights under", *protocols]
    return f"\n**Other protocols, % (difference from this report's)**\n\n{_aligned(head, rows)}\n"


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])
