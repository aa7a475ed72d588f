"""Read a finished dataset: its index, its normals' provenance, and the stored parameters."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.artifacts import parse_json
from builder.errors import BuilderError
from builder.images import decode_pixels
from builder.index import Dataset, Normals, ShardRecord
from builder.shards import fault_of, read_samples
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
            found[int(key)] = decode_pixels(members[normals.suffix], channels)
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
    samples = list(read_samples(storage, record.name))
    try:
        if dataset.contents == "parameters":
            [(_, members)] = samples
            theta, normal = _npy(members["theta.npy"]), _npy(members["normal.npy"])
        else:
            theta = np.stack([_npy(members["theta.npy"]) for _, members in samples])
            normal = np.array([int(json.loads(m["json"])["normal"]) for _, m in samples])
    except (KeyError, ValueError, TypeError) as error:
        raise BuilderError(f"{storage.where(record.name)}: not a data shard ({error})") from None
    if theta.dtype != np.float32 or theta.shape != (record.samples, length):
        raise BuilderError(
            f"{storage.where(record.name)}: theta is {theta.dtype} {list(theta.shape)}, "
            f"expected float32 {[record.samples, length]}"
        )
    if normal.shape != (len(theta),) or not 0 <= normal.min() <= normal.max() < (
        dataset.normals.count
    ):
        raise BuilderError(f"{storage.where(record.name)}: names normals that are not there")
    return normal.astype(np.int64), theta


def _npy(data: bytes) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array
