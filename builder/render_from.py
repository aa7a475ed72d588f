"""Paint the images of a stored parameter dataset: what `builder build` would have written."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np

from builder import __version__
from builder.artifacts import parse_model, sha256_of
from builder.build import Summary, carry_out
from builder.dataset import normals_of, read_index, read_normals
from builder.environment import Golden, golden_indices, make_goldens
from builder.errors import BuilderError
from builder.index import Dataset, ShardRecord
from builder.plan import Plan, adopt_normals, standing_plan
from builder.progress import Progress
from builder.recipe import Codec, Recipe
from builder.render import render
from builder.shards import fault_of
from builder.storage import Storage, open_storage
from builder.stored import stored_parameters
from builder.work import Engine, local_engine

PIECE_BYTES = 2**20


def render_from(
    source: str,
    out: str,
    *,
    jobs: int,
    codec: Codec | None = None,
    engine: Engine | None = None,
) -> Summary:
    """Paint the images of the dataset at `source` at `out`, or what is missing of them.

    The result is that of `builder build` with the same recipe and photographs, to the last byte,
    unless stored parameters were edited: these are painted as they are. Raises BuilderError for
    an unfinished or damaged source, and for an `out` that holds something else.
    """
    start = time.perf_counter()
    storage = open_storage(out)
    plan = plan_render(source, storage, codec)
    return carry_out(plan, out, engine or local_engine(jobs), start)


def plan_render(source: str, storage: Storage, codec: Codec | None = None) -> Plan:
    """Copy the normals of the dataset at `source`, and write the plan that renders its parameters.

    Another `codec` than the recipe's gives the dataset of the recipe with that codec: no parameter
    depends on it. A plan that stands already and asks for the same is kept.
    """
    origin = _absolute(source)
    given = open_storage(origin)
    dataset = read_index(given)
    recipe = dataset.recipe
    if codec is not None:
        recipe = parse_model(Recipe, {**recipe.model_dump(), "codec": codec}, f"--codec {codec}")
    standing = standing_plan(storage, recipe, "images")
    if standing is not None:
        _refuse_changed(storage, standing, origin, dataset)
    with Progress(dataset.normals.count, "normals", "img") as progress:
        for shard in dataset.normals.shards:
            _copy(given, storage, shard)
            progress.done(shard.samples)
    if standing is not None:
        return standing
    return adopt_normals(
        storage,
        recipe,
        "images",
        dataset.normals,
        _photographs_sha256(storage, dataset),
        goldens=_goldens(storage, recipe, dataset, origin),
        parameters_from=origin,
        parameters_sha256=dataset.content_sha256,
    )


def _absolute(source: str) -> str:
    """The source as every worker can name it, whatever its working folder."""
    if "://" in source and not source.startswith("file://"):
        return source.rstrip("/")
    return str(Path(source.removeprefix("file://")).absolute())


def _refuse_changed(storage: Storage, standing: Plan, origin: str, dataset: Dataset) -> None:
    of = standing.parameters_from
    for what, old, new in (
        ("version {} of the builder", standing.builder_version, __version__),
        ("the parameters of {}" if of else "parameters drawn from the recipe", of, origin),
        ("the parameters of dataset {:.16}", standing.parameters_sha256, dataset.content_sha256),
    ):
        if old != new:
            raise BuilderError(
                f"{storage.url}: was begun with {what.format(old)}; go on with the same, choose "
                "another --out, or remove the folder"
            )


def _copy(source: Storage, target: Storage, shard: ShardRecord) -> None:
    """Copy a shard unless it stands; nothing appears unless its bytes are the recorded ones."""
    if target.size(shard.name) == shard.bytes and not fault_of(target, shard):
        return
    try:
        with source.open(shard.name) as file, target.write(shard.name) as copy:
            digest, size = hashlib.sha256(), 0
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                size += copy.write(piece)
            if (size, digest.hexdigest()) != (shard.bytes, shard.sha256):
                raise BuilderError(
                    f"{source.where(shard.name)}: not the bytes that dataset.json records; see "
                    f"builder verify {source.url}"
                )
    except FileNotFoundError:
        raise BuilderError(f"{source.where(shard.name)}: no such file") from None


def _photographs_sha256(storage: Storage, dataset: Dataset) -> str:
    """What a direct build's plan states of its photographs, from the normals' provenance."""
    try:
        lines = [
            f"{n['sha256']} {n['category']} {n['path']}\n" for n in normals_of(storage, dataset)
        ]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BuilderError(f"{storage.url}: normals without their provenance ({error})") from None
    return sha256_of("".join(lines).encode())


def _goldens(storage: Storage, recipe: Recipe, dataset: Dataset, origin: str) -> list[Golden]:
    indices = golden_indices(recipe)
    stored = [stored_parameters(origin, dataset.content_sha256, range(i, i + 1)) for i in indices]
    chosen = np.concatenate([normal for normal, _ in stored])
    theta = np.concatenate([one for _, one in stored])
    pixels = read_normals(storage, dataset.normals, recipe.channels, set(chosen.tolist()))
    table = np.stack([pixels[number] for number in chosen.tolist()])
    return make_goldens(recipe, indices, theta, render(table, np.arange(len(table)), theta))
