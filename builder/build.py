"""Plan, work, finish: from a recipe and photographs to a verified dataset folder."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from builder import __version__
from builder.artifacts import TEMPORARY, Model, atomic_file, read_json, sha256_of, write_json
from builder.errors import BuilderError
from builder.images import Prepared, decode_pixels, encode_pixels, prepare_normal
from builder.recipe import (
    SUFFIX,
    Dataset,
    ImageFormat,
    Normals,
    Recipe,
    Sha256,
    ShardRecord,
    SourceReport,
    ThetaFormat,
    content_sha256,
)
from builder.shards import (
    Sample,
    committed,
    json_bytes,
    npy_bytes,
    read_samples,
    shard_name,
    write_shard,
)
from builder.sources import Source, count_kept
from builder.workers import results, worker_pool

BATCH = 16  # samples rendered at a time: bounds a worker's memory
NORMALS_PER_SHARD = 5000
MAX_FAULTS_SHOWN = 5
LOCK = ".lock"


class Plan(Model):
    """`plan.json`: what a folder will hold; a build that differs in any of it is refused.

    `photographs_sha256` is that of the lines `sha256 category name`, one a photograph, in order.
    """

    format: Literal["semiformula-plan"]
    format_version: Literal[1]
    recipe: Recipe
    recipe_sha256: Sha256
    photographs_sha256: Sha256
    licence: str
    builder_version: str


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
    recipe: Recipe, source: Source, out: Path, *, jobs: int, allow_incomplete: bool = False
) -> Summary:
    """Build the dataset in `out`, or what is missing of it; the bytes do not depend on `jobs`.

    Raises BuilderError for faults in the source unless `allow_incomplete`, for a folder that
    belongs to another recipe or other photographs, for a folder that another build is working
    on, for a worker that was killed, and for what cannot be written.
    """
    start = time.perf_counter()
    _refuse_foreign(out, recipe)
    with _locked(out), worker_pool(jobs) as pool:
        prepared, report = _prepare(pool, recipe, source, allow_incomplete)
        plan = Plan(
            format="semiformula-plan",
            format_version=1,
            recipe=recipe,
            recipe_sha256=recipe.sha256,
            photographs_sha256=_photographs_sha256(source, prepared),
            licence=report.licence,
            builder_version=__version__,
        )
        _adopt(plan, out)
        categories = [source.photographs[i].category for i, _ in prepared]
        normals = _write_normals(out, source, report, prepared)
        del prepared
        table = _write_table(out, normals, recipe)
        prepared_at = time.perf_counter()
        work = partial(_train_shard, out, recipe, table, categories)
        names = [shard_name("train", i, recipe.shard_count) for i in range(recipe.shard_count)]
        records, built = _run_shards(pool, work, names, recipe)
        _write_index(out, recipe, normals, records)
        table.unlink()
    return Summary(
        samples=sum(record.samples for record in records),
        built=len(built),
        kept=len(records) - len(built),
        bytes=sum(record.bytes for record in [*normals.shards, *records]),
        seconds=time.perf_counter() - start,
        render_seconds=time.perf_counter() - prepared_at,
        built_samples=sum(record.samples for record in built),
        content_sha256=content_sha256([*normals.shards, *records]),
        source=report,
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder, so that two builds cannot work in it at once; a killed one lets go."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("ab")
    except OSError as error:
        raise BuilderError(f"--out {out}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BuilderError(
                f"--out {out}: another build is working here; wait for it, or choose another --out"
            ) from None
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _photographs_sha256(source: Source, prepared: list[tuple[int, Prepared]]) -> str:
    lines = [
        f"{one.sha256} {source.photographs[i].category} {source.photographs[i].name}\n"
        for i, one in prepared
    ]
    return sha256_of("".join(lines).encode())


def _prepare(
    pool: ProcessPoolExecutor, recipe: Recipe, source: Source, allow_incomplete: bool
) -> tuple[list[tuple[int, Prepared]], SourceReport]:
    """Read and resize every photograph; keep those that read, in order, and report the rest."""
    photographs = source.photographs
    tasks = [partial(prepare_normal, p.path, recipe.size_px, recipe.channels) for p in photographs]
    prepared: dict[int, Prepared] = {}
    with tqdm(total=len(tasks), desc="normals", unit="img", disable=None) as bar:
        for i, one in results(pool, tasks):
            prepared[i] = one
            bar.update()
    kept = [(i, prepared[i]) for i in range(len(tasks)) if not prepared[i].fault]
    rejected = [(p, prepared[i].fault) for i, p in enumerate(photographs) if prepared[i].fault]
    report = count_kept(source.report, rejected)
    if report.faults and not allow_incomplete:
        shown = "; ".join(report.faults[:MAX_FAULTS_SHOWN])
        more = len(report.faults) - MAX_FAULTS_SHOWN
        raise BuilderError(
            f"source {report.name}: {shown}{f'; and {more} more' if more > 0 else ''}; "
            "mend it, or go on without with --allow-incomplete"
        )
    if not kept:
        raise BuilderError(f"source {report.name}: no photograph could be read")
    return kept, report


def _refuse_foreign(out: Path, recipe: Recipe) -> None:
    """Stop before any work when `out` belongs to something else."""
    path = out / "plan.json"
    if path.exists():
        found = read_json(Plan, path)
        if found.recipe_sha256 != recipe.sha256:
            old, new = found.recipe.model_dump(), recipe.model_dump()
            key = next((key for key in new if old[key] != new[key]), "recipe_sha256")
            raise BuilderError(
                f"{out}: holds another dataset (recipe {found.recipe.name!r}: {key} = "
                f"{old.get(key, found.recipe_sha256)}, asked for {new.get(key, recipe.sha256)}); "
                "choose another --out or remove the folder"
            )
    elif out.is_dir() and any(not _is_ours(path.name) for path in out.iterdir()):
        raise BuilderError(f"{out}: not empty and not a dataset folder; choose another --out")


def _is_ours(name: str) -> bool:
    """Whether a build killed before its plan stood may have left a file of this name."""
    return name == LOCK or (name.startswith(".") and TEMPORARY in name)


def _adopt(plan: Plan, out: Path) -> None:
    """Make `out` this plan's folder; clear what a killed run left half-written."""
    path = out / "plan.json"
    if path.exists():
        found = read_json(Plan, path)
        for field, what in (
            ("builder_version", f"version {found.builder_version} of the builder"),
            ("licence", f"licence {found.licence!r}"),
            ("photographs_sha256", "other photographs, or under other names"),
        ):
            if getattr(found, field) != getattr(plan, field):
                raise BuilderError(
                    f"{out}: was begun with {what}; go on with the same, choose another --out, "
                    "or remove the folder"
                )
    for folder in ("data", "normals", "records", "."):
        for leftover in (out / folder).glob(f".*{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)
    write_json(path, plan)


def _write_normals(
    out: Path, source: Source, report: SourceReport, prepared: list[tuple[int, Prepared]]
) -> Normals:
    count = -(-len(prepared) // NORMALS_PER_SHARD)
    records = []
    for shard in range(count):
        name = shard_name("normals", shard, count)
        start = shard * NORMALS_PER_SHARD
        part = prepared[start : start + NORMALS_PER_SHARD]
        samples = (
            _normal_sample(source, report, start + j, i, one) for j, (i, one) in enumerate(part)
        )
        records.append(committed(out, name) or write_shard(out, name, samples))
    return Normals(count=len(prepared), source=report, shards=records)


def _normal_sample(
    source: Source, report: SourceReport, index: int, photograph: int, one: Prepared
) -> Sample:
    fields: dict[str, object] = {
        "index": index,
        "category": source.photographs[photograph].category,
        "path": source.photographs[photograph].name,
        "sha256": one.sha256,
        "licence": report.licence,
    }
    return Sample(f"{index:09d}", [("webp", one.webp), ("json", json_bytes(fields))])


def _write_table(out: Path, normals: Normals, recipe: Recipe) -> Path:
    """Write the normals' pixels as one array that all workers map: one copy in memory for all.

    They come from the committed shards, so that a resumed build paints on those very pixels.
    """
    path = out / "normals.npy"
    shape = (normals.count, recipe.size_px, recipe.size_px, recipe.channels)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in normals.shards:
            keys = (f"{i:09d}" for i in range(normals.count))
            for _, members in read_samples(out / shard.name, keys):
                file.write(decode_pixels(members[normals.suffix], recipe.channels).tobytes())
    return path


def _run_shards(
    pool: ProcessPoolExecutor,
    work: Callable[[int, str], tuple[bool, ShardRecord]],
    names: list[str],
    recipe: Recipe,
) -> tuple[list[ShardRecord], list[ShardRecord]]:
    """Build what is missing; return all records in order, and those built now."""
    records: dict[int, ShardRecord] = {}
    built: list[ShardRecord] = []
    tasks = [partial(work, i, name) for i, name in enumerate(names)]
    with tqdm(total=recipe.samples, desc="samples", unit="img", disable=None) as bar:
        for i, (new, record) in results(pool, tasks):
            records[i] = record
            if new:
                built.append(record)
                bar.update(record.samples)
            else:  # verified, not rendered: the rate and the time left are of what is to do
                bar.total -= record.samples
                bar.refresh()
    return [records[i] for i in range(len(names))], built


def _train_shard(
    out: Path, recipe: Recipe, table: Path, categories: list[str], index: int, name: str
) -> tuple[bool, ShardRecord]:
    """In a worker: the shard's record, and whether it had to be built."""
    record = committed(out, name)
    if record is not None:
        return False, record
    normals = np.load(table, mmap_mode="r")
    start = index * recipe.samples_per_shard
    stop = min(recipe.samples, start + recipe.samples_per_shard)
    return True, write_shard(out, name, _samples(recipe, normals, categories, start, stop))


def _samples(
    recipe: Recipe, normals: npt.NDArray[np.uint8], categories: list[str], start: int, stop: int
) -> Iterator[Sample]:
    from builder.prior import draw
    from builder.render import render

    suffix = SUFFIX[recipe.codec]
    for low in range(start, stop, BATCH):
        high = min(stop, low + BATCH)
        normal_index, theta = draw(recipe, low, high, len(normals))
        images = render(normals, normal_index, theta)
        for i in range(high - low):
            normal = int(normal_index[i])
            fields: dict[str, object] = {
                "index": low + i,
                "normal": f"{normal:09d}",
                "category": categories[normal],
            }
            members = [
                (suffix, encode_pixels(images[i], recipe.codec)),
                ("theta.npy", npy_bytes(theta[i])),
                ("json", json_bytes(fields)),
            ]
            yield Sample(f"{low + i:09d}", members)


def _write_index(out: Path, recipe: Recipe, normals: Normals, records: list[ShardRecord]) -> None:
    index = Dataset(
        format="semiformula-shards",
        format_version=1,
        builder_version=__version__,
        recipe=recipe,
        recipe_sha256=recipe.sha256,
        content_sha256=content_sha256([*normals.shards, *records]),
        samples=sum(record.samples for record in records),
        image=ImageFormat(
            size_px=recipe.size_px,
            channels=recipe.channels,
            codec=recipe.codec,
            suffix=SUFFIX[recipe.codec],
            lossless=recipe.codec != "jpeg",
        ),
        theta=ThetaFormat(
            components=recipe.components, channels=recipe.channels, length=recipe.theta_length
        ),
        normals=normals,
        shards=records,
    )
    write_json(out / "dataset.json", index)
