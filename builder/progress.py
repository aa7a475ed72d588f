"""Progress of long work: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 60.0


def duration(seconds: float) -> str:
    """A time span for people: `42 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Progress:
    """Counts units of work on stderr with rate and time left.

    >>> with Progress(10, "samples", "img") as progress:
    ...     progress.done(4)
    """

    def __init__(self, total: int, what: str, unit: str) -> None:
        self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=total > 10**6, disable=None)
        self._logs = not sys.stderr.isatty()
        self._total, self._what, self._unit = total, what, unit
        self._count = 0
        self._start = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def done(self, units: int) -> None:
        """Count finished work."""
        self._count += units
        self._bar.update(units)
        now = time.monotonic()
        if self._logs and now - self._said > LINE_SECONDS:
            self._said = now
            rate = self._count / (now - self._start)
            left = duration((self._total - self._count) / rate) if rate else "unknown time"
            self.say(
                f"{self._what}: {self._count} of {self._total}, {rate:.0f} {self._unit}/s, "
                f"{left} left"
            )

    def skip(self, units: int) -> None:
        """Leave out work that proved to be done already: rate and time left are of the rest."""
        self._total -= units
        self._bar.total -= units
        self._bar.refresh()

    @property
    def say(self) -> Callable[[str], None]:
        """Print a line beside the bar."""
        return lambda line: tqdm.write(line, file=sys.stderr)
