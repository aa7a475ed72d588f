"""`trainer doctor`: how many images a second each stage of the data path does on this machine.

The stages are those of a run: a shard is fetched, verified, its samples decoded in worker
processes, handed over, and trained on. Each is measured alone for a share of the time.
"""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from trainer.bare import bare_config, bare_step, make_bare
from trainer.choices import Arch, Loss
from trainer.dataset import Dataset, read_dataset
from trainer.decoded import row_bytes
from trainer.diagnosis import Findings
from trainer.index import index_shard
from trainer.loader import PREFETCH_BATCHES, batches_from, next_batch
from trainer.node import Slot
from trainer.ranks import Ranks
from trainer.samples import Batch, Rows, Samples, never
from trainer.storage import Storage, is_remote, open_storage
from trainer.task import pick_device, pick_precision

SHARES = {"network": 0.2, "verify": 0.05, "decode": 0.1, "workers": 0.2, "hand-off": 0.1}
MOST_SHARDS = 3


@dataclass(frozen=True)
class Options:
    """The command's options; None where the default is the trainer's."""

    data: str
    arch: Arch
    loss: Loss = "direct"
    size_px: int | None = None
    batch_size: int = 64
    workers: int | None = None
    device: str = "auto"
    precision: str = "auto"
    seconds: float = 20.0


class Late(BaseException):
    """The time of a stage is over; no library may take it for a fault to be tried again."""


@dataclass
class OneShard:
    """Stands for the node: knows one shard."""

    slot: Slot

    def shard(self, shard: int, stop: Callable[[], bool]) -> Slot | None:
        """That shard."""
        return self.slot


class Blank(Samples):
    """Hands over rows as they are: what is left is the way from worker to trainer."""

    def read_into(
        self, rows: Rows, indices: Sequence[int], stop: Callable[[], bool] = never
    ) -> int:
        """Touch the memory, as decoding would."""
        rows.images[: len(indices)] = 0
        rows.seconds[:] = 0
        return len(indices)


def doctor(options: Options) -> Findings:
    """Measure every stage; TrainerError in one line for what a run would refuse, too."""
    storage = open_storage(options.data)
    dataset = read_dataset(storage)
    device = pick_device(options.device, Ranks())
    cores = len(os.sched_getaffinity(0))
    workers = options.workers
    if workers is None:  # as loader.py
        workers = max(0, min(8 if device.type == "cuda" else 1, cores - 1))
    found = Findings(
        cores=cores,
        workers=workers,
        on_cuda=device.type == "cuda",
        dataset_bytes=sum(shard.bytes for shard in dataset.shards),
        decoded_bytes=dataset.samples * (row_bytes(dataset) + 1) + 2 * mmap.PAGESIZE,
        remote=is_remote(options.data),
        decodes=dataset.contents != "parameters",
    )
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="semiformula-doctor-") as folder:
        path = measure_network(found, storage, dataset, Path(folder), options.seconds)
        if path is not None:
            samples = measure_verify(found, dataset, path, options.seconds)
            measure_decode(found, samples, options)
            measure_device(found, samples, options, device, end)
    return found


def measure_network(
    found: Findings, storage: Storage, dataset: Dataset, folder: Path, seconds: float
) -> Path | None:
    """Fetch a few shards past any cache; one of them, None when none came in half the time."""
    mean_bytes = found.dataset_bytes / dataset.samples
    came, whole, start = [0], 0, time.monotonic()
    first = folder / "0.tar"

    def note(count: int) -> None:
        came[0] += count

    for number, shard in enumerate(dataset.shards[:MOST_SHARDS]):
        target = folder / f"{number}.tar"
        left = start + seconds * (0.5 if number == 0 else SHARES["network"]) - time.monotonic()
        try:
            with target.open("w+b") as file, time_limit(max(0.1, left)):
                if storage.local is not None:
                    forget(storage.local / shard.name)
                storage.fetch(shard.name, shard.bytes, file, note)
            whole += 1
        except Late:
            break
        finally:
            if number:
                target.unlink()
    rate = came[0] / (time.monotonic() - start)
    what = "shards" if found.remote else "shards from the disk"
    found.add("network", rate / mean_bytes, f"{rate / 1e6:.0f} MB/s, {whole} {what}")
    return first if whole else None


def measure_verify(found: Findings, dataset: Dataset, path: Path, seconds: float) -> Samples:
    """Hash and index the first shard, as the fetcher does each time it enters a window."""
    rows = [np.empty((0, 5), np.int64)]

    def verify() -> int:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            sha256(view).digest()
            rows[0] = index_shard(view, dataset, 0, 0)
        return len(rows[0])

    found.add("verify", rate_of(verify, SHARES["verify"] * seconds), "SHA-256 and index, one core")
    about = path.stat()
    slot = Slot(path, rows[0], 0, (about.st_size, about.st_mtime_ns, about.st_ino))
    return Samples(dataset, OneShard(slot))


def measure_decode(found: Findings, samples: Samples, options: Options) -> None:
    """Read and decode in this process, then in workers; and hand over without decoding."""
    size = options.batch_size
    turns = itertools.cycle(range(samples.dataset.shards[0].samples))

    def indices() -> list[int]:
        return list(itertools.islice(turns, size))

    seconds = options.seconds
    one = rate_of(lambda: len(samples.batch(indices()).index), SHARES["decode"] * seconds)
    samples.close()
    found.decode_of_one = one
    blank = Blank(samples.dataset, samples.node)

    def rate(source: Samples, share: float) -> float:
        parts = (indices() for _ in itertools.count())
        return through_workers(source, parts, found.workers, share * seconds)

    several, handed = rate(samples, SHARES["workers"]), rate(blank, SHARES["hand-off"])
    found.add("decode", several, f"{found.workers} workers; one alone {one:,.0f} images/s")
    found.add("hand-off", handed, "worker to trainer, nothing decoded")


def through_workers(
    samples: Samples, parts: Iterator[list[int]], workers: int, seconds: float
) -> float:
    """Images a second that worker processes hand over."""
    with batches_from(samples, parts, workers, False) as stream:
        # What was ready before the clock starts is not counted.
        ready = PREFETCH_BATCHES * workers + 1
        return rate_of(lambda: len(next_batch(stream, never).index), seconds, ready)


def measure_device(
    found: Findings, samples: Samples, options: Options, device: torch.device, end: float
) -> None:
    """Forward, backward and step on a batch that is at hand; then with the loader."""
    step = stepper(samples, options, device)
    count = samples.dataset.shards[0].samples
    least = samples.batch([0, 1 % count])
    step(least)
    rows, rate = 2, rate_of(lambda: step(least), 0, warm_up=0)
    left = end - time.monotonic()
    affordable = options.batch_size if found.on_cuda else int(left / 8 * rate)
    if affordable > rows:
        rows = min(options.batch_size, affordable)
        batch = samples.batch([i % count for i in range(rows)])
        rate = rate_of(lambda: step(batch), 0.4 * left)
    found.threads = torch.get_num_threads()
    found.add("device", rate, f"{options.arch}, batches of {rows}, {device.type}")
    left = end - time.monotonic()
    if left < 3 * rows / rate:
        return
    parts = ([i % count for i in range(n, n + rows)] for n in itertools.count(0, rows))
    with batches_from(samples, parts, found.workers, found.on_cuda) as stream:
        found.measured = rate_of(lambda: step(next_batch(stream, never)), left)


def stepper(samples: Samples, options: Options, device: torch.device) -> Callable[[Batch], int]:
    """A training step of a fresh network, brought to its end."""
    dataset = samples.dataset
    auto = options.precision == "auto"
    config = bare_config(
        dataset,
        loss="cross_entropy" if dataset.contents == "labels" else options.loss,
        arch=options.arch,
        size_px=options.size_px or dataset.image.size_px,
        batch_size=options.batch_size,
        precision=pick_precision(device) if auto else options.precision,
    )
    bare = make_bare(config, dataset, device, compiled=False)

    def step(batch: Batch) -> int:
        images = bare_step(bare, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return images

    return step


def rate_of(work: Callable[[], int], seconds: float, warm_up: int = 1) -> float:
    """Images a second of `work`, which returns how many it did; for that long, and once."""
    for _ in range(warm_up):
        work()
    images, start = 0, time.perf_counter()
    while not images or time.perf_counter() - start < seconds:
        images += work()
    return images / (time.perf_counter() - start)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Late inside when so many seconds have passed; in the main thread alone."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget(path: Path) -> None:
    """Ask the system to read a file from the disk next time, not from memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
