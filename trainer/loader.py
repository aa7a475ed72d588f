"""The endless stream of batches, decoded and assembled in worker processes."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer.errors import TrainerError
from trainer.order import Order
from trainer.shards import Batch, ShardSamples

PREFETCH_BATCHES = 4  # per worker; a batch of 64 at 224 px is 9.6 MB


@contextmanager
def batches_from(
    samples: ShardSamples,
    order: Order,
    step: int,
    batch_size: int,
    workers: int | None,
    on_cuda: bool,
) -> Iterator[Iterator[Any]]:
    """The batches of `order` from `step` on; a worker that dies inside is a TrainerError."""
    if workers is None:  # on a CPU the network itself uses the cores: one is enough to keep up
        workers = min(8 if on_cuda else 1, len(os.sched_getaffinity(0)) - 1)
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=(
            order.samples(start, start + batch_size).tolist()
            for start in itertools.count(step * batch_size, batch_size)
        ),
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        collate_fn=as_it_is,  # type: ignore[arg-type]
        pin_memory=on_cuda,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else each start draws from the one that resume restores
    )
    with worker_faults():
        stream = iter(loader)
        try:
            yield stream
        finally:
            # An endless stream never ends its workers, and as they ignore SIGTERM nor does the
            # exit.
            if workers:
                stream._shutdown_workers()  # type: ignore[attr-defined]


@contextmanager
def worker_faults() -> Iterator[None]:
    """Turn torch's word of a dead or unreachable worker into a TrainerError.

    Mostly it comes from a handler of SIGCHLD, so wherever the main thread is: in a step, too.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker", "Pin memory thread", "Too many open")):
            raise
        raise TrainerError(  # killed for want of memory, as a rule
            f"the loader ended ({str(error).splitlines()[0].rstrip('. ')}); the same "
            "command goes on from the last checkpoint, perhaps with fewer --workers"
        ) from None


def next_batch(stream: Iterator[Any]) -> Batch:
    """The next batch; what was wrong with a sample, as a TrainerError."""
    batch: Batch | TrainerError = next(stream)
    if isinstance(batch, TrainerError):
        raise batch
    return batch


def as_it_is(batch: Batch | TrainerError) -> Batch | TrainerError:
    """The dataset already made a batch of it."""
    return batch


def ignore_signals(worker: int) -> None:
    """Ctrl-C and a farm's SIGTERM reach workers too; the trainer ends them when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
