"""Scores -> rows with means and spreads, table.csv, and Markdown beside the paper's columns."""

from __future__ import annotations

import csv
import functools
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluator.metrics import mean_and_sd
from evaluator.report import CategoryRecord, Group, Metric, Report, Scores, TableRow

MEAN = "mean"  # the `category` of a group's mean
METRICS: tuple[Metric, ...] = ("pixel_auroc", "image_auroc")
TITLES: dict[Metric, str] = {"pixel_auroc": "Pixel AUROC", "image_auroc": "Image AUROC"}
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


def table_rows(
    categories: Sequence[CategoryRecord], backbones: Sequence[str], scores: Sequence[Scores]
) -> list[TableRow]:
    """Mean and sd over seeds, in percent: per category, then per group of categories.

    A group's value of one seed is the mean over its categories; its sd is over seeds.
    """
    per_seed = {
        (cell.category, cell.backbone, metric): getattr(cell, metric)
        for cell in scores
        for metric in METRICS
    }
    rows = []
    for metric in METRICS:
        for record in categories:
            for backbone in backbones:
                values = per_seed[record.category, backbone, metric]
                rows.append(_row(record.group, record.category, backbone, metric, values))
        for group in GROUPS:
            members = [c.category for c in categories if group in (c.group, "all")]
            for backbone in backbones if members else ():
                columns = zip(*(per_seed[c, backbone, metric] for c in members), strict=True)
                values = [sum(column) / len(members) for column in columns]
                rows.append(_row(group, MEAN, backbone, metric, values))
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
    """table.csv: percent with four decimals; sd is empty for a single seed."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(TableRow.model_fields)
    for row in rows:
        sd = "" if row.sd is None else f"{row.sd:.4f}"
        writer.writerow(
            [row.group, row.category, row.backbone, row.metric, f"{row.mean:.4f}", sd, row.n_seeds]
        )
    return buffer.getvalue()


def markdown(report: Report) -> str:
    """One table per metric, categories down, backbones across, the paper's numbers beside them."""
    names = [backbone.name for backbone in report.backbones]
    group = {record.category: record.group for record in report.categories}
    n_seeds = len(report.protocol.seeds)
    parts = []
    for metric in METRICS:
        paper = _paper_columns(metric, list(group))
        rows = [
            [label, *cells, *_paper_cells(members, bool(paper))]
            for label, members, cells in _lines(report, metric, names, group)
        ]
        head = ["category", *names, *(f"paper: {column}" for column in paper)]
        spread = f"mean ± sd of {n_seeds} seeds" if n_seeds > 1 else "one seed"
        parts.append(f"**{TITLES[metric]}, % ({spread})**\n\n{_aligned(head, rows)}")
    return "\n\n".join(parts) + "\n"


def _paper_columns(metric: Metric, categories: Sequence[str]) -> tuple[str, ...]:
    """The paper prints pixel AUROC alone, and only matching categories have anything beside."""
    known = any(category in paper_table().values for category in categories)
    return paper_table().columns if metric == "pixel_auroc" and known else ()


def _lines(
    report: Report, metric: Metric, names: list[str], group: Mapping[str, str]
) -> list[tuple[str, list[str], list[str]]]:
    """(label, categories it covers, one cell per backbone) of one table, groups in order."""
    found = {
        (row.group, row.category, row.backbone): row for row in report.table if row.metric == metric
    }
    lines = []
    for kind in GROUPS:
        members = [name for name, its_group in group.items() if kind in (its_group, "all")]
        listed = [] if kind == "all" else members
        for category in listed:
            cells = [_cell(found[kind, category, name]) for name in names]
            lines.append((category, [category], cells))
        # The mean of one category is that category; `all` repeats a group that is alone.
        if len(members) > 1 and (kind != "all" or len(set(group.values())) > 1):
            cells = [_cell(found[kind, MEAN, name]) for name in names]
            lines.append((f"mean of {len(members)}: {GROUPS[kind]}", members, cells))
    return lines


def _cell(row: TableRow) -> str:
    return f"{row.mean:.1f}" if row.sd is None else f"{row.mean:.1f} ± {row.sd:.1f}"


def _paper_cells(members: Sequence[str], wanted: bool) -> list[str]:
    """The paper's values of a category, or their mean over the same categories, or dashes."""
    table = paper_table()
    if not wanted:
        return []
    if not all(member in table.values for member in members):
        return ["–"] * len(table.columns)
    columns = zip(*(table.values[member] for member in members), strict=True)
    return [f"{sum(column) / len(members):.1f}" for column in columns]


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])
