"""Work: one process's or one node's share of the shards, from the plan and the storage alone."""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from builder import __version__
from builder.environment import check_goldens, make_goldens
from builder.errors import BuilderError
from builder.images import encode_pixels
from builder.index import ShardRecord
from builder.place import PLAN
from builder.plan import Plan, read_plan
from builder.progress import Progress
from builder.recipe import SUFFIX
from builder.scratch import Table, normals_table
from builder.shards import Sample, committed, json_bytes, npy_bytes, write_commit, write_shard
from builder.storage import Storage, open_storage
from builder.workers import results_again

BATCH = 32  # samples rendered at a time: bounds a worker's memory


class _Variables(NamedTuple):
    """Where a scheduler puts a task's number in an array, and what it says of the array."""

    number: str
    total: str = ""
    first: str = ""
    last: str = ""
    step: str = ""


_SCHEDULERS = (
    _Variables(*(f"SLURM_ARRAY_TASK_{part}" for part in ("ID", "COUNT", "MIN", "MAX", "STEP"))),
    _Variables("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),  # Kubernetes
    _Variables("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    _Variables("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
    _Variables("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),  # Google Cloud Batch
    _Variables("PBS_ARRAY_INDEX"),
    _Variables("SGE_TASK_ID", "", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    _Variables("LSB_JOBINDEX"),
)


class Done(NamedTuple):
    """A shard that stands: its record, and whether this run had to build it."""

    shard: ShardRecord
    built: bool


# How an engine runs `build_shard` for many shards: yields results in any order.
Engine = Callable[[str, Sequence[int], bool, Callable[[str], None]], Generator[Done, None, None]]


@dataclass(frozen=True)
class WorkSummary:
    """What one run of work did; `built` + `kept` shards were its share."""

    built: int
    kept: int
    built_samples: int
    seconds: float


def work(url: str, task: str, engine: Engine, *, deep: bool = False) -> WorkSummary:
    """Build this task's share of what is missing at `url`.

    `task` is `auto`, or `i/n` for the shards whose number leaves i when divided by n. `deep` reads
    and hashes the shards that stand already; else record and size are believed.
    """
    start = time.perf_counter()
    plan = read_plan(open_storage(url))
    indices = share_of(plan.shard_count, task)
    built = kept = samples = 0
    total = sum(len(plan.samples_of(i)) for i in indices)
    with (
        Progress(total, "samples", "img") as progress,
        # Closed also when a signal interrupts between two results: an engine has processes to end.
        closing(engine(url, indices, deep, progress.say)) as results,
    ):
        for done in results:
            if done.built:
                built += 1
                samples += done.shard.samples
                progress.done(done.shard.samples)
            else:  # only looked at: the rate and the time left are of what is to do
                kept += 1
                progress.skip(done.shard.samples)
    return WorkSummary(built, kept, samples, time.perf_counter() - start)


def share_of(shard_count: int, task: str) -> Sequence[int]:
    """The shards that a task looks after, in the order it takes them.

    Without a number of tasks a worker walks all of them in an order of its own, so that any number
    of workers share what is missing; what two of them build is the same bytes.
    """
    if task == "auto":
        number, count = _task_of_scheduler()
        if count == 0:
            order = list(range(shard_count))
            seed = f"{socket.gethostname()} {os.getpid()} {number} {time.time_ns()}"
            random.Random(seed).shuffle(order)
            return order
    else:
        match = re.fullmatch(r"(\d{1,9})/([1-9]\d{0,8})", task)
        if match is None:
            raise BuilderError(f"--task {task!r}: expected auto, or i/n such as 0/8")
        number, count = int(match[1]), int(match[2])
    if number >= count:
        raise BuilderError(f"--task {number}/{count}: tasks are numbered from 0 to {count - 1}")
    return range(number, shard_count, count)


def _task_of_scheduler() -> tuple[int, int]:
    """This task's number and how many there are, from the environment; 0 when it does not say."""
    for names in _SCHEDULERS:
        index = _variable(names.number)
        if index is None:
            continue
        first, step = _variable(names.first) or 0, _variable(names.step) or 1
        count, last = _variable(names.total), _variable(names.last)
        if last is not None:
            spanned = (last - first) // step + 1
            # An array with gaps (3,7,9) does not tell a task its place.
            count = spanned if count in (None, spanned) else 0
        return (index - first) // step, (count or 0) if index >= first else 0
    return 0, 0


def _variable(name: str) -> int | None:
    """A variable's number; None where it holds none, as SGE's "undefined" outside of arrays."""
    text = os.environ.get(name, "") if name else ""
    return int(text) if text.isdecimal() else None


def local_engine(jobs: int) -> Engine:
    """Processes of this machine; one that is killed is replaced once, by half as many."""

    def run(
        url: str, indices: Sequence[int], deep: bool, say: Callable[[str], None]
    ) -> Generator[Done, None, None]:
        storage = open_storage(url)
        plan = read_plan(storage)
        # Held here, so that the table is made once before the workers start, and removed after.
        with normals_table(storage, plan.normals, plan.recipe):
            tasks = [partial(build_shard, url, index, deep) for index in indices]
            for _, done in results_again(tasks, jobs, say):
                yield done

    return run


@dataclass(frozen=True)
class Context:
    """What a worker process keeps between shards."""

    storage: Storage
    plan: Plan
    plan_sha256: str
    table: Table


_held = ExitStack()  # the table's lock, for as long as the process lives


@lru_cache(maxsize=1)
def _context(url: str) -> Context:
    """Read the plan, map the normals, and prove on the goldens that this machine may write."""
    storage = open_storage(url)
    plan = read_plan(storage)
    table = _held.enter_context(normals_table(storage, plan.normals, plan.recipe))
    context = Context(storage, plan, plan.sha256, table)
    prove(context)
    return context


def prove(context: Context) -> None:
    """Raise BuilderError, naming the library, unless this machine makes the plan's goldens."""
    plan = context.plan
    if plan.builder_version != __version__:
        raise BuilderError(
            f"{context.storage.where(PLAN)}: is of builder {plan.builder_version}, this is "
            f"{__version__}; work with the version that planned, nothing was written"
        )
    indices = [golden.index for golden in plan.goldens]
    drawn = [parameters(context, range(i, i + 1)) for i in indices]
    theta = np.concatenate([one for _, one in drawn])
    images = _painted(context, np.concatenate([normal for normal, _ in drawn]), theta)
    found = make_goldens(plan.recipe, indices, theta, images)
    check_goldens(plan.recipe, plan.goldens, found, plan.environment)


def build_shard(url: str, index: int, deep: bool) -> Done:
    """Build data shard `index` of the plan at `url`, unless it stands, and commit it."""
    context = _context(url)
    storage, plan = context.storage, context.plan
    name = plan.shard(index)
    record = committed(storage, context.plan_sha256, name, deep=deep)
    if record is not None:
        return Done(record, False)
    samples = plan.samples_of(index)
    if read_plan(storage).sha256 != context.plan_sha256:  # its shards have the same names
        raise BuilderError(f"{storage.where(PLAN)}: was replaced meanwhile; start again")
    try:
        written = write_shard(storage, name, make_samples(context, samples))
        record = written.model_copy(update={"samples": len(samples)})  # packed: many under one key
        write_commit(storage, context.plan_sha256, record)
    except BuilderError:
        # Another built it meanwhile, and `finish` may have cleared our half-written file.
        record = committed(storage, context.plan_sha256, name, deep=False)
        if record is None:
            raise
        return Done(record, False)
    return Done(record, True)


def make_samples(context: Context, samples: range) -> Iterable[Sample]:
    """What a data shard of these consecutive samples holds."""
    make = _images if context.plan.contents == "images" else _packed
    return make(context, samples)


def parameters(
    context: Context, samples: range
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The choice of normals, int64 [n], and theta, float32 [n, L], of consecutive samples.

    Drawn, or read from the dataset that the plan names; then they lie in one of its shards.
    """
    from builder.prior import draw
    from builder.stored import stored_parameters

    plan = context.plan
    if plan.parameters_from is not None:
        return stored_parameters(plan.parameters_from, plan.parameters_sha256 or "", samples)
    return draw(plan.recipe, samples.start, samples.stop, plan.normals.count)


def _painted(
    context: Context,
    normal_index: npt.NDArray[np.int64],
    theta: npt.NDArray[np.float32],
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    from builder.render import render

    return render(context.table.pixels, normal_index, theta, out=out)


def _images(context: Context, samples: range) -> Iterator[Sample]:
    """One sample an image: the painted picture, its vector, and what it was painted on."""
    codec = context.plan.recipe.codec
    # One for all batches: fresh memory for each costs as much as its page faults.
    buffer = np.empty((BATCH, *context.table.pixels.shape[1:]), np.uint8)
    for low in range(samples.start, samples.stop, BATCH):
        part = range(low, min(samples.stop, low + BATCH))
        normal_index, theta = parameters(context, part)
        images = _painted(context, normal_index, theta, buffer[: len(part)])
        for i, index in enumerate(part):
            normal = int(normal_index[i])
            fields: dict[str, object] = {
                "index": index,
                "normal": f"{normal:09d}",
                "category": context.table.categories[normal],
            }
            members = [
                (SUFFIX[codec], encode_pixels(images[i], codec)),
                ("theta.npy", npy_bytes(theta[i])),
                ("json", json_bytes(fields)),
            ]
            yield Sample(f"{index:09d}", members)


def _packed(context: Context, samples: range) -> Iterable[Sample]:
    """One sample a shard: all its vectors, and the normals they belong to."""
    normal_index, theta = parameters(context, samples)
    members = [
        ("theta.npy", npy_bytes(theta)),
        ("normal.npy", npy_bytes(normal_index.astype(np.int32))),
    ]
    return [Sample(f"{samples.start:09d}", members)]
