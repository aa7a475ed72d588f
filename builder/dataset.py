"""Read a finished dataset: its index, its normals' provenance, and the stored parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.artifacts import parse_json
from builder.errors import BuilderError
from builder.images import UNDECODABLE, decode_pixels
from builder.index import Dataset, Normals, ShardRecord
from builder.shards import fault_of, npy_head, read_samples
from builder.storage import Storage

INDEX = "dataset.json"
MAX_INDEX_BYTES = 2**30


def read_index(storage: Storage) -> Dataset:
    """`dataset.json`, checked. Raises BuilderError when it is missing, damaged or contradictory."""
    where = storage.where(INDEX)
    try:
        data = storage.read(INDEX, MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise BuilderError(
            f"{where}: no such file; finish the dataset with `builder finish {storage.url}`"
        ) from None
    return parse_json(Dataset, data, where)


def verified_samples(
    storage: Storage, shard: ShardRecord, keys: Iterable[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The wanted samples (None: all) of a shard, once its length and hash are those recorded."""
    fault = fault_of(storage, shard)
    if fault:
        raise BuilderError(
            f"{storage.where(shard.name)}: {fault}; run the build command again to mend it"
        )
    yield from read_samples(storage, shard.name, keys)


def read_normals(
    storage: Storage, normals: Normals, channels: int, wanted: set[int]
) -> dict[int, npt.NDArray[np.uint8]]:
    """The pixels, uint8 [H, W, C], of the wanted normal images."""
    found: dict[int, npt.NDArray[np.uint8]] = {}
    start = 0
    for shard in normals.shards:
        keys = {f"{i:09d}" for i in wanted if start <= i < start + shard.samples}
        start += shard.samples
        for key, members in verified_samples(storage, shard, keys) if keys else ():
            try:
                found[int(key)] = decode_pixels(members[normals.suffix], channels)
            except (*UNDECODABLE, KeyError) as error:
                line = f"{error}".replace("\n", " ")
                where = storage.where(shard.name)
                raise BuilderError(f"{where}: normal {key}: cannot be decoded ({line})") from None
    if len({pixels.shape for pixels in found.values()}) > 1:
        raise BuilderError(f"{storage.url}: the normals are of several sizes; see builder verify")
    return found


def normals_of(storage: Storage, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Each normal image's provenance in order: index, category, path, sha256, licence."""
    for shard in dataset.normals.shards:
        for _, members in read_samples(storage, shard.name):
            yield json.loads(members["json"])


def read_parameters(
    storage: Storage, dataset: Dataset, shard: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """One data shard's stored choice of normals, int64 [n], and theta, float32 [n, L].

    Raises BuilderError when these are not what the index promises.
    """
    record, length = dataset.shards[shard], dataset.theta.length
    count, samples = record.samples, list(read_samples(storage, record.name))
    try:
        if dataset.contents == "parameters":
            [(_, members)] = samples
            theta = _npy(members, "theta.npy", "<f4", (count, length))
            normal = _npy(members, "normal.npy", "<i4", (count,))
        elif len(samples) != count:
            raise ValueError(f"{len(samples)} samples, expected {count}")
        else:
            theta = np.stack([_npy(m, "theta.npy", "<f4", (length,)) for _, m in samples])
            normal = np.array([_normal(members["json"]) for _, members in samples])
    except KeyError as error:
        raise BuilderError(f"{storage.where(record.name)}: a sample without {error}") from None
    except ValueError as error:
        raise BuilderError(f"{storage.where(record.name)}: {error}") from None
    if not 0 <= normal.min() <= normal.max() < dataset.normals.count:
        raise BuilderError(f"{storage.where(record.name)}: names normals that are not there")
    return normal.astype(np.int64), theta.astype(np.float32, copy=False)


def _npy(
    members: dict[str, bytes], name: str, kind: str, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """The array of a member that is one of ours to the last byte; ValueError for any other."""
    head, data = npy_head(kind, shape), members[name]
    if not data.startswith(head) or len(data) != len(head) + 4 * math.prod(shape):
        raise ValueError(f"{name} is not {kind} {list(shape)} in npy version 1.0")
    return np.frombuffer(data, kind, offset=len(head)).reshape(shape)


def _normal(data: bytes) -> int:
    """The number of the normal that a sample's JSON names; ValueError where it names none."""
    try:
        name = json.loads(data)["normal"]
    except (KeyError, TypeError, ValueError, RecursionError):
        name = None
    if not isinstance(name, str) or not re.fullmatch(r"[0-9]{9}", name):
        raise ValueError(f"normal: expected nine digits, found {name!r:.60}")
    return int(name)
