"""report.html: one file with everything inside, for any browser, without a server or a network."""

from __future__ import annotations

import importlib.resources
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluator.artifacts import write_bytes
from evaluator.page_numbers import escaped, number
from evaluator.page_panels import choose, gradient, panels_of
from evaluator.page_plots import plots
from evaluator.page_table import metric_options, tables
from evaluator.page_words import (
    category_metrics,
    compared,
    datasets,
    findings,
    methods,
    moves,
    title_of,
    versions,
)
from evaluator.panels import Panel
from evaluator.report import Report


def write_page(path: Path, report: Report, panels: Sequence[Panel]) -> None:
    """Write the page of a report, atomically.

    Every number on it is the report's: its exact value stands in `data-value`, its place in
    report.json in `data-path` (see page_numbers.py).
    """
    write_bytes(path, page(report, panels).encode())


def page(report: Report, panels: Sequence[Panel]) -> str:
    """The page as HTML."""
    data = report.model_dump(mode="json")
    template = (importlib.resources.files("evaluator") / "page.html").read_text("utf-8")
    chosen = choose(report, panels)
    sections = "".join(
        _category(report, data, index, chosen[record.category])
        for index, record in enumerate(report.categories)
    )
    return string.Template(template).substitute(
        title=escaped(title_of(report)),
        gradient=gradient(),
        compared=compared(report, data),
        metrics=metric_options(report),
        tables=tables(report, data),
        moves=moves(report, data),
        datasets=datasets(report, data),
        findings=findings(report),
        categories=sections,
        category_options="".join(
            f'<option value="c{index}">{escaped(record.category)}</option>'
            for index, record in enumerate(report.categories)
        ),
        defect_options=_defect_options(report),
        methods=methods(report),
        versions=versions(report),
    )


def _defect_options(report: Report) -> str:
    kinds = {image.defect for record in report.categories for image in record.images}
    ordered = sorted(kinds, key=lambda kind: (kind != "good", kind))
    return "".join(f'<option value="{escaped(kind)}">{escaped(kind)}</option>' for kind in ordered)


def _category(report: Report, data: Any, index: int, panels: Sequence[Panel]) -> str:
    record = report.categories[index]
    at = ("categories", index)
    kinds = ", ".join(
        f"{escaped(kind)} {number(data, (*at, 'defects', kind))}" for kind in record.defects
    )
    masks = "" if record.masks else " No masks: image metrics only."
    return (
        f'<section class="category" id="c{index}"><h3>{escaped(record.category)}</h3>'
        f'<p class="soft">Fitted on {number(data, (*at, "train"))} normal photographs; tested on '
        f"{number(data, (*at, 'test_good'))} good and {number(data, (*at, 'test_defective'))} "
        f"defective ones ({kinds}).{masks}</p>"
        f"{category_metrics(report, data, record.category)}"
        f'<div class="plots">{plots(report, data, record.category)}</div>'
        f"{panels_of(report, data, index, panels)}</section>"
    )
