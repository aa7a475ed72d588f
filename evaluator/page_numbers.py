"""Numbers of the page: each carries its exact value and where in report.json it stands.

`data-path` is a JSON pointer into report.json. A number that is worked out from several of them
carries the pointers instead, after what was done: `data-mean-of`, `data-spread-of` (largest minus
smallest), `data-place-of` (1 = highest score among the category's test images). Numbers of the
paper's Table 1 carry `data-paper`, category and column.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from typing import Any

Keys = Sequence[str | int]
Form = Callable[[Any], str]


def escaped(text: object) -> str:
    """Text for HTML, also inside a quoted attribute."""
    return html.escape(str(text), quote=True)


def pointer(keys: Keys) -> str:
    """The JSON pointer (RFC 6901) of a path of keys and indices."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def value_at(data: Any, keys: Keys) -> Any:
    """What stands at a path in parsed JSON."""
    for key in keys:
        data = data[key]
    return data


def percent(value: float) -> str:
    """A number in percent, one decimal."""
    return f"{value:.1f}"


def share(value: float) -> str:
    """A number in [0, 1], in percent, one decimal."""
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference in percentage points, one decimal, always with its sign."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def probability(value: float) -> str:
    """A p-value, three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def distance(value: float) -> str:
    """A score, three digits or all before the point."""
    return f"{value:#.3g}" if abs(value) < 99.95 else f"{value:.0f}"


def plain(value: Any) -> str:
    """As JSON writes it."""
    return json.dumps(value) if isinstance(value, int | float) else str(value)


def number(data: Any, keys: Keys, form: Form = plain) -> str:
    """The number at `keys` of report.json, as HTML."""
    value = value_at(data, keys)
    return _marked("data-path", pointer(keys), value, form(value))


def mean_of(data: Any, paths: Sequence[Keys], form: Form) -> str:
    """The mean of the numbers at `paths`, as HTML."""
    value = sum(value_at(data, keys) for keys in paths) / len(paths)
    return _marked("data-mean-of", " ".join(map(pointer, paths)), value, form(value))


def spread_of(data: Any, paths: Sequence[Keys], form: Form) -> str:
    """Largest minus smallest of the numbers at `paths`, as HTML."""
    values = [value_at(data, keys) for keys in paths]
    value = max(values) - min(values)
    return _marked("data-spread-of", " ".join(map(pointer, paths)), value, form(value))


def place_of(data: Any, scores: int, image: int) -> str:
    """The place of an image's score (first seed) among its category's, highest first, as HTML."""
    images = data["scores"][scores]["images"]
    own = images[image]["score"][0]
    place = 1 + sum(other["score"][0] > own for other in images)
    keys = ("scores", scores, "images", image, "score", 0)
    return _marked("data-place-of", pointer(keys), place, str(place))


def of_paper(category: str, column: str, value: float) -> str:
    """A number of the paper's Table 1, as HTML."""
    return _marked("data-paper", f"{category}/{column}", value, percent(value))


def paper_mean(categories: Sequence[str], column: str, values: Sequence[float]) -> str:
    """The mean over the same categories of a column of the paper's Table 1, as HTML."""
    value = sum(values) / len(values)
    places = " ".join(f"{category}/{column}" for category in categories)
    return _marked("data-paper-mean-of", places, value, percent(value))


def _marked(mark: str, places: str, value: Any, text: str) -> str:
    return (
        f'<span class="n" {mark}="{escaped(places)}" data-value="{escaped(json.dumps(value))}">'
        f"{escaped(text)}</span>"
    )
