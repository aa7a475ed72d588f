"""The parameters of another dataset, for a plan that renders these instead of drawing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from builder.dataset import read_index, read_parameters
from builder.errors import BuilderError
from builder.index import Dataset
from builder.render import check_theta
from builder.shards import fault_of
from builder.storage import open_storage

Parameters = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def stored_parameters(url: str, content_sha256: str, samples: range) -> Parameters:
    """The choice of normals, int64 [n], and theta, float32 [n, L], of consecutive samples.

    The samples lie in one data shard of the dataset at `url`. Raises BuilderError when that is no
    longer the dataset of this hash, or is damaged.
    """
    per_shard = _index(url, content_sha256).recipe.samples_per_shard
    number = samples.start // per_shard
    normal, theta = _shard(url, content_sha256, number)
    part = slice(samples.start - number * per_shard, samples.stop - number * per_shard)
    assert 0 <= part.start < part.stop <= len(theta)
    return normal[part], theta[part]


@lru_cache(maxsize=1)
def _index(url: str, content_sha256: str) -> Dataset:
    storage = open_storage(url)
    dataset = read_index(storage)
    if dataset.content_sha256 != content_sha256:
        raise BuilderError(
            f"{url}: was dataset {content_sha256[:16]} when this was planned, is "
            f"{dataset.content_sha256[:16]} now; render from the new one into another --out"
        )
    return dataset


@lru_cache(maxsize=1)
def _shard(url: str, content_sha256: str, number: int) -> Parameters:
    storage, dataset = open_storage(url), _index(url, content_sha256)
    record = dataset.shards[number]
    fault = fault_of(storage, record)
    if fault:
        raise BuilderError(f"{storage.where(record.name)}: {fault}; see builder verify {url}")
    normal, theta = read_parameters(storage, dataset, number)
    try:
        check_theta(theta, dataset.theta.channels)
    except BuilderError as error:
        raise BuilderError(f"{storage.where(record.name)}: {error.message}") from None
    return normal, theta
