"""One process a core: how the builder spreads work, and what happens when a process dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

from builder.errors import BuilderError

T = TypeVar("T")


def usable_cores() -> int:
    """The cores that this process may run on (Slurm and containers restrict them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_pool(jobs: int) -> ProcessPoolExecutor:
    """A pool of `jobs` fresh processes that end with their parent and leave Ctrl-C to it."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker)


def results(pool: ProcessPoolExecutor, tasks: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T]]:
    """Run the tasks in the pool and yield (number, result) as they finish.

    Raises BuilderError when a worker is killed; a task's own exception is passed on. Tasks not
    begun by then are cancelled.
    """
    futures: dict[Future[T], int] = {pool.submit(task): i for i, task in enumerate(tasks)}
    try:
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise BuilderError(
            "a worker process was killed (out of memory, or of disk?); what is finished is kept: "
            "run the same command again, with fewer --jobs if memory was short"
        ) from None
    finally:
        for future in futures:
            future.cancel()


def _start_worker() -> None:
    # One thread a process: the processes fill the cores. Set before numba is imported.
    os.environ["NUMBA_NUM_THREADS"] = "1"
    # Ctrl-C is the parent's to answer: work begun is finished and committed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for work for ever.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
