"""Numbers that others printed for PaDiM, to stand beside ours where category and network match."""

from __future__ import annotations

import csv
import functools
import importlib.resources
import io
from collections.abc import Sequence

from evaluator.report import Published


def published(categories: Sequence[str], archs: Sequence[str]) -> list[Published]:
    """The published numbers, in percent, of these categories and torchvision networks.

    In the order of `data_manifests/published_padim.csv`; all are of ImageNet weights on MVTec AD.
    """
    return [row for row in _all() if row.category in categories and row.arch in archs]


@functools.cache
def _all() -> tuple[Published, ...]:
    text = (importlib.resources.files("data_manifests") / "published_padim.csv").read_text("utf-8")
    rows = csv.DictReader(io.StringIO(text))
    return tuple(Published.model_validate({**row, "value": float(row["value"])}) for row in rows)
