"""Which photographs the pages show, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluator.cells import shown_levels
from evaluator.datasets import Category
from evaluator.images import load_image, load_mask
from evaluator.page_panels import disagreement
from evaluator.panels import Panel
from evaluator.protocols import Protocol
from evaluator.report import CategoryRecord, Report

PAGE_PANELS = 20  # a category, on the page
FIGURE_PANELS = 4  # and in figure 6


@dataclass(frozen=True)
class Panels:
    """What the page shows, most disagreement first, and what figure 6 shows."""

    page: list[Panel]
    figure: list[Panel]


def choose_panels(report: Report, categories: Sequence[Category], out: Path) -> Panels:
    """Read photographs, masks and kept maps of the images to show."""
    page: list[Panel] = []
    figure: list[Panel] = []
    for category, record in zip(categories, report.categories, strict=True):
        cells = [cell for cell in report.scores if cell.category == category.name]
        levels = [shown_levels(out, cell) for cell in cells]
        shown = cells[0].shown

        def panel(
            image: int,
            category: Category = category,
            shown: list[int] = shown,
            levels: Sequence[np.ndarray] = levels,
        ) -> Panel:
            place = shown.index(image)
            return _panel(category, image, report.protocol, [maps[place] for maps in levels])

        apart = {image: disagreement(cells, image) for image in shown}
        ordered = sorted(shown, key=lambda image: apart[image], reverse=True)
        page += [panel(image) for image in ordered[:PAGE_PANELS]]
        figure += [panel(image) for image in examples(record, shown)]
    return Panels(page, figure)


def _panel(category: Category, image: int, protocol: Protocol, levels: list[np.ndarray]) -> Panel:
    found = category.test[image]
    return Panel(
        category=category.name,
        image_index=image,
        label=f"{found.defect}/{found.path.stem}",
        image=load_image(found.path, protocol),
        mask=load_mask(found.masks, protocol) if found.masks else None,
        levels=levels,
    )


def examples(record: CategoryRecord, shown: Sequence[int]) -> list[int]:
    """Up to `FIGURE_PANELS` images: kinds of defect in turn, each by its middle one.

    The middle one by defective area in the crop, then its neighbours: neither the easiest nor the
    hardest, and no look at any score.
    """
    queues = []
    for defect in record.defects:
        found = [image for image in shown if record.images[image].defect == defect]
        found.sort(key=lambda image: (sum(record.images[image].regions), image))
        middle = len(found) // 2
        queues.append(sorted(found, key=lambda image: abs(found.index(image) - middle)))
    order: list[int] = []
    for turn in range(FIGURE_PANELS):
        order += [queue[turn] for queue in queues if turn < len(queue)]
    return order[:FIGURE_PANELS]
