"""The gallery: one static page with its pictures inside, for any browser, without a network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from builder.publish.facts import Facts
from builder.publish.subsample import SEED, Painted, Subsample, batches
from builder.publish.wording import fill, words
from builder.render import render

MAX_BYTES = 10_000_000
# Largest edge in pixels and WebP quality, tried in turn until the page is small enough.
QUALITIES = ((224, 80), (224, 60), (160, 60), (112, 50), (64, 40))
COLUMNS, ROWS = 10, 3  # of a sheet by quantile
EXTREMES, RANDOM, PER_CATEGORY, MAX_CATEGORIES = 5, 20, 10, 12
MAX_COMPONENTS = 40  # of a vector that the page can show


@dataclass(frozen=True)
class Measure:
    """What samples are ordered by: name, explanation, unit, and its value for each sample."""

    name: str
    about: str
    unit: str
    values: npt.NDArray[np.float64]


def gallery(facts: Facts, subsample: Subsample, painted: Painted, categories: list[str]) -> str:
    """The page, at most 10 MB: sheets by quantile, extremes, random, and each category."""
    measures = _measures(facts, subsample, painted)
    sheets = _sheets(measures, [categories[i] for i in subsample.normal[painted.positions]])
    shown = sorted(
        {i for sheet in sheets for column in sheet["columns"] for i in column["samples"]}
    )
    said = {name: html.escape(value) for name, value in words(facts).items()}
    for edge, quality in QUALITIES:
        data = {
            "sheets": sheets,
            "measures": [[measure.name, measure.unit] for measure in measures],
            "channels": facts.dataset.theta.channels,
            "length": facts.dataset.theta.length,
            **_pictures(facts, subsample, painted, shown, edge, quality),
            "samples": {
                str(i): _sample(facts, subsample, painted, measures, categories, i) for i in shown
            },
        }
        # A closing tag within the data would end its element.
        inside = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        page = fill("gallery.html", {**said, "title": html.escape(facts.title), "data": inside})
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


def _measures(facts: Facts, subsample: Subsample, painted: Painted) -> list[Measure]:
    theta = subsample.theta[painted.positions].astype(np.float64)
    channels = facts.dataset.theta.channels
    parts = theta[:, :-1].reshape(len(theta), -1, channels + 6)
    size = parts[..., channels + 2 : channels + 4].mean(2)
    measures = [
        Measure("s", "Strength: the mask's largest value.", "", theta[:, -1]),
        Measure(
            "mean sigma",
            "Size: the components' standard deviations, weighted by pi; 2 is the image's edge.",
            "",
            (size * parts[..., channels + 5]).sum(1),
        ),
        Measure(
            "change",
            "Visibility: the largest change of a pixel from the normal image.",
            "grey levels",
            painted.largest_change.astype(np.float64),
        ),
    ]
    # A constant orders nothing.
    return [measure for measure in measures if np.ptp(measure.values) > 1e-6]


def _sheets(measures: list[Measure], category: list[str]) -> list[dict[str, Any]]:
    """Which of the painted samples (by position) stand where on the page."""
    sheets = []
    for measure in measures:
        order = np.argsort(measure.values, kind="stable").tolist()
        columns = []
        for i in range(min(COLUMNS, len(order))):
            part = order[len(order) * i // COLUMNS : len(order) * (i + 1) // COLUMNS] or [order[i]]
            chosen = sorted({part[len(part) * (2 * r + 1) // (2 * ROWS)] for r in range(ROWS)})
            low, high = measure.values[part[0]], measure.values[part[-1]]
            columns.append({"label": f"{_short(low)} – {_short(high)}", "samples": chosen})
        title = f"By {measure.name}" + (f", {measure.unit}" if measure.unit else "")
        about = f"{measure.about} From the lowest tenth of the samples to the highest."
        sheets.append({"title": title, "about": about, "columns": columns})
    extremes = []
    for measure in measures:
        order = np.argsort(measure.values, kind="stable").tolist()
        extremes.append({"label": f"least {measure.name}", "samples": order[:EXTREMES]})
        extremes.append({"label": f"most {measure.name}", "samples": order[::-1][:EXTREMES]})
    if extremes:
        sheets.append({"title": "Extremes", "about": "", "columns": extremes})
    order = np.random.default_rng(SEED).permutation(len(category)).tolist()
    sheets.append({"title": "Random", "about": "", "columns": _grid(order[:RANDOM])})
    names = sorted(set(category))
    for name in names[:MAX_CATEGORIES]:
        found = [i for i in order if category[i] == name][:PER_CATEGORY]
        sheets.append({"title": f"On {name}", "about": "", "columns": _grid(found)})
    if len(names) > MAX_CATEGORIES:
        sheets[-1]["about"] = f"The first {MAX_CATEGORIES} of {len(names)} categories are shown."
    return sheets


def _grid(samples: list[int]) -> list[dict[str, Any]]:
    """Samples spread over the columns, without labels."""
    return [
        {"label": "", "samples": samples[i::COLUMNS]} for i in range(min(COLUMNS, len(samples)))
    ]


def _short(value: float) -> str:
    return f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.2f}"


def _sample(
    facts: Facts,
    subsample: Subsample,
    painted: Painted,
    measures: list[Measure],
    categories: list[str],
    i: int,
) -> dict[str, Any]:
    """What a click shows: key, normal, measures, and the vector, largest pi first."""
    position = int(painted.positions[i])
    theta, normal = subsample.theta[position], int(subsample.normal[position])
    parts = theta[:-1].reshape(-1, facts.dataset.theta.channels + 6)
    order = np.argsort(-parts[:, -1], kind="stable")
    return {
        "key": f"{subsample.index[position]:09d}",
        "normal": normal,
        "category": categories[normal],
        "measures": [_short(float(measure.values[i])) for measure in measures],
        "s": _number(theta[-1]),
        "count": len(parts),
        "parts": [[int(k), *map(_number, parts[k])] for k in order[:MAX_COMPONENTS]],
    }


def _number(value: np.float32) -> float:
    return float(f"{value:.4g}")


def _pictures(
    facts: Facts,
    subsample: Subsample,
    painted: Painted,
    shown: list[int],
    edge: int,
    quality: int,
) -> dict[str, dict[str, str]]:
    """Normal, painted image and mask of each shown sample as data URLs."""
    positions = painted.positions[shown]
    normals = {
        str(i): _url(painted.normals[i], edge, quality)
        for i in sorted(set(subsample.normal[positions].tolist()))
    }
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    sample = iter(shown)
    for _, made in batches(subsample, painted.normals, positions):
        for pixels in made:
            images[str(next(sample))] = _url(pixels, edge, quality)
    for i, position in zip(shown, positions, strict=True):
        masks[str(i)] = _url(_mask(subsample.theta[position], facts), edge, quality)
    return {"normals": normals, "images": images, "masks": masks}


def _mask(theta: npt.NDArray[np.float32], facts: Facts) -> npt.NDArray[np.uint8]:
    """255 M: white defects on black (equation 7 with v = 1, I_norm = -1), uint8 [H, W, 1]."""
    channels, size_px = facts.dataset.image.channels, facts.dataset.image.size_px
    white = theta.copy()
    white[:-1].reshape(-1, channels + 6)[:, :channels] = 1
    black = np.zeros((1, size_px, size_px, channels), np.uint8)
    return render(black, np.zeros(1, np.int64), white[None])[0][..., :1]


def _url(pixels: npt.NDArray[np.uint8], edge: int, quality: int) -> str:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if max(image.size) > edge:
        scale = edge / max(image.size)
        size = tuple(math.ceil(side * scale) for side in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
