"""The page of heat maps, as in the paper's figure 6: image, ground truth, one map per backbone."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluator.artifacts import write_bytes
from evaluator.metrics import SHARE_DECADES

MAX_ROWS = 30  # a page stays readable; more categories get fewer rows each
CELL_INCH = 1.35
COLOURS = "magma"
NOTE = (
    "Colour: the share of all pixels of the category's test images to which the same backbone "
    "gives at least this score. AUROC depends on this order alone, so the scale means the same in "
    "every column; no label is used to set it. Maps are of the first seed; the thin line is the "
    "outline of the ground truth. Examples: per kind of defect the image of median defect area."
)


@dataclass(frozen=True)
class Row:
    """One example: uint8 [size, size, 3] image, bool [size, size] mask, uint8 maps (`rarity`)."""

    category: str
    label: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    maps: list[npt.NDArray[np.uint8]]


def fewer_rows(rows: Sequence[Row]) -> list[Row]:
    """At most `MAX_ROWS`, the same number for each category, but at least one."""
    categories = list(dict.fromkeys(row.category for row in rows))
    allowed = max(1, MAX_ROWS // len(categories))
    kept = []
    for category in categories:
        kept += [row for row in rows if row.category == category][:allowed]
    return kept


def write_page(path: Path, backbones: Sequence[str], rows: Sequence[Row]) -> None:
    """Draw the page and write it as PNG, atomically."""
    rows = fewer_rows(rows)
    titles = ["image", "ground truth", *("\n".join(textwrap.wrap(b, 20)) for b in backbones)]
    title_inch = 0.12 + 0.14 * max(title.count("\n") + 1 for title in titles)
    left, right, top, bottom, gap = 0.42, 0.12, title_inch, 1.25, 0.05  # inches
    pitch = CELL_INCH + gap
    width = max(left + right + pitch * len(titles), 6.0)
    height = top + bottom + pitch * len(rows)
    figure = Figure(figsize=(width, height), dpi=150)
    canvas = FigureCanvasAgg(figure)
    start = (width - pitch * len(titles) - left - right) / 2 + left
    for i, row in enumerate(rows):
        for j, title in enumerate(titles):
            y = height - top - (i + 1) * pitch
            box = ((start + j * pitch) / width, y / height, CELL_INCH / width, CELL_INCH / height)
            axes = figure.add_axes(box)
            _draw_cell(axes, row, j)
            if i == 0:
                axes.set_title(title, fontsize=8, pad=4)
            if j == 0:
                label = f"{row.category}\n{row.label}"  # of files: a $ in it is no formula
                axes.set_ylabel(label, fontsize=6, labelpad=3, parse_math=False)
    _draw_scale(figure, (start, width, height, pitch * len(titles) - gap))
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _draw_cell(axes: Axes, row: Row, column: int) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if column == 0:
        axes.imshow(row.image)
    elif column == 1:
        axes.imshow(row.mask, cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(row.maps[column - 2], cmap=COLOURS, vmin=0, vmax=255)
        if row.mask.any() and not row.mask.all():
            axes.contour(row.mask, levels=[0.5], colors="#7fe0ff", linewidths=0.6)


def _draw_scale(figure: Figure, page: tuple[float, float, float, float]) -> None:
    """The one colour scale of the page, and what it means."""
    start, width, height, span = page
    axes = figure.add_axes((start / width, 0.98 / height, span / width, 0.1 / height))
    axes.imshow(np.linspace(0, 255, 256)[None], cmap=COLOURS, aspect="auto")
    axes.set_yticks([])
    axes.set_xticks(np.linspace(0, 255, SHARE_DECADES + 1))
    axes.set_xticklabels([f"{100 / 10**i:g} %" for i in range(SHARE_DECADES + 1)], fontsize=7)
    axes.tick_params(length=2, pad=2)
    figure.text(
        start / width,
        0.7 / height,
        textwrap.fill(NOTE, int(span * 21)),
        fontsize=6.5,
        va="top",
        linespacing=1.3,
    )
