"""Kinds of values on the command line."""

from __future__ import annotations

import math
import re
from typing import Any

import click

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class FiniteRange(click.FloatRange):
    """A float above 0, or from 0 on, and at most `max`; FloatRange alone lets nan through."""

    def __init__(self, max: float, max_open: bool = False, min_open: bool = True) -> None:
        super().__init__(0, max, min_open=min_open, max_open=max_open)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class Place(click.ParamType):  # type: ignore[type-arg]
    """A folder or a URL; an empty one, as of a variable that is not set, is not this folder."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.strip():
            self.fail("is empty; give a folder or a URL.", param, ctx)
        return str(value)


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 50GB, 512MB, 1.5TB or plain; units of 1000, as on disks.

    >>> Bytes().convert("1.5GB", None, None), Bytes().convert("4096", None, None)
    (1500000000, 4096)
    """

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]?)b?", value.strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a size; write 50GB, 512MB or plain bytes.", param, ctx)
        return int(float(found[1]) * UNITS[found[2]])
