"""From the cells' sufficient statistics to intervals and comparisons: shared by run and recheck."""

from __future__ import annotations

from collections.abc import Callable

from evaluator.compare import Draws, cell_draws, comparisons, group_draws, with_intervals
from evaluator.report import Report, Scores
from evaluator.statistics import Statistics
from evaluator.table import members_of, table_rows


def summarise(report: Report, statistics_of: Callable[[Scores], list[Statistics]]) -> Report:
    """`report` with its table, intervals and comparisons worked out from its scores."""
    names = [backbone.name for backbone in report.backbones]
    cells = {(cell.category, cell.backbone): cell for cell in report.scores}
    draws: Draws = {}
    for record in report.categories if report.bootstrap.draws else ():
        found = {name: statistics_of(cells[record.category, name]) for name in names}
        draws |= cell_draws(record.category, found, report.bootstrap)
    groups = group_draws(draws, members_of(report.categories))
    level = report.bootstrap.level
    rows = table_rows(report.categories, names, report.scores)
    rows = with_intervals(rows, draws, groups, level)
    return report.model_copy(
        update={"table": rows, "comparisons": comparisons(rows, draws, groups, level)}
    )
