"""SIGTERM, which Slurm, Kubernetes and AWS Batch send some seconds before SIGKILL.

A Ctrl-C lets begun shards end; here is no time for that: the workers drop what they hold, its
temporary files go, and the command ends within about a second.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType

TERMINATED = 128 + signal.SIGTERM  # the exit code: 143, as a shell states it
_CLEAR_SECONDS = 0.5


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt no error that anything but the command line handles."""


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the worker processes and raises Terminated."""
    global _came
    _came = False
    before = signal.signal(signal.SIGTERM, _end_with_workers)
    try:
        yield
    except Exception:
        if _came:  # a library, Ray above all, made an error of its own of it
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


_came = False  # in the command's process: whether SIGTERM came


def _end_with_workers(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break the clearing up
    for child in active_children():
        child.terminate()
    raise Terminated


_told = False  # in a worker process: whether SIGTERM came


def end_worker_on_sigterm() -> None:
    """In a worker process: SIGTERM unwinds the task in hand, then ends the process."""
    signal.signal(signal.SIGTERM, _end_worker)


@contextmanager
def ending_when_told() -> Iterator[None]:
    """Around a task of a worker: once SIGTERM has unwound it, the process ends.

    The pool would pass the exception on and take the next task.
    """
    try:
        if _told:  # it came between two tasks
            raise SystemExit
        yield
    except SystemExit:
        os._exit(TERMINATED)


def _end_worker(number: int, frame: FrameType | None) -> None:
    global _told
    _told = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Should the clearing up take long, the alarm's default action ends the process all the same.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _CLEAR_SECONDS)
    raise SystemExit(TERMINATED)
