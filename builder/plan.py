"""The plan: what a dataset will hold, written before any of it; every machine works from it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryFile, gettempdir
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from builder import __version__
from builder.artifacts import Model, parse_json, readable_json, sha256_of
from builder.dataset import read_normals
from builder.environment import Golden, golden_indices, make_goldens, this_environment
from builder.errors import BuilderError
from builder.index import Contents, Environment, Normals, ShardRecord, SourceReport
from builder.place import PLAN, alone, refuse_foreign
from builder.prior import draw
from builder.progress import Progress
from builder.recipe import Recipe, Sha256
from builder.rejects import count_kept, refuse_faults
from builder.shards import (
    KIND,
    Sample,
    fault_of,
    json_bytes,
    shard_name,
    write_shard,
)
from builder.sources import Source, prepare
from builder.storage import Storage
from builder.workers import results, worker_pool

NORMALS_PER_SHARD = 5000


class Plan(Model):
    """`plan.json`: what a folder will hold; work for any other plan is refused.

    `photographs_sha256` is that of the lines `sha256 category name`, one a photograph, in order.
    `parameters_from` names the dataset whose stored parameters are rendered, `parameters_sha256`
    is its content_sha256; null draws them.
    """

    format: Literal["semiformula-plan"]
    format_version: Literal[2]
    builder_version: str
    recipe: Recipe
    recipe_sha256: Sha256
    contents: Contents
    parameters_from: str | None = None
    parameters_sha256: Sha256 | None = None
    shard_count: int = Field(ge=1)
    photographs_sha256: Sha256
    normals: Normals
    environment: Environment
    goldens: list[Golden]

    @property
    def sha256(self) -> str:
        """What a commit record refers to: the hash of the fields that the file has.

        A field that a later version adds with a default changes no plan that stands.
        """
        fields = self.model_dump(mode="json", exclude_unset=True)
        return sha256_of(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())

    def shard(self, index: int) -> str:
        """The name of data shard `index`."""
        return shard_name(KIND[self.contents], index, self.shard_count)

    def samples_of(self, index: int) -> range:
        """The samples of data shard `index`."""
        start = index * self.recipe.samples_per_shard
        return range(start, min(self.recipe.samples, start + self.recipe.samples_per_shard))


def read_plan(storage: Storage) -> Plan:
    """The plan at a storage's root; BuilderError when there is none, or it is damaged."""
    where = storage.where(PLAN)
    try:
        data = storage.read(PLAN)
    except FileNotFoundError:
        raise BuilderError(
            f"{where}: no such file; plan first with `builder plan RECIPE --out {storage.url}`"
        ) from None
    plan = parse_json(Plan, data, where)
    for what, stated, counted in (
        ("shard_count", plan.shard_count, plan.recipe.shard_count),
        ("recipe_sha256", plan.recipe_sha256, plan.recipe.sha256),
        ("goldens", [golden.index for golden in plan.goldens], golden_indices(plan.recipe)),
    ):
        if stated != counted:
            raise BuilderError(f"{where}: {what} is {stated}, but the rest of it says {counted}")
    return plan


def make_plan(
    storage: Storage,
    recipe: Recipe,
    source: Source,
    *,
    contents: Contents = "images",
    jobs: int,
    allow_incomplete: bool = False,
) -> Plan:
    """Prepare the normals, write their shards, prove the goldens, write the plan.

    A plan that stands already and asks for the same is kept, with its environment. Raises
    BuilderError for faults in the source unless `allow_incomplete`, and for a place that holds
    another dataset or something else.
    """
    standing_plan(storage, recipe, contents)  # refuse what is not ours before writing to it
    with alone(storage), _spool() as spool, worker_pool(jobs) as pool:
        standing = standing_plan(storage, recipe, contents)
        prepared, report = _prepare(pool, recipe, source, allow_incomplete, spool)
        lines = [
            f"{one.sha256} {source.photographs[one.photograph].category} "
            f"{source.photographs[one.photograph].name}\n"
            for one in prepared
        ]
        photographs_sha256 = sha256_of("".join(lines).encode())
        if standing is not None:
            _refuse_changed(storage, standing, photographs_sha256, report.licence)
        normals = _write_normals(storage, source, report, prepared, spool, standing)
        if standing is not None:
            return standing
        return adopt_normals(storage, recipe, contents, normals, photographs_sha256)


@contextmanager
def _spool() -> Iterator[IO[bytes]]:
    """A temporary file for the prepared normals, which may be more than memory holds."""
    try:
        with TemporaryFile() as file:
            yield file
    except OSError as error:
        raise BuilderError(
            f"temporary folder {gettempdir()}: {error.strerror}; free space or set TMPDIR to "
            "another disk, and run the same command again"
        ) from None


def adopt_normals(
    storage: Storage,
    recipe: Recipe,
    contents: Contents,
    normals: Normals,
    photographs_sha256: str,
    goldens: list[Golden] | None = None,
    parameters_from: str | None = None,
    parameters_sha256: str | None = None,
) -> Plan:
    """Write the plan for normals whose shards are stored; the goldens are made from these."""
    plan = Plan(
        format="semiformula-plan",
        format_version=2,
        builder_version=__version__,
        recipe=recipe,
        recipe_sha256=recipe.sha256,
        contents=contents,
        parameters_from=parameters_from,
        parameters_sha256=parameters_sha256,
        shard_count=recipe.shard_count,
        photographs_sha256=photographs_sha256,
        normals=normals,
        environment=this_environment(),
        goldens=goldens or _goldens(storage, recipe, normals),
    )
    standing_plan(storage, recipe, contents)  # another planner may have been faster
    with storage.write(PLAN) as file:
        file.write(readable_json(plan))
    written = read_plan(storage)
    if written != plan:  # a store without exclusive creation: the last writer stands
        raise BuilderError(f"{storage.where(PLAN)}: another plan was written at the same time")
    return written


def standing_plan(storage: Storage, recipe: Recipe, contents: Contents) -> Plan | None:
    """The plan that stands; stop before any work when the place belongs to something else."""
    if storage.exists(PLAN):
        found = read_plan(storage)
        wanted = {**recipe.model_dump(), "contents": contents}
        old = {**found.recipe.model_dump(), "contents": found.contents}
        key = next((key for key in wanted if old[key] != wanted[key]), None)
        if key is not None:
            raise BuilderError(
                f"{storage.url}: holds another dataset (recipe {found.recipe.name!r}: {key} = "
                f"{old[key]}, asked for {wanted[key]}); choose another --out or remove it"
            )
        return found
    # Killed before its plan stood, a run leaves normals and temporary files, nothing else.
    refuse_foreign(storage, {"normals"})
    return None


def _refuse_changed(
    storage: Storage, standing: Plan, photographs_sha256: str, licence: str
) -> None:
    old_licence = standing.normals.source.licence
    for what, old, new in (
        (
            f"version {standing.builder_version} of the builder",
            standing.builder_version,
            __version__,
        ),
        (f"licence {old_licence!r}", old_licence, licence),
        (f"the parameters of {standing.parameters_from}", standing.parameters_from, None),
        (
            "other photographs, or under other names",
            standing.photographs_sha256,
            photographs_sha256,
        ),
    ):
        if old != new:
            raise BuilderError(
                f"{storage.url}: was begun with {what}; go on with the same, choose another "
                "--out, or remove the folder"
            )


@dataclass(frozen=True)
class _Normal:
    """A prepared photograph: its number in the source, its hash, where its WebP is spooled."""

    photograph: int
    sha256: str
    offset: int
    bytes: int


def _prepare(
    pool: ProcessPoolExecutor,
    recipe: Recipe,
    source: Source,
    allow_incomplete: bool,
    spool: IO[bytes],
) -> tuple[list[_Normal], SourceReport]:
    """Read and resize every photograph; keep those that read, in order, and report the rest."""
    photographs = source.photographs
    tasks = (partial(prepare, p, recipe.size_px, recipe.channels) for p in photographs)
    kept: dict[int, _Normal] = {}
    rejected: dict[int, str] = {}
    with Progress(len(photographs), "normals", "img") as progress:
        for i, one in results(pool, tasks):
            if one.fault:
                rejected[i] = one.fault
            else:
                kept[i] = _Normal(i, one.sha256, spool.tell(), spool.write(one.encoded))
            progress.done(1)
    report = count_kept(source.report, [(photographs[i], rejected[i]) for i in sorted(rejected)])
    refuse_faults(report, allow_incomplete)
    if not kept:
        raise BuilderError(f"source {report.name}: no photograph could be read")
    return [kept[i] for i in sorted(kept)], report


def _write_normals(
    storage: Storage,
    source: Source,
    report: SourceReport,
    prepared: Sequence[_Normal],
    spool: IO[bytes],
    standing: Plan | None,
) -> Normals:
    """Write the normals' shards; those that a standing plan names are written only if damaged."""
    count = -(-len(prepared) // NORMALS_PER_SHARD)
    records: list[ShardRecord] = []
    for shard in range(count):
        planned = standing.normals.shards[shard] if standing is not None else None
        if planned is not None and not fault_of(storage, planned):
            records.append(planned)
            continue
        name, start = shard_name("normals", shard, count), shard * NORMALS_PER_SHARD
        part = prepared[start : start + NORMALS_PER_SHARD]
        samples = (
            _normal_sample(source, report, start + j, one, spool) for j, one in enumerate(part)
        )
        record = write_shard(storage, name, samples)
        if planned is not None and record != planned:
            raise BuilderError(
                f"{storage.where(name)}: was damaged, and this machine's Pillow does not make its "
                "bytes again; use the version that plan.json states"
            )
        records.append(record)
    return Normals(count=len(prepared), source=report, shards=records)


def _normal_sample(
    source: Source, report: SourceReport, index: int, one: _Normal, spool: IO[bytes]
) -> Sample:
    photograph = source.photographs[one.photograph]
    fields: dict[str, object] = {
        "index": index,
        "category": photograph.category,
        "path": photograph.name,
        "sha256": one.sha256,
        "licence": report.licence,
    }
    spool.seek(one.offset)
    webp = spool.read(one.bytes)
    return Sample(f"{index:09d}", [("webp", webp), ("json", json_bytes(fields))])


def _goldens(storage: Storage, recipe: Recipe, normals: Normals) -> list[Golden]:
    indices = golden_indices(recipe)
    theta, images, _ = render_some(storage, recipe, normals, indices)
    return make_goldens(recipe, indices, theta, images)


def render_some(
    storage: Storage, recipe: Recipe, normals: Normals, indices: Sequence[int]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], float]:
    """Draw and render a few samples, decoding only the normals that they need.

    Returns theta [N, L], images uint8 [N, H, W, C], and the seconds that rendering took.
    """
    from builder.render import render

    drawn = [draw(recipe, i, i + 1, normals.count) for i in indices]
    chosen = np.concatenate([normal for normal, _ in drawn])
    theta = np.concatenate([one for _, one in drawn])
    pixels = read_normals(storage, normals, recipe.channels, {int(i) for i in chosen})
    table = np.stack([pixels[int(i)] for i in chosen])
    render(table[:1], np.zeros(1, np.int64), theta[:1])  # compiles, outside the measured time
    start = time.process_time()
    images = render(table, np.arange(len(table)), theta)
    return theta, images, time.process_time() - start
