"""Labelled photographs in, shuffled and labelled shards out: plan, shards, index."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from builder import __version__
from builder.artifacts import readable_json, sha256_of
from builder.classes.index import ClassCount, ClassPlan, ClassSet, read_class_plan
from builder.classes.work import Member, make_shard
from builder.dataset import INDEX
from builder.environment import this_environment
from builder.errors import BuilderError
from builder.images import Prepared
from builder.index import ImageFormat, ShardRecord, SourceReport, content_sha256
from builder.place import PLAN, alone, refuse_foreign
from builder.progress import Progress
from builder.recipe import SUFFIX, Codec
from builder.rejects import count_kept, refuse_faults
from builder.sources import Photograph, Source, examine
from builder.status import clear_leftovers
from builder.storage import Storage, open_storage
from builder.workers import results, results_again, worker_pool

CHANNELS: Literal[1, 3] = 3
# The libraries of Environment that resized pixels and encoded bytes depend on.
_LIBRARIES = ("pillow", "libwebp", "libjpeg")


class Options(NamedTuple):
    """What is asked for beside the photographs."""

    size_px: int
    codec: Codec
    samples_per_shard: int
    seed: int


@dataclass(frozen=True)
class Summary:
    """What a run did; `built` + `kept` shards make up the dataset."""

    dataset: ClassSet
    built: int
    kept: int
    built_samples: int
    shard_seconds: float
    seconds: float


def build_classes(
    source: Source, url: str, options: Options, *, jobs: int, allow_incomplete: bool = False
) -> Summary:
    """Write the labelled dataset at `url`, or what is missing of it.

    The bytes do not depend on `jobs`. Raises BuilderError for faults in the source unless
    `allow_incomplete`, for a place that belongs to something else, and for what cannot be written.
    """
    start = time.perf_counter()
    storage = open_storage(url)
    plan = _plan(storage, source, options, jobs, allow_incomplete)
    began = time.perf_counter()
    done = _write_shards(storage, plan, source.photographs[0].root, jobs)
    seconds = time.perf_counter() - began
    dataset = _finish(storage, plan, [record for record, _ in done])
    built = [record.samples for record, new in done if new]
    return Summary(
        dataset=dataset,
        built=len(built),
        kept=len(done) - len(built),
        built_samples=sum(built),
        shard_seconds=seconds,
        seconds=time.perf_counter() - start,
    )


def _plan(
    storage: Storage, source: Source, options: Options, jobs: int, allow_incomplete: bool
) -> ClassPlan:
    """The plan that stands, if it asks for the same; else examine every photograph and write it."""
    lines = "".join(f"{one.category} {one.name}\n" for one in source.photographs)
    listing = sha256_of(lines.encode())
    standing = _standing(storage, source, options, listing)
    if standing is None:
        with alone(storage):
            standing = _standing(storage, source, options, listing)
            if standing is None:
                return _make_plan(storage, source, options, listing, jobs, allow_incomplete)
    refuse_faults(standing.source, allow_incomplete)
    return standing


def _standing(storage: Storage, source: Source, options: Options, listing: str) -> ClassPlan | None:
    plan = read_class_plan(storage)
    if plan is None:
        refuse_foreign(storage)
        return None
    here = this_environment()
    for what, old, new in (
        ("version of the builder", plan.builder_version, __version__),
        *((name, getattr(plan.environment, name), getattr(here, name)) for name in _LIBRARIES),
        ("--size", plan.image.size_px, options.size_px),
        ("--codec", plan.image.codec, options.codec),
        ("--samples-per-shard", plan.samples_per_shard, options.samples_per_shard),
        ("--seed", plan.seed, options.seed),
        ("licence", plan.source.licence, source.report.licence),
        ("list of photographs", plan.listing_sha256[:16], listing[:16]),
    ):
        if old != new:
            raise BuilderError(
                f"{storage.url}: was begun with {what} {old}, this is {new}; go on with the same, "
                "choose another --out, or remove the folder"
            )
    return plan


def _make_plan(
    storage: Storage,
    source: Source,
    options: Options,
    listing: str,
    jobs: int,
    allow_incomplete: bool,
) -> ClassPlan:
    photographs = source.photographs
    examined, report = _examine(source, jobs)
    refuse_faults(report, allow_incomplete)
    for category in report.categories:
        if not category.kept:
            raise BuilderError(f"class {category.category}: no photograph of it can be used")
    label = {one.category: number for number, one in enumerate(report.categories)}
    kept = [i for i, one in enumerate(examined) if not one.fault]
    plan = ClassPlan(
        format="semiformula-classes-plan",
        format_version=1,
        builder_version=__version__,
        environment=this_environment(),
        seed=options.seed,
        samples_per_shard=options.samples_per_shard,
        classes=[ClassCount(category=c.category, samples=c.kept) for c in report.categories],
        image=ImageFormat(
            size_px=options.size_px,
            channels=CHANNELS,
            codec=options.codec,
            suffix=SUFFIX[options.codec],
            lossless=options.codec != "jpeg",
        ),
        source=report,
        listing_sha256=listing,
        paths=[photographs[i].name for i in kept],
        labels=[label[photographs[i].category] for i in kept],
        sha256s=[examined[i].sha256 for i in kept],
    )
    with storage.write(PLAN) as file:
        file.write(readable_json(plan))
    if read_class_plan(storage) != plan:  # a store without exclusive creation: the last one stands
        raise BuilderError(f"{storage.where(PLAN)}: another plan was written at the same time")
    return plan


def _examine(source: Source, jobs: int) -> tuple[list[Prepared], SourceReport]:
    """Hash and decode every photograph; the report counts what cannot be used, by reason."""
    photographs = source.photographs
    examined = [Prepared("", b"", "")] * len(photographs)
    tasks = (partial(examine, photograph, CHANNELS) for photograph in photographs)
    with (
        Progress(len(photographs), "photographs", "img") as progress,
        worker_pool(jobs) as pool,
    ):
        for i, one in results(pool, tasks):
            examined[i] = one
            progress.done(1)
    _reject_contradictions(photographs, examined)
    faults = [(photographs[i], one.fault) for i, one in enumerate(examined) if one.fault]
    return examined, count_kept(source.report, faults)


def _reject_contradictions(photographs: Sequence[Photograph], examined: list[Prepared]) -> None:
    """The same file in two classes has no label: nobody can say which of them is right."""
    copies: defaultdict[str, list[int]] = defaultdict(list)
    for i, one in enumerate(examined):
        if not one.fault:
            copies[one.sha256].append(i)
    for numbers in copies.values():
        for i in numbers:
            other = next(
                (j for j in numbers if photographs[j].category != photographs[i].category), None
            )
            if other is not None:
                fault = f"in several classes (also {photographs[other].name})"
                examined[i] = Prepared("", b"", fault)


def _write_shards(
    storage: Storage, plan: ClassPlan, root: str, jobs: int
) -> list[tuple[ShardRecord, bool]]:
    """Each shard's record, and whether this run had to write it."""
    tasks = []
    for index in range(plan.shard_count):
        first = index * plan.samples_per_shard
        members = [
            Member(
                Photograph(root, plan.paths[i], plan.classes[plan.labels[i]].category),
                plan.labels[i],
                plan.sha256s[i],
            )
            for i in plan.order[first : first + plan.samples_per_shard]
        ]
        name, licence = plan.shard(index), plan.source.licence
        tasks.append(
            partial(make_shard, storage.url, plan.sha256, name, first, plan.image, licence, members)
        )
    done: dict[int, tuple[ShardRecord, bool]] = {}
    with Progress(len(plan.paths), "samples", "img") as progress:
        for i, (record, built) in results_again(tasks, min(jobs, len(tasks)), progress.say):
            done[i] = record, built
            (progress.done if built else progress.skip)(record.samples)
    return [done[i] for i in range(len(tasks))]


def _finish(storage: Storage, plan: ClassPlan, shards: list[ShardRecord]) -> ClassSet:
    """Write the index, and remove what killed writers left half-written."""
    dataset = ClassSet(
        format="semiformula-classes",
        format_version=1,
        builder_version=plan.builder_version,
        environment=plan.environment,
        seed=plan.seed,
        samples_per_shard=plan.samples_per_shard,
        content_sha256=content_sha256(shards),
        samples=len(plan.paths),
        classes=plan.classes,
        image=plan.image,
        source=plan.source,
        shards=shards,
    )
    with storage.write(INDEX) as file:
        file.write(readable_json(dataset))
    clear_leftovers(storage, [], ("", "data", "records"))
    return dataset
