"""Verify a labelled dataset: every byte of it against dataset.json, plan.json and CLASSES.md."""

from __future__ import annotations

import re
import time
from collections import Counter
from functools import partial

from builder import __version__
from builder.check import ShardCheck
from builder.check_files import Findings, check_entry, check_records, check_surplus
from builder.check_image import image_fault
from builder.check_shard import Reader, check_source_json, checked, image_limit, member
from builder.classes.index import ClassPlan, ClassSet, read_class_plan, read_class_set
from builder.dataset import INDEX
from builder.errors import BuilderError
from builder.index import ImageFormat, ShardRecord
from builder.place import PLAN
from builder.progress import Progress
from builder.recipe import SUFFIX
from builder.shards import shard_name
from builder.storage import open_storage
from builder.verification import Counts, Options, Verification
from builder.verify import name_swapped, run_checks, starts

MAX_LABEL_BYTES = 9


def verify_classes(url: str, *, jobs: int) -> Verification:
    """Check everything at `url` that dataset.json names, and that there is nothing else.

    Faults are collected, not raised; BuilderError where there is no dataset.json, or a damaged
    one, and for what the storage cannot do.
    """
    start = time.perf_counter()
    storage = open_storage(url)
    dataset = read_class_set(storage)
    found = Findings()
    _check_index(found, dataset)
    try:
        plan = read_class_plan(storage)
    except BuilderError as error:
        found.add("plan", PLAN, error.message.removeprefix(f"{storage.where(PLAN)}: "))
        plan = None
    else:
        _check_plan(found, dataset, plan)
    check_surplus(found, storage, dataset.shards)
    records = check_records(found, storage, dataset.shards, plan.sha256 if plan else None)
    names = [one.category for one in dataset.classes]
    licence = dataset.source.licence
    tasks = [
        partial(check_labelled_shard, url, dataset.image, names, licence, shard, first)
        for shard, first in starts(dataset.shards)
    ]
    with Progress(dataset.samples, "samples", "img") as progress:
        checks = run_checks(tasks, jobs, progress)
    name_swapped(checks)
    for check in checks:
        found.of_shard(check)
    if not any(check.faults for check in checks):
        _check_samples(found, dataset, plan, checks)
    return Verification(
        format="semiformula-verification",
        format_version=1,
        builder_version=__version__,
        url=url,
        content_sha256=dataset.content_sha256,
        options=Options(rerender=0, rebuild=0, seed=0, jobs=jobs),
        counts=_counts(found, checks, records),
        notes=found.notes,
        faults=found.faults,
        seconds=round(time.perf_counter() - start, 3),
    )


def _check_index(found: Findings, dataset: ClassSet) -> None:
    """Check what the model does not compare: the shards' names and sizes, the image, the counts."""
    image, full = dataset.image, dataset.samples_per_shard
    if (image.suffix, image.lossless) != (SUFFIX[image.codec], image.codec != "jpeg"):
        found.add("index", INDEX, f"image.suffix or image.lossless is not that of {image.codec}")
    for i, shard in enumerate(dataset.shards):
        name = shard_name("train", i, -(-dataset.samples // full))
        check_entry(found, shard, name, min(full, dataset.samples - i * full))
    counted = [(one.category, one.kept) for one in dataset.source.categories]
    if counted != [(one.category, one.samples) for one in dataset.classes]:
        found.add("index", INDEX, "classes are not the source's categories, or not as many images")


def _check_plan(found: Findings, dataset: ClassSet, plan: ClassPlan | None) -> None:
    if plan is None:
        found.notes.append("no plan.json: records and samples are compared with dataset.json alone")
        return
    fields = ("builder_version", "environment", "seed", "samples_per_shard")
    for field in (*fields, "classes", "image", "source"):
        if getattr(plan, field) != getattr(dataset, field):
            found.add("plan", PLAN, f"{field} is not that of dataset.json; of another dataset?")


def check_labelled_shard(
    url: str, image: ImageFormat, names: list[str], licence: str, record: ShardRecord, first: int
) -> ShardCheck:
    """Length, hash, members, images' headers, labels and provenance; the first sample is `first`.

    `names` are the classes in the order of their labels.
    """

    def walk(reader: Reader, check: ShardCheck) -> None:
        for index in range(first, first + record.samples):
            key = f"{index:09d}"
            data = member(reader, check, key, image.suffix, image_limit(image.size_px))
            fault = image_fault(data, image.codec, image)
            if fault:
                check.add("image", key, fault)
            label = label_of(member(reader, check, key, "cls", MAX_LABEL_BYTES), len(names))
            category = check_source_json(reader, check, index, licence)
            if label is None:
                check.add("label", key, f"cls is no number below {len(names)}")
            elif category != names[label]:
                right = repr(names[label])
                check.add("label", key, f"cls {label} is {right:.60}, json says {category!r:.60}")
            check.samples += 1

    return checked(url, record, walk)


def label_of(data: bytes, classes: int) -> int | None:
    """The label that a `.cls` member holds, None where it holds none of so many classes."""
    if not re.fullmatch(rb"0|[1-9][0-9]{0,8}", data):
        return None
    return int(data) if int(data) < classes else None


def _check_samples(
    found: Findings, dataset: ClassSet, plan: ClassPlan | None, checks: list[ShardCheck]
) -> None:
    """Compare what all shards hold, once each is whole, with the index and the plan."""
    counts = Counter(category for check in checks for category in check.categories)
    for one in dataset.classes:
        if counts[one.category] != one.samples:
            stated = f"{one.samples} samples of class {one.category!r:.60} stated"
            found.add("index", INDEX, f"{stated}, found {counts[one.category]}")
    if plan is None:
        return
    planned = plan.lines()
    stored = [line for check in checks for line in check.photographs]
    if stored == planned:
        return
    if sorted(stored) == sorted(planned):
        found.add("plan", PLAN, f"the samples do not stand in the order of seed {plan.seed}")
    else:
        found.add("plan", PLAN, "the samples are not the photographs of the plan")


def _counts(found: Findings, checks: list[ShardCheck], records: int) -> Counts:
    missing = sum(not check.sha256 for check in checks)
    return Counts(
        data_shards=len(checks),
        normals_shards=0,
        shards_read=len(checks) - missing,
        shards_missing=missing,
        samples=sum(check.samples for check in checks),
        normals=0,
        bytes=sum(check.bytes for check in checks),
        records=records,
        redrawn=0,
        differing=0,
        rerendered=0,
        rebuilt=0,
        faults_left_out=found.left_out,
    )
