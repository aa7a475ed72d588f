"""Read a finished dataset: its index, its normals' provenance, and the stored parameters."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.artifacts import parse_json
from builder.errors import BuilderError
from builder.index import Dataset
from builder.shards import read_samples
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
