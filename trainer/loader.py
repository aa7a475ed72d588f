"""Batches, decoded and assembled in worker processes.

The workers are forked and write into memory that they share with the trainer: anonymous memory,
so that a batch is neither copied nor sent, nothing lies in /dev/shm (64 MB in a container unless
told otherwise), and nothing is left of it however the processes end. The indices asked for lie
there, too. A pipe to each carries a few numbers, which never fill it: nobody waits for one who
waits to be heard. When its parent is gone, so is the worker.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np
import torch

from trainer.errors import TrainerError
from trainer.samples import Batch, Rows, Samples, never
from trainer.stops import SIGNALS, Stopped

PREFETCH_BATCHES = 4  # per worker; a batch of 64 at 224 px is 9.6 MB
POLL_SECONDS = 0.1  # how long a signal, or the death of the parent, may go unnoticed


@dataclass
class Stream:
    """The batches to come, in order; `next_batch` takes one."""

    samples: Samples
    parts: Iterator[list[int]]
    on_cuda: bool
    workers: list[ForkProcess] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)
    memory: list[Rows] = field(default_factory=list)  # slots, shared with the workers
    free: deque[int] = field(default_factory=deque)  # slots that nobody uses
    asked: int = 0  # batches that the workers were asked for
    taken: int = 0
    begun: list[int] | None = None  # the part that is next to be asked for
    by_pipe: bool = False  # a batch without a slot is under way

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        return next_batch(self, never)


@contextmanager
def batches_from(
    samples: Samples,
    parts: Iterator[list[int]],
    workers: int | None,
    on_cuda: bool,
    held: int = 2,
) -> Iterator[Stream]:
    """The batches of the given lists of indices, made by worker processes; by none for 0.

    None stands for as many as there are cores beside the trainer's, at most 8, and 1 on a CPU,
    where the network itself uses the cores. `held` is how many batches the caller keeps hold of:
    the memory is that of so many, and of PREFETCH_BATCHES a worker; more are right but slower.
    """
    if workers is None:
        workers = min(8 if on_cuda else 1, len(os.sched_getaffinity(0)) - 1)
    stream = Stream(samples, parts, on_cuda and torch.cuda.is_available())
    try:
        if workers:
            _start(stream, workers, held)
        yield stream
    finally:
        for worker in stream.workers:
            worker.kill()  # they hold nothing, and ignore SIGTERM
        for worker in stream.workers:
            worker.join()
        for pipe in stream.pipes:
            pipe.close()


def next_batch(stream: Stream, stop: Callable[[], bool]) -> Batch:
    """The next batch; its memory is used again when no tensor of it is left.

    Raises TrainerError for what was wrong with a sample, and when a worker died; Stopped when
    `stop` turns true while there is none yet, and the next call waits for the same batch on;
    StopIteration after the last.
    """
    if not stream.workers:
        stream.begun = next(stream.parts) if stream.begun is None else stream.begun
        batch = stream.samples.batch(stream.begun, stop)
        stream.begun = None
        return _pinned(batch) if stream.on_cuda else batch
    while stream.asked < stream.taken + PREFETCH_BATCHES * len(stream.workers):
        if not _ask(stream):
            break
    if stream.asked == stream.taken:
        raise StopIteration
    number = stream.taken % len(stream.workers)
    slot, answer = _answer(stream, number, stop)
    stream.taken += 1
    stream.by_pipe = False
    if isinstance(answer, str):
        raise TrainerError(answer)
    if slot is None:
        batch = Batch(*map(torch.from_numpy, answer))
        return _pinned(batch) if stream.on_cuda else batch
    return _leased(stream, slot, answer)


def _start(stream: Stream, workers: int, held: int) -> None:
    stream.begun = next(stream.parts, None)
    # Parts of one step differ by one at most; larger ones travel by pipe.
    rows = len(stream.begun or []) + 1
    slots = PREFETCH_BATCHES * workers + held
    each = -(-stream.samples.bytes_of(rows) // mmap.PAGESIZE) * mmap.PAGESIZE
    # Populated now: else the first batches would wait for 2,400 page faults each.
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    memory = memoryview(mmap.mmap(-1, slots * each, flags=flags))
    stream.memory = [
        stream.samples.rows_in(memory[slot * each : (slot + 1) * each], rows)
        for slot in range(slots)
    ]
    stream.free.extend(range(slots))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # our handlers are not theirs
    try:
        _fork(stream, workers)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _fork(stream: Stream, workers: int) -> None:
    context = multiprocessing.get_context("fork")  # what is shared is inherited
    ends = [context.Pipe() for _ in range(workers)]
    stream.pipes = [ours for ours, _ in ends]
    for _, theirs in ends:
        others = [end for pair in ends for end in pair if end is not theirs]
        worker = context.Process(
            target=_work, args=(stream.samples, stream.memory, theirs, others), daemon=True
        )
        worker.start()
        stream.workers.append(worker)
    for _, theirs in ends:
        theirs.close()


def _ask(stream: Stream) -> bool:
    """Ask the worker whose turn it is for one more batch; False when not now, or not any more.

    Without a slot, as when the trainer keeps many batches, indices and rows go through the pipe:
    slower, and only while nothing else is under way, lest both sides wait to be read.
    """
    if stream.by_pipe:
        return False
    indices = next(stream.parts, None) if stream.begun is None else stream.begun
    if indices is None:
        return False
    stream.begun = indices
    message: tuple[int | None, int | list[int]]
    if stream.free and len(indices) <= len(stream.memory[0].index):
        slot = stream.free.popleft()
        stream.memory[slot].index[: len(indices)] = indices
        message = slot, len(indices)
    elif stream.asked > stream.taken:
        return False
    else:
        message = None, indices
        stream.by_pipe = True
    with suppress(OSError):  # a dead worker: found when its answer is waited for
        stream.pipes[stream.asked % len(stream.workers)].send(message)
    stream.begun = None
    stream.asked += 1
    return True


def _answer(stream: Stream, number: int, stop: Callable[[], bool]) -> tuple[int | None, Any]:
    """A worker's next answer: the slot and how many rows, the arrays, or the text of an error."""
    pipe = stream.pipes[number]
    try:
        while not pipe.poll(POLL_SECONDS):
            if stop():
                raise Stopped(getattr(stop, "signal", 0))
        slot, answer = pipe.recv()
    except (EOFError, OSError):
        worker = stream.workers[number]
        worker.join(timeout=1)
        code = worker.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else "ended"
        raise TrainerError(  # for want of memory, as a rule
            f"a loader worker {how}; the same command goes on from the last checkpoint, perhaps "
            "with fewer --workers"
        ) from None
    return slot, answer


def _leased(stream: Stream, slot: int, count: int) -> Batch:
    """A batch in a slot's memory, which is free again when its images are no more."""
    rows = stream.memory[slot].first(count)
    if stream.on_cuda:
        batch = _pinned(rows.batch())
        stream.free.append(slot)
        return batch
    # Tensors made from an array keep it.
    weakref.finalize(rows.images, stream.free.append, slot).atexit = False
    return rows.batch_with_own_numbers()


def _pinned(batch: Batch) -> Batch:
    """A copy that the device can fetch while the processor goes on."""
    return Batch(*(part.pin_memory() for part in batch))


def _work(samples: Samples, memory: list[Rows], pipe: Connection, others: list[Connection]) -> None:
    """A worker: fill the slots asked for, until the parent is gone or kills it."""
    # Ctrl-C and a farm's SIGTERM reach workers too; the trainer ends them when it has saved.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for other in others:
        other.close()
    torch.set_num_threads(1)
    parent = os.getppid()

    def orphaned() -> bool:
        return os.getppid() != parent

    with suppress(EOFError, BrokenPipeError, ConnectionResetError, Stopped):
        while True:
            while not pipe.poll(POLL_SECONDS):
                if orphaned():
                    return
            slot, asked = pipe.recv()
            indices = asked if slot is None else memory[slot].index[:asked].tolist()
            pipe.send((slot, _made(samples, memory, slot, indices, orphaned)))


def _made(
    samples: Samples,
    memory: list[Rows],
    slot: int | None,
    indices: list[int],
    stop: Callable[[], bool],
) -> int | str | Batch | list[np.ndarray[Any, Any]]:
    """How many rows are in the slot now; without a slot the rows; or what went wrong."""
    try:
        if slot is not None:
            return samples.read_into(memory[slot], indices, stop)
        return [part.numpy() for part in samples.batch(indices, stop)]
    except TrainerError as error:
        return error.message
