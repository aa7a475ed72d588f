"""Build = plan + work + finish on one machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from builder.estimate import estimate, refuse_small_disk
from builder.index import Contents, SourceReport
from builder.plan import Plan, make_plan
from builder.recipe import Recipe
from builder.sources import Source
from builder.status import finish, survey
from builder.storage import Folder, open_storage
from builder.work import Engine, local_engine, work


@dataclass(frozen=True)
class Summary:
    """What a build did; `built` + `kept` shards make up the dataset."""

    samples: int
    built: int
    kept: int
    bytes: int
    seconds: float
    render_seconds: float
    built_samples: int
    content_sha256: str
    source: SourceReport


def build(
    recipe: Recipe,
    source: Source,
    out: str | Path,
    *,
    jobs: int,
    contents: Contents = "images",
    allow_incomplete: bool = False,
    engine: Engine | None = None,
) -> Summary:
    """Build the dataset at `out` (a folder or URL), or what is missing of it.

    The bytes do not depend on `jobs`.

    Raises BuilderError for faults in the source unless `allow_incomplete`, for a place that
    belongs to another recipe or other photographs, for a worker killed twice, and for what cannot
    be written.
    """
    start = time.perf_counter()
    url = str(out)
    storage = open_storage(url)
    plan = make_plan(
        storage, recipe, source, contents=contents, jobs=jobs, allow_incomplete=allow_incomplete
    )
    return carry_out(plan, url, engine or local_engine(jobs), start)


def carry_out(plan: Plan, url: str, engine: Engine, start: float) -> Summary:
    """Work and finish a plan that stands at `url`; `start` is the perf_counter of the run."""
    storage = open_storage(url)
    present = int(survey(storage).rows["bytes"].sum())
    refuse_small_disk(storage, estimate(storage, plan), present)
    # Shards that stand are hashed where that is a read of the disk, not of the network.
    done = work(url, "0/1", engine, deep=isinstance(storage, Folder))
    head = finish(storage)
    standing = survey(storage).rows["bytes"].sum()
    return Summary(
        samples=head.samples,
        built=done.built,
        kept=done.kept,
        bytes=int(standing) + sum(shard.bytes for shard in plan.normals.shards),
        seconds=time.perf_counter() - start,
        render_seconds=done.seconds,
        built_samples=done.built_samples,
        content_sha256=head.content_sha256,
        source=plan.normals.source,
    )
