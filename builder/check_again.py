"""Build whole shards of a finished dataset again, and compare the bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import numpy as np

from builder.check_files import Findings
from builder.environment import check_goldens
from builder.errors import BuilderError
from builder.index import Dataset, ShardRecord
from builder.plan import Plan
from builder.progress import Progress
from builder.scratch import DamagedNormals, normals_table, scratch_folder
from builder.shards import write_shard
from builder.storage import Folder, Storage, open_storage
from builder.work import Context, make_samples, prove
from builder.workers import results_again

PIECE_BYTES = 2**20


def rebuild(
    found: Findings,
    storage: Storage,
    dataset: Dataset,
    plan: Plan | None,
    count: int,
    seed: int,
    jobs: int,
) -> int:
    """Build `count` random shards again; how many were.

    What this machine cannot do is no fault of the dataset: a note says it.
    """
    again = _plan_again(storage, dataset, plan)
    rng = np.random.default_rng(seed)
    total = len(dataset.shards)
    numbers = sorted(rng.choice(total, min(count, total), replace=False).tolist())
    done = 0
    try:
        # Held here, so that the table is made once, before the workers start.
        with normals_table(storage, again.normals, again.recipe) as table:
            if again.goldens:
                prove(Context(storage, again, again.sha256, table))
            else:  # the kernel's version can be compared without them
                check_goldens(again.recipe, [], [], again.environment)
            tasks = [
                partial(_rebuild_one, storage.url, again, i, dataset.shards[i]) for i in numbers
            ]
            with Progress(len(tasks), "rebuilt", "shard") as progress:
                for i, fault in _answers(tasks, jobs, progress):
                    if fault:
                        found.add("rebuild", dataset.shards[numbers[i]].name, fault)
                    progress.done(1)
                    done += 1
    except DamagedNormals as error:
        found.add("rebuild", "normals", error.message)
    except BuilderError as error:
        found.notes.append(f"{done or 'nothing'} of {len(numbers)} shards rebuilt: {error.message}")
    return done


def _answers(tasks: list[partial[str]], jobs: int, progress: Progress) -> Iterator[tuple[int, str]]:
    if jobs > 1 and len(tasks) > 1:
        return results_again(tasks, min(jobs, len(tasks)), progress.say)
    return ((i, task()) for i, task in enumerate(tasks))


def _plan_again(storage: Storage, dataset: Dataset, plan: Plan | None) -> Plan:
    """The plan that dataset.json stands for; stored parameters are read from the dataset itself."""
    given = plan is not None and plan.parameters_from is not None
    fits = plan is not None and plan.recipe == dataset.recipe
    return Plan(
        format="semiformula-plan",
        format_version=2,
        builder_version=dataset.builder_version,
        recipe=dataset.recipe,
        recipe_sha256=dataset.recipe_sha256,
        contents=dataset.contents,
        parameters_from=storage.url if given else None,
        parameters_sha256=dataset.content_sha256 if given else None,
        shard_count=len(dataset.shards),
        photographs_sha256="0" * 64,  # not known, not used
        normals=dataset.normals,
        environment=dataset.environment,
        goldens=plan.goldens if plan is not None and fits else [],
    )


def _rebuild_one(url: str, plan: Plan, index: int, record: ShardRecord) -> str:
    """Why the shard built again is not the recorded one, or an empty string."""
    storage = open_storage(url)
    with (
        normals_table(storage, plan.normals, plan.recipe) as table,
        TemporaryDirectory(prefix="rebuild-", dir=scratch_folder()) as folder,
    ):
        context = Context(storage, plan, plan.sha256, table)
        target = Folder(Path(folder))
        made = write_shard(target, record.name, make_samples(context, plan.samples_of(index)))
        if made.sha256 == record.sha256:
            return ""
        fault = f"SHA-256 recorded {record.sha256}, built again {made.sha256}"
        try:
            with storage.open(record.name) as stored, target.open(record.name) as fresh:
                position = _first_difference(stored, fresh)
                return f"{fault}; first other byte {position}, in {_member_at(fresh, position)}"
        except FileNotFoundError:
            return fault


def _first_difference(one: IO[bytes], other: IO[bytes]) -> int:
    position = 0
    while True:
        first, second = one.read(PIECE_BYTES), other.read(PIECE_BYTES)
        if first != second or not first:
            common = min(len(first), len(second))
            a, b = np.frombuffer(first[:common], "u1"), np.frombuffer(second[:common], "u1")
            differing = np.flatnonzero(a != b)
            return position + int(differing[0] if len(differing) else common)
        position += len(first)


def _member_at(tar: IO[bytes], position: int) -> str:
    tar.seek(0)
    name = "the end"
    with tarfile.open(fileobj=tar, mode="r:") as members:
        for member in members:
            if member.offset > position:
                break
            name = member.name
    return name
