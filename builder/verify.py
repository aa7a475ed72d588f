"""Verify a finished dataset: every byte of it against dataset.json, the spec and the recipe."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import numpy.typing as npt

from builder import __version__
from builder.check import DataTask, ShardCheck
from builder.check_again import rebuild
from builder.check_files import (
    Findings,
    check_index,
    check_photographs,
    check_plan,
    check_records,
    check_surplus,
)
from builder.check_parameters import MAX_JPEG_DIFFERENCE, MAX_KERNEL_DIFFERENCE
from builder.check_shard import check_data_shard, check_normals_shard
from builder.dataset import INDEX, read_index
from builder.environment import this_environment
from builder.index import Dataset, DatasetHead, ShardRecord
from builder.plan import Plan
from builder.progress import Progress
from builder.scratch import DamagedNormals, normals_table
from builder.storage import Storage, open_storage
from builder.verification import Counts, Options, Verification
from builder.workers import results_again


def verify(
    url: str, *, rerender: int = 0, rebuilds: int = 0, seed: int = 0, jobs: int
) -> Verification:
    """Check everything at `url` that dataset.json names, and that there is nothing else.

    `rerender` random samples are painted again and `rebuilds` random shards built again. Faults
    are collected, not raised; BuilderError where there is no dataset.json, or a damaged one, and
    for what this machine or the storage cannot do.
    """
    start = time.perf_counter()
    storage = open_storage(url)
    dataset = read_index(storage)
    found = Findings()
    check_index(found, dataset)
    plan = check_plan(found, storage, dataset)
    check_surplus(found, storage, dataset.shards, dataset.normals.shards)
    records = check_records(found, storage, dataset.shards, plan.sha256 if plan else None)
    checks = _check_shards(found, storage, dataset, plan, rerender, seed, jobs)
    name_swapped(checks)
    rebuilt = 0
    if rebuilds and any(check.faults for check in checks[: len(dataset.normals.shards)]):
        found.notes.append("nothing was rebuilt: the normals are damaged")
    elif rebuilds:
        rebuilt = rebuild(found, storage, dataset, plan, rebuilds, seed, jobs)
    for check in checks:
        found.of_shard(check)
    return Verification(
        format="semiformula-verification",
        format_version=1,
        builder_version=__version__,
        url=url,
        content_sha256=dataset.content_sha256,
        options=Options(rerender=rerender, rebuild=rebuilds, seed=seed, jobs=jobs),
        counts=_counts(found, dataset, checks, records, rebuilt),
        notes=found.notes,
        faults=found.faults,
        seconds=round(time.perf_counter() - start, 3),
    )


def _check_shards(
    found: Findings,
    storage: Storage,
    dataset: Dataset,
    plan: Plan | None,
    rerender: int,
    seed: int,
    jobs: int,
) -> list[ShardCheck]:
    """The normals first: what their JSON says is needed to check the samples'."""
    head = DatasetHead(**{name: getattr(dataset, name) for name in DatasetHead.model_fields})
    url = storage.url
    total = dataset.samples + dataset.normals.count
    with Progress(total, "samples", "img") as progress, ExitStack() as held:
        tasks: list[Callable[[], ShardCheck]] = []
        for shard, start in starts(dataset.normals.shards):
            tasks.append(partial(check_normals_shard, url, head, shard, start))
        normals = run_checks(tasks, jobs, progress)
        categories = _categories(found, dataset, normals)
        check_photographs(found, plan, normals)
        chosen = _chosen(found, dataset, rerender, seed)
        if len(chosen) and any(check.faults for check in normals):
            found.notes.append("nothing was rendered again: the normals are damaged")
            chosen = np.zeros(0, np.int64)
        if len(chosen):
            try:  # held until the end, so that it is made once
                held.enter_context(normals_table(storage, head.normals, head.recipe))
            except DamagedNormals as error:
                found.add("rerender", "normals", error.message)
                chosen = np.zeros(0, np.int64)
        drawn = plan is None or plan.parameters_from is None
        tolerance = _tolerance(found, dataset) if len(chosen) else 0
        tasks = []
        for shard, start in starts(dataset.shards):
            low, high = np.searchsorted(chosen, [start, start + shard.samples])
            wanted = frozenset(chosen[low:high].tolist())
            task = DataTask(url, head, shard, start, categories, drawn, wanted, tolerance)
            tasks.append(partial(check_data_shard, task))
        return normals + run_checks(tasks, jobs, progress)


def _tolerance(found: Findings, dataset: Dataset) -> int:
    """By how many grey levels an image painted here may differ from the stored one."""
    here, there = this_environment(), dataset.environment
    lossy, tolerance = not dataset.image.lossless, 0
    if here.kernel != there.kernel:
        tolerance = MAX_JPEG_DIFFERENCE if lossy else MAX_KERNEL_DIFFERENCE
        found.notes.append(
            f"images are of kernel {there.kernel}, here is {here.kernel}: up to {tolerance} grey "
            "levels are no fault"
        )
    if lossy and (here.pillow, here.libjpeg) != (there.pillow, there.libjpeg):
        tolerance = MAX_JPEG_DIFFERENCE
        found.notes.append(
            f"JPEGs are of libjpeg {there.libjpeg}, here is {here.libjpeg}: up to "
            f"{tolerance} grey levels are no fault"
        )
    return tolerance


def starts(shards: Sequence[ShardRecord]) -> Iterator[tuple[ShardRecord, int]]:
    """Each shard with the number of its first sample."""
    start = 0
    for shard in shards:
        yield shard, start
        start += shard.samples


def run_checks(
    tasks: Sequence[Callable[[], ShardCheck]], jobs: int, progress: Progress
) -> list[ShardCheck]:
    """The checks in the order of the tasks; in this process where one is enough."""
    done: list[ShardCheck | None] = [None] * len(tasks)
    several = jobs > 1 and len(tasks) > 1
    answers = (
        results_again(tasks, min(jobs, len(tasks)), progress.say)
        if several
        else ((i, task()) for i, task in enumerate(tasks))
    )
    for i, check in answers:
        done[i] = check
        progress.done(check.record.samples)
    return [check for check in done if check is not None]


def _categories(
    found: Findings, dataset: Dataset, normals: Sequence[ShardCheck]
) -> list[str | None]:
    """Each normal's category (None: unreadable), whose numbers dataset.json states."""
    categories: list[str | None] = []
    names: dict[str | None, str | None] = {}  # one object a name: pickled once a task
    for check in normals:
        missing = check.record.samples - len(check.categories)
        categories += [names.setdefault(one, one) for one in check.categories] + [None] * missing
    counts = Counter(categories)
    if counts[None] == 0:
        for one in dataset.normals.source.categories:
            if counts[one.category] != one.kept:
                found.add(
                    "index",
                    INDEX,
                    f"{one.kept} normals of category {one.category!r:.60} stated, "
                    f"found {counts[one.category]}",
                )
    return categories


def _chosen(found: Findings, dataset: Dataset, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Random samples to render again, in order."""
    if count and dataset.contents == "parameters":
        found.notes.append("nothing to render again: the dataset stores no images")
        count = 0
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(dataset.samples, min(count, dataset.samples), replace=False))


def name_swapped(checks: Sequence[ShardCheck]) -> None:
    """Where a shard's bytes are another's, that says more than all that follows from it."""
    of = {check.record.sha256: check.record.name for check in checks}
    for check in checks:
        other = of.get(check.sha256)
        if check.sha256 != check.record.sha256 and other is not None:
            check.faults.clear()
            check.left_out = 0
            check.add("swapped", "", f"holds the bytes of {other}")


def _counts(
    found: Findings, dataset: Dataset, checks: Sequence[ShardCheck], records: int, rebuilt: int
) -> Counts:
    normals = len(dataset.normals.shards)
    missing = sum(not check.sha256 for check in checks)
    return Counts(
        data_shards=len(dataset.shards),
        normals_shards=normals,
        shards_read=len(checks) - missing,
        shards_missing=missing,
        samples=sum(check.samples for check in checks[normals:]),
        normals=sum(check.samples for check in checks[:normals]),
        bytes=sum(check.bytes for check in checks),
        records=records,
        redrawn=sum(check.redrawn for check in checks),
        differing=sum(check.differing for check in checks),
        rerendered=sum(check.rerendered for check in checks),
        rebuilt=rebuilt,
        faults_left_out=found.left_out,
    )
