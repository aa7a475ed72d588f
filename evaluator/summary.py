"""From the cells' sufficient statistics to intervals and comparisons: shared by run and recheck."""

from __future__ import annotations

from collections.abc import Callable

from evaluator.bootstrap import interval
from evaluator.compare import (
    MEAN,
    Found,
    Pair,
    add_to_groups,
    comparisons,
    complete,
    distinct_groups,
    pairs_of,
    resample,
)
from evaluator.report import Group, Metric, Report, Scores, TableRow
from evaluator.statistics import Statistics
from evaluator.table import members_of, table_rows

# By group, category, backbone and metric.
Bounds = dict[tuple[Group, str, str, Metric], tuple[float, float]]


def summarise(report: Report, statistics_of: Callable[[Scores], list[Statistics]]) -> Report:
    """`report` with its table, intervals and comparisons worked out from its scores."""
    names = [backbone.name for backbone in report.backbones]
    rows = table_rows(report.categories, names, report.scores)
    bounds, pairs = _resampled(report, statistics_of)
    rows = [_with_interval(row, bounds) for row in rows]
    found = comparisons(pairs, report.bootstrap.level)
    return report.model_copy(update={"table": rows, "comparisons": found})


def _resampled(
    report: Report, statistics_of: Callable[[Scores], list[Statistics]]
) -> tuple[Bounds, list[Pair]]:
    """Intervals and pairs of all categories and groups: one category's draws at a time."""
    cells = {(cell.category, cell.backbone): cell for cell in report.scores}
    names = [backbone.name for backbone in report.backbones]
    members = members_of(report.categories)
    level = report.bootstrap.level
    bounds: Bounds = {}
    pairs: list[Pair] = []
    sums: dict[Group, Found] = {}
    for record in report.categories if report.bootstrap.draws else ():
        statistics = {name: statistics_of(cells[record.category, name]) for name in names}
        found = resample(record.category, statistics, report.bootstrap)
        bounds |= _bounds(record.group, record.category, found, level)
        pairs += pairs_of(record.group, record.category, found, level)
        add_to_groups(sums, members, record.category, found)
    for group in (group for group in members if group in sums):
        found = complete(sums[group], members[group])
        bounds |= _bounds(group, MEAN, found, level)
        if group in distinct_groups(members):
            pairs += pairs_of(group, MEAN, found, level)
    return bounds, pairs


def _bounds(group: Group, category: str, found: Found, level: float) -> Bounds:
    return {
        (group, category, backbone, metric): interval(one.draws, level)
        for (backbone, metric), one in found.items()
    }


def _with_interval(row: TableRow, bounds: Bounds) -> TableRow:
    key = (row.group, row.category, row.backbone, row.metric)
    if key not in bounds:
        return row
    low, high = bounds[key]
    return row.model_copy(update={"low": round(low, 4), "high": round(high, 4)})
