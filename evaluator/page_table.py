"""The page's main table, one per metric, and the paired differences below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluator.compare import MEAN, distinct_groups
from evaluator.page_numbers import (
    escaped,
    mean_of,
    number,
    of_paper,
    paper_mean,
    percent,
    probability,
    signed,
)
from evaluator.report import Group, Metric, Report
from evaluator.table import (
    GROUPS,
    METRICS,
    SAME,
    TITLES,
    best_and_same,
    members_of,
    notes,
    paper_table,
)

SMALLEST_REACH = 1e-9  # in points: a plot of differences that are all 0 has a scale too
PRINTED_COLUMNS = 9  # more do not fit on paper with their intervals


@dataclass(frozen=True)
class Column:
    """A column of the main table: a category, or the mean of a group."""

    group: Group
    category: str
    title: str
    members: list[str]


def columns_of(report: Report) -> list[Column]:
    """The means first, that of all categories before the groups', then the categories."""
    groups = members_of(report.categories)
    means, categories = [], []
    for group, members in groups.items():
        if group in distinct_groups(groups):
            means.append(Column(group, MEAN, f"{GROUPS[group]} ({len(members)})", members))
        if group != "all":
            categories += [Column(group, name, name, [name]) for name in members]
    return means[::-1] + categories


def metrics_of(report: Report) -> list[Metric]:
    """The metrics that any category has."""
    found = {row.metric for row in report.table}
    return [metric for metric in METRICS if metric in found]


def tables(report: Report, data: Any) -> str:
    """All metrics' tables and differences; the page's script shows one metric at a time."""
    columns = columns_of(report)
    parts = [f'<p class="note">{escaped(note)}</p>' for note in notes(report)]
    for index, metric in enumerate(metrics_of(report)):
        hidden = " hidden" if index else ""
        parts.append(
            f'<section class="metric" data-metric="{metric}"{hidden}>'
            f"{_headline(report, data, metric, columns[0])}"
            f"{_main_table(report, data, metric, columns)}"
            f"{_differences(report, data, metric, columns)}</section>"
        )
    return "".join(parts)


def metric_options(report: Report) -> str:
    """The options of the select that chooses the metric."""
    return "".join(
        f'<option value="{metric}">{escaped(TITLES[metric])}</option>'
        for metric in metrics_of(report)
    )


def _headline(report: Report, data: Any, metric: Metric, column: Column) -> str:
    """One sentence: the highest number of the first column, and what cannot be told apart."""
    here = (column.group, column.category, metric)
    places = {
        row.backbone: index
        for index, row in enumerate(report.table)
        if (row.group, row.category, row.metric) == here
    }
    if len(places) < 2:
        return ""

    def named(backbone: str) -> str:
        mean = number(data, ("table", places[backbone], "mean"), percent)
        return f"{escaped(backbone)} ({mean}&nbsp;%)"

    best = max(places, key=lambda backbone: report.table[places[backbone]].mean)
    where = f"mean of {column.title}" if column.category == MEAN else column.title
    text = f"Highest for {escaped(where)}: <b>{named(best)}</b>."
    pairs = [
        pair
        for pair in report.comparisons
        if (pair.group, pair.category, pair.metric) == here and best in (pair.a, pair.b)
    ]
    same = [pair.b if pair.a == best else pair.a for pair in pairs if not pair.distinct]
    if same:
        text += f" Not told apart from it: {', '.join(map(named, same))}."
    elif pairs:
        text += " Every other backbone is distinct from it."
    return f'<p class="headline">{text}</p>'


def _main_table(report: Report, data: Any, metric: Metric, columns: Sequence[Column]) -> str:
    places = {
        (row.group, row.category, row.backbone): index
        for index, row in enumerate(report.table)
        if row.metric == metric
    }
    found = [
        (c, [places.get((c.group, c.category, b.name)) for b in report.backbones]) for c in columns
    ]
    cells = [_column_cells(report, data, places) for _, places in found]
    body = "".join(
        f'<tr><th scope="row" data-sort="{escaped(backbone.name)}">'
        f"{swatch(index)}{escaped(backbone.name)}</th>"
        f"{''.join(column[index] for column in cells)}</tr>"
        for index, backbone in enumerate(report.backbones)
    )
    others = _published(report, data, metric, columns)
    if others:
        span = len(columns) + 1
        others = (
            f'<tbody class="others"><tr class="title"><th colspan="{span}" scope="rowgroup">'
            f"Printed elsewhere, not measured here</th></tr>{others}</tbody>"
        )
    wide = " wide" if len(columns) > PRINTED_COLUMNS else ""
    seeds = len(report.seeds)
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    title = escaped(TITLES[metric])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table class="main sortable{wide}"><caption>{title}, % ({spread})</caption>'
        f"<thead>{_head(columns)}</thead><tbody>{body}</tbody>{others}</table></div>"
        f'<p class="legend">{_legend(report, metric)}</p>'
    )


def _head(columns: Sequence[Column]) -> str:
    """Two lines: groups, then categories with buttons that sort."""
    spans: list[tuple[str, int]] = []
    for column in columns:
        title = "mean of" if column.category == MEAN else GROUPS[column.group]
        if spans and spans[-1][0] == title:
            spans[-1] = (title, spans[-1][1] + 1)
        else:
            spans.append((title, 1))
    groups = "".join(
        f'<th class="group" colspan="{width}" scope="colgroup">{escaped(title)}</th>'
        for title, width in spans
    )
    buttons = "".join(
        sort_button(index + 1, column.title, "mean" if column.category == MEAN else "")
        for index, column in enumerate(columns)
    )
    return (
        f'<tr><td class="corner"></td>{groups}</tr><tr>{sort_button(0, "backbone")}{buttons}</tr>'
    )


def sort_button(column: int, title: str, kind: str = "") -> str:
    """A head cell whose button sorts its table by that column."""
    return (
        f'<th scope="col" class="{kind}" data-column="{column}" aria-sort="none">'
        f'<button type="button">{escaped(title)}</button></th>'
    )


def swatch(backbone: int) -> str:
    """The colour and dashes that a backbone has in every plot."""
    return (
        f'<svg class="swatch line{backbone % 8}" viewBox="0 0 22 8" aria-hidden="true">'
        '<path d="M0 4h22"/></svg>'
    )


def _column_cells(report: Report, data: Any, places: Sequence[int | None]) -> list[str]:
    """One column's cells: the highest bold, those that cannot be told apart from it marked."""
    there = [report.table[place] for place in places if place is not None]
    best, same = best_and_same(report, there)
    cells = []
    for place in places:
        if place is None:
            cells.append('<td class="none" data-sort="">–</td>')
            continue
        backbone = report.table[place].backbone
        sign = SAME if backbone in same else ""
        cells.append(_cell(report, data, place, backbone == best, sign))
    return cells


def _cell(report: Report, data: Any, place: int, is_best: bool, sign: str) -> str:
    row = report.table[place]
    mean = number(data, ("table", place, "mean"), percent)
    text = f"<b>{mean}</b>" if is_best else mean
    told = f"{row.mean:.1f} %"
    if row.sd is not None:
        text += f' <span class="sd">± {number(data, ("table", place, "sd"), percent)}</span>'
        told = f"{row.mean:.1f} ± {row.sd:.1f} % over {row.n_seeds} seeds"
    text += f'<span class="sign" aria-label="not distinct from the best">{sign}</span>' * bool(sign)
    if row.low is not None and row.high is not None:
        low, high = (number(data, ("table", place, key), percent) for key in ("low", "high"))
        text += f'<span class="interval">{low} – {high}</span>'
        told += (
            f"; {report.bootstrap.level:.0%} interval {row.low:.1f} to {row.high:.1f} "
            f"over {report.bootstrap.draws} draws of the test images"
        )
    mean_class = ' class="mean"' if row.category == MEAN else ""
    return f'<td{mean_class} data-sort="{row.mean!r}" title="{escaped(told)}">{text}</td>'


def _legend(report: Report, metric: Metric) -> str:
    parts = []
    if len(report.backbones) > 1:
        parts.append("<b>Bold</b>: highest of ours in the column, the first one of equals.")
    if any(pair.metric == metric for pair in report.comparisons):
        parts.append(
            f"<b>{SAME}</b>: cannot be told apart from it (paired bootstrap over images, "
            f"Holm-corrected p at least {1 - report.bootstrap.level:.2g}); a number that is "
            "neither bold nor marked is distinct from the best."
        )
    elif len(report.backbones) > 1:
        parts.append(
            "This metric was not resampled: no comparison says which cells are distinct; "
            f"<b>{SAME}</b> marks the same number."
        )
    if any(row.metric == metric and row.low is not None for row in report.table):
        parts.append(
            f"Small: {100 * report.bootstrap.level:g} % bootstrap interval over test images (not "
            "over training runs, random dimensions, training photographs or categories)."
        )
    return " ".join(parts)


def _published(report: Report, data: Any, metric: Metric, columns: Sequence[Column]) -> str:
    """Rows of numbers from elsewhere: published ones, then the paper's Table 1."""
    sources: dict[tuple[str, str], dict[str, int]] = {}
    for index, entry in enumerate(report.published):
        if entry.metric == metric:
            sources.setdefault((entry.source, entry.arch), {})[entry.category] = index
    rows = []
    for (source, arch), places in sources.items():
        cells = []
        for column in columns:
            known = [places[name] for name in column.members if name in places]
            if len(known) < len(column.members):
                cells.append("")
            elif column.category == MEAN:
                paths = [("published", place, "value") for place in known]
                cells.append(mean_of(data, paths, percent))
            else:
                cells.append(number(data, ("published", known[0], "value"), percent))
        rows.append(_other_row(f"{source}, {arch}", columns, cells))
    if metric == "pixel_auroc":
        rows += _paper_rows(columns)
    return "".join(rows)


def _paper_rows(columns: Sequence[Column]) -> list[str]:
    paper = paper_table()
    if not any(column.category in paper.values for column in columns):
        return []
    rows = []
    for index, title in enumerate(paper.columns):
        cells = []
        for column in columns:
            if not all(name in paper.values for name in column.members):
                cells.append("")
                continue
            values = [paper.values[name][index] for name in column.members]
            if column.category == MEAN:
                cells.append(paper_mean(column.members, title, values))
            else:
                cells.append(of_paper(column.category, title, values[0]))
        rows.append(_other_row(f"paper, Table 1: {title}", columns, cells))
    return rows


def _other_row(title: str, columns: Sequence[Column], cells: Sequence[str]) -> str:
    text = "".join(
        f"<td{' class=mean' if column.category == MEAN else ''}>{cell or '–'}</td>"
        for column, cell in zip(columns, cells, strict=True)
    )
    return f'<tr><th scope="row" data-sort="{escaped(title)}">{escaped(title)}</th>{text}</tr>'


def _differences(report: Report, data: Any, metric: Metric, columns: Sequence[Column]) -> str:
    """Every pair of backbones in every column, with an interval drawn to one scale."""
    order = {(column.group, column.category): index for index, column in enumerate(columns)}
    found = [
        (order[pair.group, pair.category], index)
        for index, pair in enumerate(report.comparisons)
        if pair.metric == metric and (pair.group, pair.category) in order
    ]
    if not found:
        return ""
    pairs = [report.comparisons[index] for _, index in found]
    reach = max(SMALLEST_REACH, *(max(abs(p.low), abs(p.high), abs(p.difference)) for p in pairs))
    rows = "".join(
        _difference_row(report, data, index, columns[place], place, reach)
        for place, index in sorted(found)
    )
    titles = ("on", "a", "b", "a − b, points", "", "p", "p, Holm", "verdict")
    head = "".join(
        sort_button(index, title, "text" if index in (0, 1, 2, 7) else "")
        if title
        else '<th class="plot"><span>interval</span></th>'
        for index, title in enumerate(titles)
    )
    distinct = sum(pair.distinct for pair in pairs)
    return (
        f'<details class="differences"><summary>Paired differences: {len(pairs)} comparisons, '
        f"{distinct} distinct</summary>"
        f'<div class="scroll tall" tabindex="0" role="region" aria-label="Paired differences">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</details>"
    )


def _difference_row(
    report: Report, data: Any, index: int, column: Column, order: int, reach: float
) -> str:
    pair = report.comparisons[index]
    names = [backbone.name for backbone in report.backbones]
    at = ("comparisons", index)
    title = f"mean of {column.title}" if column.category == MEAN else column.category
    difference = number(data, (*at, "difference"), signed)
    low, high = (number(data, (*at, key), signed) for key in ("low", "high"))
    x = [50 + 48 * value / reach for value in (pair.low, pair.high, pair.difference)]
    drawn = (
        f'<svg viewBox="0 0 100 12" class="forest {"distinct" if pair.distinct else ""}" '
        f'aria-hidden="true"><path class="zero" d="M50 0v12"/>'
        f'<path class="range" d="M{x[0]:.1f} 6H{x[1]:.1f}"/>'
        f'<circle cx="{x[2]:.1f}" cy="6" r="2.6"/></svg>'
    )
    sides = "".join(
        f'<td class="text" data-sort="{escaped(name)}">'
        f"{swatch(names.index(name))}{escaped(name)}</td>"
        for name in (pair.a, pair.b)
    )
    return (
        f'<tr><td class="text" data-sort="{order}">{escaped(title)}</td>{sides}'
        f'<td data-sort="{pair.difference!r}">{difference}'
        f'<span class="interval">{low} to {high}</span></td><td class="plot">{drawn}</td>'
        f'<td data-sort="{pair.p!r}">{number(data, (*at, "p"), probability)}</td>'
        f'<td data-sort="{pair.p_holm!r}">{number(data, (*at, "p_holm"), probability)}</td>'
        f'<td class="text" data-sort="{int(pair.distinct)}">'
        f"{'distinct' if pair.distinct else f'{SAME} not distinct'}</td></tr>"
    )
