"""The shards of a node: one fetcher process makes them present, all local processes read them.

Local rank 0 starts the fetcher (fetcher.py) and tells it the position consumed; the other ranks and
the loader workers look into the node table (table.py). Shards of the window at that position and of
the next are present and verified; a reader of any other waits.
"""

from __future__ import annotations

import fcntl
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.dataset import Dataset
from trainer.decoded import Decoded
from trainer.errors import TrainerError
from trainer.order import Order
from trainer.stops import SIGNALS, Stopped
from trainer.storage import Storage
from trainer.table import QUARANTINED, READY, Table, make_table, open_table

LOOK_EVERY_SECONDS = 0.5  # whether the fetcher lives, while waiting for it
LONGEST_POLL_SECONDS = 0.02
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class DataOptions:
    """Where the data come from and what they may take."""

    data: str
    cache: Path
    cache_bytes: int
    decoded_bytes: int = 0
    max_bad_ratio: float = 0.0
    workers: int | None = None


@dataclass(frozen=True)
class Slot:
    """A verified shard: its file, where its samples lie, and how the file looked then.

    `rows` int64 [n, 5], read-only: image start, image bytes, theta start, theta bytes, normal (or
    label). `stamp`: size, mtime_ns and inode.
    """

    path: Path
    rows: npt.NDArray[np.int64]
    first: int
    stamp: tuple[int, int, int]


@dataclass(frozen=True)
class Figures:
    """What the fetcher did so far."""

    fetched_bytes: int
    fetch_seconds: float  # summed over what was fetched at the same time
    hits: int  # shards that lay in the cache
    verified_bytes: int
    evictions: int
    damaged: int
    quarantined_samples: int


class Node:
    """The shards as this process sees them; forked and pickled copies see the same."""

    def __init__(self, table: Table, dataset: Dataset, folder: Path, in_place: bool) -> None:
        self._table = table
        self._dataset = dataset
        self._folder = folder
        self._in_place = in_place  # a local dataset; else `folder` is a cache
        self._firsts = np.cumsum([0, *(shard.samples for shard in dataset.shards)])
        self._known: dict[int, tuple[bytes, float, Slot | None]] = {}  # entry, until, slot

    def __reduce__(self) -> tuple[object, ...]:
        path = f"/proc/{os.getpid()}/fd/{self._table.descriptor}"
        return _reopen, (path, self._dataset, self._folder, self._in_place)

    def shard(self, shard: int, stop: Callable[[], bool]) -> Slot | None:
        """Wait until a shard (a position in dataset.json's list) is verified; None: quarantined.

        Raises the fetcher's fault as TrainerError, and Stopped as soon as `stop` turns true.
        """
        pause, looked = 0.001, time.monotonic()
        while True:
            raw = self._table.raw(shard)
            known = self._known.get(shard)
            if known is not None and known[0] == raw:
                if self._table["position"] < known[1]:
                    return known[2]
            elif self._learn(shard, raw):
                continue
            if fault := self._table.fault:
                raise TrainerError(fault)
            if stop():
                raise Stopped(getattr(stop, "signal", 0))
            if time.monotonic() - looked > LOOK_EVERY_SECONDS:
                looked = time.monotonic()
                if not self._table.held() and not self._table.fault:
                    raise TrainerError(
                        "the process that fetches the data was ended from outside, perhaps for "
                        "want of memory; the same command goes on from the last checkpoint"
                    )
            time.sleep(pause)
            pause = min(LONGEST_POLL_SECONDS, 1.5 * pause)

    def _learn(self, shard: int, raw: bytes) -> bool:
        """Take an entry up where it is whole."""
        entry = self._table.entry(raw)
        if entry is None:
            return False
        if entry.status == QUARANTINED:
            self._known[shard] = raw, math.inf, None
            return True
        assert entry.status == READY
        record = self._dataset.shards[shard]
        # A copy: a reader may wait long for another shard, and the slot be given away meanwhile.
        rows = self._table.rows(entry.slot, record.samples).copy()
        rows.flags.writeable = False
        if zlib.crc32(rows) != entry.rows_crc:  # type: ignore[arg-type]
            return False
        position = self._table["position"]
        self._known = {key: known for key, known in self._known.items() if known[1] > position}
        name = record.name if self._in_place else f"{record.sha256}.tar"
        self._known[shard] = (
            raw,
            entry.until,
            Slot(
                self._folder / name,
                rows,
                int(self._firsts[shard]),
                (entry.size, entry.mtime_ns, entry.inode),
            ),
        )
        return True

    def advance(self, position: int) -> None:
        """Tell how many samples of the stream are consumed; shards behind it may go."""
        self._table["position"] = position

    def quarantined(self) -> list[str]:
        """The names of the shards that are left out."""
        if self._table["quarantined_samples"] == 0:
            return []
        return [
            record.name
            for shard, record in enumerate(self._dataset.shards)
            if (entry := self._table.entry(self._table.raw(shard))) is not None
            and entry.status == QUARANTINED
        ]

    def figures(self) -> Figures:
        """What the fetcher did so far."""
        table = self._table
        return Figures(
            table["fetched_bytes"],
            table["fetch_microseconds"] / 1e6,
            table["hits"],
            table["verified_bytes"],
            table["evictions"],
            table["damaged"],
            table["quarantined_samples"],
        )


def _reopen(path: str, dataset: Dataset, folder: Path, in_place: bool) -> Node:
    return Node(open_table(path), dataset, folder, in_place)


@contextmanager
def node(
    options: DataOptions,
    storage: Storage,
    dataset: Dataset,
    order: Order,
    position: int,
    local_rank: int,
    barrier: Callable[[], None],
    share: Callable[[str | None], str],
    ahead: int = 1,
    end: float = math.inf,
    decoded: Decoded | None = None,
) -> Iterator[Node]:
    """The node's shards from a stream position on; local rank 0 runs the fetcher meanwhile.

    `share` gives what local rank 0 said to all local ranks, `barrier` waits for them. `ahead` is
    how many samples beyond the position may be asked for before it advances: a batch. Nothing is
    fetched for samples from `end` on, nor for shards whose samples `decoded` has all. Raises
    TrainerError where the cache is too small for that.
    """
    in_flight = shards_in_flight(order, ahead)
    if storage.local is None:
        _refuse_small_cache(options, dataset, order, in_flight)
    folder = options.cache if storage.local is None else storage.local
    if local_rank != 0:
        table = open_table(share(None))
        barrier()
        yield Node(table, dataset, folder, storage.local is not None)
        return
    rows = max(shard.samples for shard in dataset.shards)
    table = make_table(len(dataset.shards), in_flight, rows, position)
    plan = {
        "options": options,
        "url": storage.url,
        "dataset": dataset,
        "order": (order.key, order.seed, order.counts, order.window_shards),
        "ahead": ahead,
        "end": end,
        "decoded": decoded,
    }
    with _fetcher(table, plan):
        share(f"/proc/{os.getpid()}/fd/{table.descriptor}")
        barrier()
        yield Node(table, dataset, folder, storage.local is not None)


def shards_in_flight(order: Order, ahead: int) -> int:
    """How many shards at most are in a window at hand: two windows, or what `ahead` reaches.

    >>> shards_in_flight(Order("k", 0, np.array([5] * 9), window_shards=2), ahead=4)
    4
    """
    counts = np.sort(order.counts[order.counts > 0])
    size = min(order.window_shards, len(counts))
    last = len(counts) % size or size  # shards of an epoch's last window
    windows = 2
    if ahead > counts[:last].sum():
        windows = ahead // int(counts[:size].sum()) + 4
    return min(len(counts), windows * size)


def _refuse_small_cache(
    options: DataOptions, dataset: Dataset, order: Order, in_flight: int
) -> None:
    sizes = np.array([shard.bytes for shard in dataset.shards])
    needed = int(np.sort(sizes[order.counts > 0])[-in_flight:].sum())
    held_out = order.counts < [shard.samples for shard in dataset.shards]
    needed += int(sizes[held_out].sum())  # read again at each checkpoint
    if options.cache_bytes < needed:
        raise TrainerError(
            f"--cache-bytes {options.cache_bytes}: the windows in flight, {in_flight} shards, and "
            f"the held-out samples take up to {needed} bytes; give as much, or a "
            "smaller --window"
        )


@contextmanager
def _fetcher(table: Table, plan: dict[str, object]) -> Iterator[None]:
    """Run the fetcher for a table; it ends with this block, or soon after this process."""
    lock = os.open(f"/proc/self/fd/{table.descriptor}", os.O_RDWR)
    # Taken here and inherited, so that it is held from the first moment on.
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    start = "import sys; sys.path[:] = sys.argv[1].split('\\n'); from trainer.fetcher import main; "
    words = [sys.executable, "-c", f"{start}main({lock}, {os.getpid()})"]
    # A signal for the whole group may come before the new process has said that it ignores it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            [*words, "\n".join(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[lock],
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(lock)
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:  # a reader will see that it died
            pickle.dump(plan, pipe)
        yield
    finally:
        table["leave"] = 1
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
