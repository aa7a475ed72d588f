"""One process a core: how the builder spreads work, and what happens when a process dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import c_bool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import TypeVar

from builder.errors import BuilderError
from builder.signals import end_worker_on_sigterm, ending_when_told

T = TypeVar("T")

AHEAD = 3  # tasks a worker that are handed out before they are asked for


def usable_cores() -> int:
    """The cores that this process may run on (Slurm and containers restrict them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_left = c_bool(False)  # in a worker: whether the parent waits for no more results


@contextmanager
def worker_pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `jobs` fresh processes that end with their parent and leave Ctrl-C to it.

    When an exception leaves the block, the tasks in hand end and no other begins.
    """
    context = get_context("spawn")
    left = context.RawValue(c_bool, False)  # no lock that a killed worker could keep
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(left,)
    ) as pool:
        try:
            yield pool
        except BaseException:
            left.value = True  # the pool cannot cancel what it has in its queue
            raise


class WorkerKilled(BuilderError):
    """A worker process died, most often because memory ran out, or none could start."""


def results(pool: ProcessPoolExecutor, tasks: Iterable[Callable[[], T]]) -> Iterator[tuple[int, T]]:
    """Run the tasks in the pool and yield (number, result) as they finish.

    A few tasks a worker are handed out ahead, so that a million of them take no memory and no
    worker waits. Raises WorkerKilled when a worker dies; a task's own exception is passed on.
    Tasks not begun by then are dropped when the pool is left.
    """
    waiting: dict[Future[T], int] = {}
    numbered = enumerate(tasks)
    ahead = AHEAD * int(getattr(pool, "_max_workers", 64))
    try:
        for number, task in islice(numbered, ahead):
            waiting[pool.submit(_run, task)] = number
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
            for number, task in islice(numbered, len(done)):
                waiting[pool.submit(_run, task)] = number
    except (BrokenProcessPool, SystemExit):  # the latter when SIGTERM came between two tasks
        raise WorkerKilled(
            "a worker process was killed, or could not start (out of memory, or of disk?); what is "
            "finished is kept: run the same command again, with fewer --jobs if memory was short"
        ) from None
    # What waits is not cancelled: Python's pool, when it breaks meanwhile, trips over that with a
    # traceback. The workers drop it when the pool is left.


def results_again(
    tasks: Sequence[Callable[[], T]], jobs: int, said: Callable[[str], None]
) -> Iterator[tuple[int, T]]:
    """Like `results`, with a pool of its own; after a killed worker once more with half as many."""
    left = dict(enumerate(tasks))
    try:
        with worker_pool(jobs) as pool:
            numbers = list(left)
            for i, result in results(pool, [left[number] for number in numbers]):
                del left[numbers[i]]
                yield numbers[i], result
    except WorkerKilled:
        fewer = max(1, jobs // 2)
        said(f"a worker process was killed; going on with {fewer} instead of {jobs}")
        with worker_pool(fewer) as pool:
            numbers = list(left)
            for i, result in results(pool, [left[number] for number in numbers]):
                yield numbers[i], result


def _run(task: Callable[[], T]) -> T:
    if _left.value:
        raise CancelledError
    with ending_when_told():
        return task()


def _start_worker(left: c_bool) -> None:
    global _left
    _left = left
    # One thread a process: the processes fill the cores. Set before numba is imported.
    os.environ["NUMBA_NUM_THREADS"] = "1"
    if "numba" in sys.modules:  # by the user's own main module, which is imported before this
        sys.modules["numba"].core.config.reload_config()
    # Ctrl-C is the parent's to answer: work begun is finished and committed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_worker_on_sigterm()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for work for ever.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
