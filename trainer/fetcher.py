"""The process that makes a node's shards present: fetches, verifies, indexes and publishes them.

It walks the windows of the order, keeps those at hand that the position consumed asks for, and ends
when its parent does or says so. What it cannot do is a line in the node table.
"""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.cache import Cache
from trainer.dataset import Dataset
from trainer.decoded import Decoded
from trainer.errors import TrainerError
from trainer.index import BadShard, index_shard
from trainer.order import Order, Window
from trainer.shards import open_shard
from trainer.stops import SIGNALS
from trainer.storage import Storage, open_storage
from trainer.table import ABSENT, QUARANTINED, READY, Entry, Table

POLL_SECONDS = 0.02
WATCH_SECONDS = 0.1
SHARDS_AT_ONCE = 4  # fetched, verified or indexed together


class Ready(NamedTuple):
    """A verified shard; the open file keeps it from being evicted."""

    file: BinaryIO
    rows: npt.NDArray[np.int64]
    stamp: tuple[int, int, int]


class Held(NamedTuple):
    """A published shard: its slot, its open file, and up to where in the stream it is verified."""

    slot: int
    file: BinaryIO
    until: int


@dataclass
class State:
    """What the loop works with."""

    table: Table
    storage: Storage
    cache: Cache
    dataset: Dataset
    order: Order
    max_bad_ratio: float
    firsts: list[int]
    flight: deque[Window] = field(default_factory=deque)
    uses: Counter[int] = field(default_factory=Counter)  # windows in flight with a shard
    pending: dict[Future[Ready], tuple[int, int]] = field(default_factory=dict)  # shard, until
    held: dict[int, Held] = field(default_factory=dict)  # by shard
    free: list[int] = field(default_factory=list)  # slots
    bad: set[int] = field(default_factory=set)
    decoded: Decoded | None = None
    unneeded: set[int] = field(default_factory=set)  # in flight, but decoded already
    turn: int = 0


def main(descriptor: int, parent: int) -> None:
    """Serve the table behind a descriptor for a parent, which sends the plan on stdin."""
    for number in SIGNALS:  # meant for the trainer, which ends this process when it has saved
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    table = Table(descriptor)
    try:
        plan = pickle.load(sys.stdin.buffer)  # from the parent alone
    except (EOFError, OSError, pickle.UnpicklingError):  # which ended meanwhile
        os._exit(0)
    options = plan["options"]
    cache = Cache(options.cache, options.cache_bytes)
    threading.Thread(target=_watch, args=(table, cache, parent), daemon=True).start()
    try:
        _allow_open_files()
        cache.sweep()
        dataset: Dataset = plan["dataset"]
        state = State(
            table,
            open_storage(plan["url"]),
            cache,
            dataset,
            Order(*plan["order"]),
            options.max_bad_ratio,
            np.cumsum([0, *(shard.samples for shard in dataset.shards)]).tolist(),
            free=list(range(table["slots"])),
            decoded=plan["decoded"],
        )
        _serve(state, plan["ahead"], plan["end"])
    except TrainerError as error:
        table.fault = error.message
    except BaseException as error:  # a fault of ours, too, is one line in whoever waits
        said = " ".join(str(error).split())[:300]
        table.fault = f"fetching the data failed ({type(error).__name__}: {said})"
    threading.Event().wait()  # the watch ends the process


def _watch(table: Table, cache: Cache, parent: int) -> None:
    while os.getppid() == parent and not table["leave"]:
        time.sleep(WATCH_SECONDS)
    try:
        cache.abandon()
    finally:
        os._exit(0)


def _allow_open_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _serve(state: State, ahead: int, end: float) -> None:
    table, order = state.table, state.order
    windows = order.windows(table["position"])
    upcoming = next(windows)
    threads = min(SHARDS_AT_ONCE, 1 + len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            position = table["position"]
            while state.flight and state.flight[0].stop <= position:
                _let_go(state, state.flight.popleft())
            while upcoming.start < end and (
                len(state.flight) < 2 or state.flight[-1].stop < position + ahead
            ):
                _take_up(state, upcoming, pool)
                upcoming = next(windows)
            _take_up_damaged(state, pool)
            if state.pending:
                done, _ = wait(state.pending, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    _finish(state, *state.pending.pop(future), future)
            else:
                time.sleep(POLL_SECONDS)
            _count(state)
    finally:  # a fault is told at once, not when all that was asked for has come
        pool.shutdown(wait=False, cancel_futures=True)


def _take_up(state: State, window: Window, pool: ThreadPoolExecutor) -> None:
    """Ask for the shards of a window; each is verified again, also where it is at hand."""
    state.flight.append(window)
    for shard in window.shards:
        state.uses[shard] += 1
        if state.decoded is not None and state.decoded.complete(shard):
            state.unneeded.add(shard)
        elif shard not in state.bad:
            _ask(state, shard, pool)


def _ask(state: State, shard: int, pool: ThreadPoolExecutor) -> None:
    """Have a shard verified for all windows in flight."""
    until = max(window.stop for window in state.flight if shard in window.shards)
    state.pending[pool.submit(_prepare, state, shard)] = shard, until


def _take_up_damaged(state: State, pool: ThreadPoolExecutor) -> None:
    """Ask for shards of which a decoded sample turned out to be damaged: a reader waits for it."""
    for shard in list(state.unneeded):
        assert state.decoded is not None
        if state.uses[shard] == 0:
            state.unneeded.remove(shard)
        elif not state.decoded.complete(shard):
            state.unneeded.remove(shard)
            _ask(state, shard, pool)


def _let_go(state: State, window: Window) -> None:
    """Free what only this window held."""
    for shard in window.shards:
        state.uses[shard] -= 1
        if state.uses[shard] == 0 and shard in state.held:
            _release(state, shard)


def _release(state: State, shard: int) -> None:
    held = state.held.pop(shard)
    _publish(state, shard, ABSENT)
    state.free.append(held.slot)
    held.file.close()


def _prepare(state: State, shard: int) -> Ready:
    """Fetch, verify and index a shard; in a thread of the pool."""
    record = state.dataset.shards[shard]
    opened = open_shard(state.storage, state.cache, record, lambda: _next_uses(state))
    try:
        view = mmap.mmap(opened.file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = index_shard(view, state.dataset, shard, state.firsts[shard])
        return Ready(opened.file, rows, opened.stamp)
    except BaseException:
        opened.close()
        raise


def _next_uses(state: State) -> Sequence[str]:
    """The SHA-256 of the shards in the order of their next use, as many as the cache can hold.

    Those used later would be evicted before in any case. At most two epochs.
    """
    order, shards = state.order, state.dataset.shards
    start, room_bytes = state.table["position"], state.cache.max_bytes
    found: dict[str, None] = {}
    for window in order.windows(start):
        if room_bytes < 0 or window.start >= start + 2 * order.train_samples:
            break
        for shard in window.shards:
            if shards[shard].sha256 not in found:
                found[shards[shard].sha256] = None
                room_bytes -= shards[shard].bytes
    return list(found)


def _finish(state: State, shard: int, until: int, future: Future[Ready]) -> None:
    """Publish what a thread found."""
    try:
        ready = future.result()
    except BadShard as error:
        _quarantine(state, shard, error)
        return
    if state.uses[shard] == 0 or shard in state.bad:  # its window passed meanwhile
        ready.file.close()
        return
    held = state.held.get(shard)
    if held is not None and held.until > until:  # a later verification was done before this one
        ready.file.close()
        return
    if held is not None:  # verified again: the same bytes, and so the same rows
        slot = held.slot
        held.file.close()
    else:
        slot = state.free.pop()
        state.table.set_rows(slot, ready.rows)
    state.held[shard] = Held(slot, ready.file, until)
    _publish(state, shard, READY, slot, until, ready.stamp, zlib.crc32(ready.rows.tobytes()))


def _publish(
    state: State,
    shard: int,
    status: int,
    slot: int = 0,
    until: int = 0,
    stamp: tuple[int, int, int] = (0, 0, 0),
    crc: int = 0,
) -> None:
    state.turn += 1
    state.table.publish(shard, Entry(state.turn, status, slot, until, *stamp, crc))


def _quarantine(state: State, shard: int, error: BadShard) -> None:
    """Leave a shard out for good where --max-bad-ratio allows it; else raise TrainerError."""
    if shard in state.bad:
        return
    if shard in state.held:  # whoever asks for it shall wait, and be told
        _release(state, shard)
    samples = state.dataset.samples
    without = state.table["quarantined_samples"] + state.dataset.shards[shard].samples
    if without > state.max_bad_ratio * samples:
        more = (
            f"; with it {without} of {samples} samples would be left out, more than "
            f"--max-bad-ratio {state.max_bad_ratio:g} allows"
        )
        raise TrainerError(error.message + (more if state.max_bad_ratio else ""))
    state.bad.add(shard)
    state.table["quarantined_samples"] = without
    _publish(state, shard, QUARANTINED)
    print(
        f"Warning: {error.message}; the shard is left out: {without} of {samples} samples so far",
        file=sys.stderr,
        flush=True,
    )


def _count(state: State) -> None:
    """Copy the counters into the table."""
    counters, table = state.cache.counters, state.table
    table["fetched_bytes"] = counters.fetched_bytes
    table["fetch_microseconds"] = int(1e6 * counters.fetch_seconds)
    table["hits"] = counters.hits
    table["verified_bytes"] = counters.verified_bytes
    table["evictions"] = counters.evictions
    table["damaged"] = counters.damaged
