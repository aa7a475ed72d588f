"""Opens the shards of a dataset, local or remote, each verified against dataset.json."""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from trainer.cache import Cache
from trainer.dataset import Dataset, ShardRecord
from trainer.errors import TrainerError
from trainer.images import decode_image
from trainer.index import BadShard, key_of, members_of, sample_json
from trainer.storage import Storage, open_plain
from trainer.verified import Stamp, Verified, hash_of, stamp_of

_NORMAL_KEYS = frozenset(("index", "category", "path", "sha256", "licence"))


def open_shard(
    storage: Storage,
    cache: Cache,
    record: ShardRecord,
    next_uses: Callable[[], Sequence[str]] = tuple,
) -> Verified:
    """Open a shard whose length and SHA-256 are those of dataset.json, now.

    A local one is read in place; others through the cache (see `Cache.get`). Raises BadShard naming
    the shard.
    """
    if storage.local is None:
        return cache.get(storage, record, next_uses)
    path = storage.local / record.name
    try:
        file = open_plain(path)
    except FileNotFoundError:
        raise BadShard(f"{path}: no such file, but dataset.json lists it") from None
    except OSError as error:
        raise BadShard(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return Verified(file, _verify(file, path, record, cache))
    except BaseException:
        file.close()
        raise


def _verify(file: BinaryIO, path: Path, record: ShardRecord, cache: Cache) -> Stamp:
    try:
        about = os.fstat(file.fileno())
        if about.st_size != record.bytes:
            raise BadShard(
                f"{path}: {about.st_size} bytes, dataset.json says {record.bytes}; the shard is "
                "cut or altered, copy or build it again"
            )
        if hash_of(file, cache.counters) != record.sha256:
            raise BadShard(
                f"{path}: SHA-256 differs from dataset.json; the shard is damaged, copy or build "
                "it again"
            )
        return stamp_of(about)
    except OSError as error:
        raise BadShard(f"{path}: cannot be read ({error.strerror})") from None


def first_samples(shards: Sequence[ShardRecord]) -> list[int]:
    """The index of each shard's first sample, and of the first behind them all."""
    return list(itertools.accumulate((shard.samples for shard in shards), initial=0))


def read_normals(storage: Storage, cache: Cache, dataset: Dataset) -> npt.NDArray[np.uint8]:
    """The table of normal images, uint8 [normals.count, size_px, size_px, channels].

    Row n is the image with key n. Raises BadShard, and TrainerError for an image that cannot be
    decoded, in one line with shard and key.
    """
    image, shards = dataset.image, dataset.normals.shards
    shape = (dataset.normals.count, image.size_px, image.size_px, image.channels)
    try:
        table: npt.NDArray[np.uint8] = np.empty(shape, np.uint8)
    except MemoryError:
        raise TrainerError(
            f"{storage.where('dataset.json')}: {shape[0]} normal images of {image.size_px} px take "
            f"{math.prod(shape)} bytes, more memory than there is; train on a dataset of fewer"
        ) from None

    def read(shard: ShardRecord, first: int) -> None:
        with (
            open_shard(storage, cache, shard) as opened,
            mmap.mmap(opened.file.fileno(), 0, access=mmap.ACCESS_READ) as view,
        ):
            _decode_normals(view, dataset, shard, first, table)
            if stamp_of(os.fstat(opened.file.fileno())) != opened.stamp:
                raise BadShard(f"{storage.where(shard.name)}: was changed while it was read")

    threads = min(8, len(os.sched_getaffinity(0)))
    total = sum(shard.bytes for shard in shards)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc="reading normals", unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            for shard, _ in zip(shards, pool.map(read, shards, first_samples(shards)), strict=True):
                bar.update(shard.bytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return table


def _decode_normals(
    view: mmap.mmap, dataset: Dataset, shard: ShardRecord, first: int, table: npt.NDArray[np.uint8]
) -> None:
    image, suffix = dataset.image, dataset.normals.suffix
    for index, ((start, count), meta) in enumerate(
        members_of(view, shard, first, (suffix, "json")), start=first
    ):
        where = f"{shard.name}: {key_of(index)}"
        try:
            sample_json(view, meta, index, _NORMAL_KEYS)
        except ValueError as fault:
            raise BadShard(f"{where}: {fault}") from None
        data = view[start : start + count]
        table[index] = decode_image(data, suffix, image.size_px, image.channels, where)
