"""Figure 6 of the paper as a PNG for print: image, ground truth, one map per backbone."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from evaluator.artifacts import write_bytes
from evaluator.page_panels import COLOURS, DECADES, ISO_LEVEL
from evaluator.panels import Panel

DPI = 300
PAGE_INCH = (6.9, 9.4)  # both columns of a journal's page; more rows than fit make it longer
SMALLEST_CELL_INCH, LARGEST_CELL_INCH = 0.75, 1.4
LEFT_INCH, BOTTOM_INCH, GAP_INCH, CATEGORY_GAP_INCH = 0.62, 0.82, 0.04, 0.1
ISO_COLOUR, TRUTH_COLOUR = "#ffffff", "#28d7e6"
CASING = "#b5367a"  # what the line at 1 % lies on
UNIT = "share of the good test pixels that score as high"
CHARACTER_INCH = 0.058  # of 7.5 pt, on average


@dataclass(frozen=True)
class _Layout:
    """Inches: the page, one cell, and the upper edge of each row, from the top."""

    width: float
    height: float
    cell: float
    tops: list[float]

    def box(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a cell as shares of the page."""
        left = LEFT_INCH + column * (self.cell + GAP_INCH)
        bottom = self.height - self.tops[row] - self.cell
        return (
            left / self.width,
            bottom / self.height,
            self.cell / self.width,
            self.cell / self.height,
        )


def write_figure6(path: Path, backbones: Sequence[str], panels: Sequence[Panel]) -> None:
    """Draw the panels, categories together, and write a PNG of 300 dpi, atomically."""
    columns = len(backbones) + 2
    room = (PAGE_INCH[0] - LEFT_INCH) / columns - GAP_INCH
    cell = min(LARGEST_CELL_INCH, max(SMALLEST_CELL_INCH, room))
    titles = [_wrapped(title, cell) for title in ("image", "ground truth", *backbones)]
    top = 0.1 + 0.13 * max(title.count("\n") + 1 for title in titles)
    shown = _fitting(panels, cell, top)
    layout = _layout(shown, columns, cell, top)
    figure = Figure(figsize=(layout.width, layout.height), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    for i, panel in enumerate(shown):
        for j in range(columns):
            axes = figure.add_axes(layout.box(i, j))
            _draw_cell(axes, panel, j)
            if i == 0:
                axes.set_title(titles[j], fontsize=7.5, pad=3, parse_math=False)
            if j == 0:
                # Defect above file name; a $ in a file's name is no formula.
                parts = [_wrapped(part, cell * 7.5 / 6, 1) for part in panel.label.split("/", 1)]
                axes.set_ylabel("\n".join(parts), fontsize=6, labelpad=3, parse_math=False)
    _draw_categories(figure, shown, layout)
    _draw_key(figure, layout)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; nothing can be done about it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.print_png(buffer, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _wrapped(text: str, inches: float, most: int = 4) -> str:
    """Lines as long as `inches`, at most `most`; an ellipsis stands for the rest."""
    width = max(8, int(inches / CHARACTER_INCH))
    return "\n".join(textwrap.wrap(text, width, max_lines=most, placeholder=" …"))


def _fitting(panels: Sequence[Panel], cell: float, top: float) -> list[Panel]:
    """As many rows as a page holds, the same number for each category, but at least one."""
    categories = list(dict.fromkeys(panel.category for panel in panels))
    room = PAGE_INCH[1] - top - BOTTOM_INCH - CATEGORY_GAP_INCH * len(categories)
    allowed = max(1, int(room / (cell + GAP_INCH)) // max(1, len(categories)))
    kept = []
    for category in categories:
        kept += [panel for panel in panels if panel.category == category][:allowed]
    return kept


def _layout(panels: Sequence[Panel], columns: int, cell: float, top: float) -> _Layout:
    tops, at = [], top
    for before, panel in zip([None, *panels], panels, strict=False):
        if before is not None and before.category != panel.category:
            at += CATEGORY_GAP_INCH
        tops.append(at)
        at += cell + GAP_INCH
    width = max(LEFT_INCH + columns * (cell + GAP_INCH) + 0.02, 4.4)
    return _Layout(width, at + BOTTOM_INCH, cell, tops)


def _draw_cell(axes: Axes, panel: Panel, column: int) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    mask = panel.mask
    if column == 0:
        axes.imshow(panel.image)
    elif column == 1 and mask is None and not panel.label.startswith("good/"):
        axes.set_facecolor("0.9")
        axes.text(0.5, 0.5, "no mask", ha="center", va="center", fontsize=6, color="0.35")
    elif column == 1:
        truth = np.zeros(panel.image.shape[:2], np.bool_) if mask is None else mask
        axes.imshow(truth, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        levels = panel.levels[column - 2]
        axes.imshow(levels, cmap=COLOURS, vmin=0, vmax=255)
        if levels.min() < ISO_LEVEL < levels.max():
            axes.contour(levels, levels=[ISO_LEVEL], colors=ISO_COLOUR, linewidths=0.55)
        if mask is not None and mask.any() and not mask.all():
            axes.contour(mask, levels=[0.5], colors=TRUTH_COLOUR, linewidths=0.7)


def _draw_categories(figure: Figure, panels: Sequence[Panel], layout: _Layout) -> None:
    """The names of the categories, each beside its rows."""
    for category in dict.fromkeys(panel.category for panel in panels):
        rows = [i for i, panel in enumerate(panels) if panel.category == category]
        upper, lower = layout.tops[rows[0]], layout.tops[rows[-1]] + layout.cell
        figure.text(
            0.1 / layout.width,
            1 - (upper + lower) / 2 / layout.height,
            _wrapped(category, 0.85 * (lower - upper), 2),
            rotation=90,
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold",
            linespacing=1.05,
            parse_math=False,
        )
        line = [0.24 / layout.width] * 2
        ends = [1 - edge / layout.height for edge in (upper, lower)]
        figure.add_artist(Line2D(line, ends, linewidth=0.6, color="0.55"))


def _draw_key(figure: Figure, layout: _Layout) -> None:
    """The one colour bar with its unit, and what the two lines are."""
    span = layout.width - LEFT_INCH - 0.1
    bar = min(3.6, 0.56 * span)
    box = (LEFT_INCH / layout.width, 0.52 / layout.height, bar / layout.width, 0.1 / layout.height)
    axes = figure.add_axes(box)
    axes.imshow(np.linspace(0, 255, 256)[None], cmap=COLOURS, aspect="auto")
    axes.set_yticks([])
    axes.set_xticks(np.linspace(0, 255, DECADES + 1))
    labels = [f"{100 / 10**i:g} %" for i in range(DECADES)] + [f"≤ {100 / 10**DECADES:g} %"]
    axes.set_xticklabels(labels, fontsize=6.5)
    axes.tick_params(length=2, pad=2, width=0.5)
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)
    axes.axvline(ISO_LEVEL, color=ISO_COLOUR, linewidth=0.9)
    figure.text(
        LEFT_INCH / layout.width,
        0.27 / layout.height,
        textwrap.fill(UNIT, int(bar / 0.05)),
        fontsize=6.5,
        va="top",
        linespacing=1.15,
    )
    x = LEFT_INCH + bar + 0.28
    told = (
        (ISO_COLOUR, CASING, "1 % of the good pixels flagged"),
        (TRUTH_COLOUR, "", "ground truth"),
    )
    for i, (colour, casing, text) in enumerate(told):
        y = 0.57 - 0.17 * i
        _draw_line(figure, layout, (x, y), colour, casing)
        figure.text((x + 0.3) / layout.width, y / layout.height, text, fontsize=6.5, va="center")


def _draw_line(
    figure: Figure, layout: _Layout, at: tuple[float, float], colour: str, casing: str
) -> None:
    x, y = at
    if casing:  # a white line shows on the colour that it lies on in the maps
        corner = (x / layout.width, (y - 0.05) / layout.height)
        width, height = 0.22 / layout.width, 0.1 / layout.height
        figure.add_artist(Rectangle(corner, width, height, color=casing, linewidth=0))
    line = Line2D(
        [x / layout.width, (x + 0.22) / layout.width],
        [y / layout.height] * 2,
        color=colour,
        linewidth=1.0,
    )
    figure.add_artist(line)
