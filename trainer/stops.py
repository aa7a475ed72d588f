"""Signals that ask a run to end: noted while a step is made, an exception everywhere else."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# torchrun passes on what its process group got as well: within these seconds it is one signal.
TORCHRUN_ECHO_SECONDS = 5.0
PR_SET_PDEATHSIG = 1  # prctl(2)


class Stopped(BaseException):
    """A signal asks to end; the exit code is 128 + its number.

    Not an Exception: as with KeyboardInterrupt, no library may take it for a fault of its own.
    """

    def __init__(self, signal: int = 0) -> None:
        super().__init__(signal)
        self.signal = signal


@dataclass
class Stop:
    """Which signal came first, 0 for none; called, whether one came."""

    signal: int = 0
    since: float = 0.0  # of time.monotonic
    noting: bool = False
    echo_seconds: float = field(
        default_factory=lambda: TORCHRUN_ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0
    )

    def __call__(self) -> bool:
        return self.signal != 0

    def check(self) -> None:
        """Raise Stopped when a signal came, also one that a library swallowed."""
        if self.signal:
            raise Stopped(self.signal)

    @contextmanager
    def notes(self) -> Iterator[None]:
        """Within, a first signal only sets `signal`: what is at work is brought to its end."""
        self.noting = True
        try:
            yield
        finally:
            self.noting = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Take SIGINT, SIGTERM and SIGUSR1: the first raises Stopped, or is noted; a second raises."""
    stop = Stop()

    def take(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not stop.signal:
            stop.signal, stop.since = number, now
            if not stop.noting:
                raise Stopped(number)
        elif now - stop.since >= stop.echo_seconds:
            raise Stopped(stop.signal)

    before = {number: signal.signal(number, take) for number in SIGNALS}
    signal_at_launchers_end(signal.SIGTERM)
    try:
        yield stop
    finally:
        signal_at_launchers_end(0)
        for number, handler in before.items():
            # torchrun's word to end may still come, and must not change the exit code.
            late = stop.signal and stop.echo_seconds
            signal.signal(number, signal.SIG_IGN if late else handler)


def signal_at_launchers_end(number: int) -> None:
    """Ask Linux for a signal when torchrun ends; 0 for none.

    Killed, it leaves its processes to themselves, and they would hold the GPUs to the run's end.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
