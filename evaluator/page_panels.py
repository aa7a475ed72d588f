"""The page's pictures: photograph, truth and one map per backbone, and what each image scored."""

from __future__ import annotations

import base64
import functools
import io
import itertools
from collections.abc import Sequence
from typing import Any

import contourpy
import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image

from evaluator.page_numbers import distance, escaped, number, place_of, share, spread_of
from evaluator.page_table import swatch
from evaluator.panels import Panel
from evaluator.report import Report, Scores

COLOURS = "magma"
DECADES = 4  # level 255 is a share of 10^-4 of the good pixels, or less
ISO_LEVEL = 127.5  # 1 % of the good pixels score as high
SHOWN = 20  # panels of a category
SHOWN_PICTURES = 2400  # of the whole page; 15 categories x 4 backbones x 20 panels are 1,500
PHOTOGRAPH_QUALITY = 85
LEVEL_STEP = 4  # of the 256 levels, 1/16 decade: maps of half the bytes, no visible bands

Levels = npt.NDArray[np.uint8]


def disagreement(cells: Sequence[Scores], image: int) -> tuple[bool, float]:
    """How far apart the backbones are on an image; the larger, the more.

    By the spread of its pixel AUROC. Images without one come after those that have it, by the
    spread of the place of their score (first seed) among the category's: 0 = lowest, 1 = highest.
    """
    known = [auroc for cell in cells if (auroc := cell.images[image].pixel_auroc) is not None]
    if len(known) == len(cells):
        return True, max(known) - min(known)
    places = []
    for cell in cells:
        own = cell.images[image].score[0]
        below = sum(other.score[0] < own for other in cell.images)
        places.append(below / max(1, len(cell.images) - 1))
    return False, max(places) - min(places)


def choose(report: Report, panels: Sequence[Panel]) -> dict[str, list[Panel]]:
    """The panels to show of each category, those where the backbones disagree most first."""
    pictures = len(report.categories) * (len(report.backbones) + 1)
    most = max(2, min(SHOWN, SHOWN_PICTURES // pictures))
    chosen = {}
    for record in report.categories:
        cells = [cell for cell in report.scores if cell.category == record.category]
        own = [panel for panel in panels if panel.category == record.category]
        rank = {panel.image_index: disagreement(cells, panel.image_index) for panel in own}
        own.sort(key=lambda panel: rank[panel.image_index], reverse=True)
        chosen[record.category] = own[:most]
    return chosen


def photograph_url(image: npt.NDArray[np.uint8]) -> str:
    """uint8 [rows, columns, 3] as a JPEG in a data URI."""
    return _url(Image.fromarray(image), "JPEG", quality=PHOTOGRAPH_QUALITY)


def map_url(levels: Levels) -> str:
    """uint8 [rows, columns] in the page's colours, 64 of them, as a PNG in a data URI."""
    picture = Image.fromarray(levels // LEVEL_STEP)
    picture.putpalette(palette()[LEVEL_STEP // 2 :: LEVEL_STEP].tobytes())
    # PNG at level 6: a third of the time of lossless WebP, 5 % larger.
    return _url(picture, "PNG", compress_level=6)


def _url(picture: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.cache
def palette() -> Levels:
    """The colours of the 256 levels: uint8 [256, 3]."""
    colours = matplotlib.colormaps[COLOURS](np.arange(256))[:, :3]
    return np.asarray(np.round(255 * colours), np.uint8)


def gradient() -> str:
    """The colours as a CSS gradient, level 0 on the left."""
    stops = [palette()[round(255 * i / 16)] for i in range(17)]
    return "linear-gradient(to right, " + ", ".join("rgb({} {} {})".format(*s) for s in stops) + ")"


def outline(values: npt.NDArray[Any], level: float) -> str:
    """The SVG path where `values` [rows, columns] cross `level`, closed at the border; pixels."""
    padded = np.pad(np.asarray(values, np.float32), 1)
    lines = contourpy.contour_generator(z=padded).lines(level)
    return "".join(_path(np.asarray(line, np.float64)) for line in lines)


def _path(points: npt.NDArray[np.float64]) -> str:
    """Every other point, in tenths of a pixel, each relative to the one before."""
    step = 2 if len(points) > 24 else 1
    closed = bool((points[0] == points[-1]).all())
    kept = points[: -1 if closed else None : step]
    # Sample (i, j) of the padded grid is the middle of pixel (i - 1, j - 1).
    tenths = np.round(10 * (kept - 0.5)).astype(int)
    moves = "".join(f"{_tenth(x)} {_tenth(y)} " for x, y in np.diff(tenths, axis=0))
    start = f"M{_tenth(tenths[0, 0])} {_tenth(tenths[0, 1])}l"
    return (start + moves).rstrip(" l") + ("z" if closed else "")


def _tenth(value: int) -> str:
    return f"{value / 10:g}"


def panels_of(report: Report, data: Any, category: int, panels: Sequence[Panel]) -> str:
    """All panels of the category at this place in the report."""
    record = report.categories[category]
    if not panels:
        return '<p class="soft">No pictures were kept.</p>'
    left_out = len(record.images) - len(panels)
    told = f"{len(panels)} of {len(record.images)} test images"
    if left_out:
        told += f"; {left_out} left out, where the backbones agree more or whose maps were not kept"
    heads = "".join(
        f'<div class="head">{swatch(index)}{escaped(backbone.name)}</div>'
        for index, backbone in enumerate(report.backbones)
    )
    rows = "".join(
        _panel(report, data, category, panel, f"t{category}-{order}")
        for order, panel in enumerate(panels)
    )
    columns = len(report.backbones) + 2
    return (
        f'<p class="soft">{told}.</p>{_key(report)}'
        f'<div class="panels" style="--columns:{columns}"><div class="row heads">'
        f'<div class="head">image</div><div class="head">truth</div>{heads}</div>{rows}</div>'
    )


def _key(report: Report) -> str:
    """Colour bar, lines and layers."""
    ticks = "".join(
        f'<span style="left:{100 * i / DECADES:g}%">{"≤ " * (i == DECADES)}{100 / 10**i:g} %</span>'
        for i in range(DECADES + 1)
    )
    # Architectures name their layers differently: all names of the same place in the order.
    names = itertools.zip_longest(*(backbone.layers for backbone in report.backbones))
    layers = "".join(
        f'<span><i class="layer{place % 5}"></i>'
        f"{escaped(' / '.join(name for name in dict.fromkeys(same) if name))}</span>"
        for place, same in enumerate(names)
    )
    return (
        '<div class="key"><div class="scale"><div class="ramp"></div>'
        f'<div class="ticks">{ticks}</div>'
        "<p>colour: share of the good test pixels that score as high</p></div>"
        '<ul><li><i class="iso"></i>1 % of the good pixels flagged</li>'
        '<li><i class="outline"></i>outline of the truth</li>'
        f'<li class="layers">share of the score: {layers}</li></ul></div>'
    )


def _panel(report: Report, data: Any, category: int, panel: Panel, name: str) -> str:
    record = report.categories[category]
    image = record.images[panel.image_index]
    size_px = panel.image.shape[0]
    has_truth = panel.mask is not None and bool(panel.mask.any())
    path = outline(panel.mask, 0.5) if panel.mask is not None and has_truth else ""
    cells = [
        (index, cell)
        for index, cell in enumerate(report.scores)
        if cell.category == record.category
    ]
    paths = [("scores", i, "images", panel.image_index, "pixel_auroc") for i, _ in cells]
    spread = ""
    if len(cells) > 1 and all(cell.images[panel.image_index].pixel_auroc for _, cell in cells):
        spread = f"<br>backbones {spread_of(data, paths, share)} points apart"
    alt = escaped(f"{panel.category}, {image.file}")
    photograph = _figure(
        f'<img loading="lazy" decoding="async" width="{size_px}" height="{size_px}" '
        f'alt="{alt}" src="{photograph_url(panel.image)}">',
        f'<span class="file">{escaped(image.file)}</span>{spread}',
        f"{alt}, photograph",
    )
    truth = _figure(
        f'<svg viewBox="0 0 {size_px} {size_px}" class="truth" role="img" aria-label="truth">'
        f'<defs><path id="{name}" vector-effect="non-scaling-stroke" d="{path}"/></defs>'
        f'<use class="area" href="#{name}"/></svg>',
        _truth_told(data, category, panel),
        f"{alt}, truth",
    )
    maps = "".join(
        _map(report, data, category, index, panel, order, name if path else "")
        for order, (index, _) in enumerate(cells)
    )
    return (
        f'<article class="row panel" data-defect="{escaped(image.defect)}">'
        f"{photograph}{truth}{maps}</article>"
    )


def _figure(picture: str, caption: str, told: str) -> str:
    return (
        f'<figure><button type="button" class="frame" aria-label="{told}, enlarge">{picture}'
        f"</button><figcaption>{caption}</figcaption></figure>"
    )


def _truth_told(data: Any, category: int, panel: Panel) -> str:
    at = ("categories", category, "images", panel.image_index)
    image = data["categories"][category]["images"][panel.image_index]
    if image["defect"] == "good":
        return "good"
    if not data["categories"][category]["masks"]:
        return f"{escaped(image['defect'])}, no mask"
    regions = image["regions"]
    sizes = ", ".join(number(data, (*at, "regions", i)) for i in range(min(4, len(regions))))
    more = ", …" if len(regions) > 4 else ""
    told = f"{sizes}{more} px" if regions else "nothing left in the crop"
    return f"{escaped(image['defect'])}<br>{told}"


def _map(
    report: Report, data: Any, category: int, scores: int, panel: Panel, order: int, truth: str
) -> str:
    size_px = panel.image.shape[0]
    cell = report.scores[scores]
    scored = cell.images[panel.image_index]
    at = ("scores", scores, "images", panel.image_index)
    levels = panel.levels[order]
    path = outline(levels, ISO_LEVEL)
    lines = f'<path class="iso" vector-effect="non-scaling-stroke" d="{path}"/>'
    if truth:
        lines += f'<use class="outline" href="#{truth}"/>'
    told = f"score {number(data, (*at, 'score', 0), distance)}"
    told += f", place {place_of(data, scores, panel.image_index)} of {len(cell.images)}"
    if scored.pixel_auroc is not None:
        told += f"<br>pixel AUROC {number(data, (*at, 'pixel_auroc'), share)} %"
    layers = report.backbones[order].layers
    bar = "".join(
        f'<i class="layer{i % 5}" style="width:{100 * part:.2f}%" '
        f'title="{escaped(layers[i] if i < len(layers) else i)}">'
        f"{number(data, (*at, 'layer_shares', i), share)}</i>"
        for i, part in enumerate(scored.layer_shares)
    )
    file = report.categories[category].images[panel.image_index].file
    name = escaped(f"{cell.backbone} on {panel.category}, {file}")
    picture = (
        f'<img loading="lazy" decoding="async" width="{levels.shape[1]}" '
        f'height="{levels.shape[0]}" alt="{name}" src="{map_url(levels)}">'
        f'<svg viewBox="0 0 {size_px} {size_px}" aria-hidden="true">{lines}</svg>'
    )
    who = f'<span class="who">{swatch(order)}{escaped(cell.backbone)}</span>'
    return _figure(picture, f'{who}{told}<span class="bar">{bar}</span>', name)
