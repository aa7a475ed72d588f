"""The former reader of local datasets, until everything reads through a node. To be deleted."""

from __future__ import annotations

import functools
import itertools
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from trainer.dataset import Dataset, ShardRecord
from trainer.errors import TrainerError
from trainer.images import decode_image
from trainer.render import split_theta

BLOCK = 512  # a tar is made of blocks of 512 bytes
MAX_JSON_BYTES = 65536
PI_SUM_TOLERANCE = 1e-5  # SHARDS.md: float32 rounding of K weights

T = TypeVar("T")
Bytes = bytes | mmap.mmap
Member = tuple[str, int, int]  # name, offset of the payload, its bytes
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SampleIndex:
    """Where each sample lies; arrays of one entry a sample, int64 unless noted.

    `shard` is the position in dataset.json's list; `start` the byte offset of the image in that
    tar; `image_bytes` its length; `theta_start` and `theta_bytes` those of the npy member;
    `normal` the index of the normal image.
    """

    shard: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    image_bytes: npt.NDArray[np.int64]
    theta_start: npt.NDArray[np.int64]
    theta_bytes: npt.NDArray[np.int64]
    normal: npt.NDArray[np.int64]


def key_of(index: int) -> str:
    """The nine-digit key of a sample or a normal image."""
    return f"{index:09d}"


def index_samples(folder: Path, dataset: Dataset, wanted: range | None = None) -> SampleIndex:
    """Verify the data shards and note where their samples lie, in one read of each.

    Checks length, SHA-256, sample count, member names, and each theta and JSON. With `wanted` only
    the shards that hold those samples; the entries of all others are -1. Raises TrainerError
    naming shard and key.
    """
    parts = [
        (shard, first)
        for shard, first in _with_firsts(dataset.shards)
        if wanted is None or (first < wanted.stop and wanted.start < first + shard.samples)
    ]
    _check_counts(folder, dataset.shards, 3 * BLOCK + 4 * dataset.theta.length)

    def read(shard: ShardRecord, first: int) -> npt.NDArray[np.int64]:
        return _with_verified(folder, shard, lambda v: _index_shard(v, dataset, shard, first))

    rows = np.full((dataset.samples, 5), -1, np.int64)
    found = _in_threads(read, parts, "verifying shards")
    for (shard, first), part in zip(parts, found, strict=True):
        rows[first : first + shard.samples] = part
    number = np.repeat(np.arange(len(dataset.shards)), [s.samples for s in dataset.shards])
    return SampleIndex(number, *np.ascontiguousarray(rows.T))


def read_normals(folder: Path, dataset: Dataset) -> npt.NDArray[np.uint8]:
    """The table of normal images, uint8 [normals.count, size_px, size_px, channels].

    Row n is the image with key n. Verifies the normals shards like `index_samples`.
    """
    image, shards = dataset.image, dataset.normals.shards
    _check_counts(folder, shards, 2 * BLOCK)
    shape = (dataset.normals.count, image.size_px, image.size_px, image.channels)
    table: npt.NDArray[np.uint8] = np.empty(shape, np.uint8)

    def decode(view: Bytes, shard: ShardRecord, first: int) -> None:
        suffix = dataset.normals.suffix
        for index, members in _samples(view, shard, first, (suffix, "json")):
            where = f"{shard.name}: {key_of(index)}"
            (_, start, count), meta = members[suffix], members["json"]
            _sample_json(
                view, meta, index, ("index", "category", "path", "sha256", "licence"), where
            )
            data = bytes(view[start : start + count])
            table[index] = decode_image(data, suffix, image.size_px, image.channels, where)

    def read(shard: ShardRecord, first: int) -> None:
        _with_verified(folder, shard, lambda view: decode(view, shard, first))

    _in_threads(read, _with_firsts(shards), "reading normals")
    return table


def parse_theta(data: bytes, length: int, where: str) -> npt.NDArray[np.float32]:
    """The float32 [length] array of an npy member; TrainerError for any other dtype or shape."""
    header_bytes = struct.unpack_from("<H", data, 8)[0] if len(data) >= 10 else 0
    fault = _npy_fault(data[: 10 + header_bytes], length)
    if fault is None and len(data) != 10 + header_bytes + 4 * length:
        fault = f"{len(data) - 10 - header_bytes} bytes of data, expected {4 * length}"
    if fault is not None:
        raise TrainerError(f"{where}: theta.npy {fault}")
    return np.frombuffer(data, "<f4", offset=10 + header_bytes)


@functools.lru_cache(maxsize=64)  # every sample has the same header
def _npy_fault(header: bytes, length: int) -> str | None:
    import ast

    if header[:8] != b"\x93NUMPY\x01\x00":
        return "is not an npy file of version 1.0"
    try:
        fields = ast.literal_eval(header[10:].decode("latin-1").strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return "has a header that cannot be read"
    expected = {"descr": "<f4", "fortran_order": False, "shape": (length,)}
    return None if fields == expected else f"holds {fields}, expected {expected}"


def check_thetas(
    thetas: npt.NDArray[np.float32], channels: int, where: Callable[[int], str]
) -> None:
    """Check the ranges of SHARDS.md for float32 [N, K(C+6)+1]; `where` names row i in errors."""
    part = split_theta(torch.from_numpy(thetas), channels)
    color, mean, sigma, rho, pi, scale = (values.numpy() for values in part)
    signed = np.concatenate((color, mean), axis=2)
    total = pi.sum(axis=1, dtype=np.float64)
    for rule, holds in (
        ("every value is finite", np.isfinite(thetas).all(axis=1)),
        ("v and mu lie in [-1, 1]", (np.abs(signed) <= 1).all(axis=(1, 2))),
        ("sigma > 0", (sigma > 0).all(axis=(1, 2))),
        ("|rho| < 1", (np.abs(rho) < 1).all(axis=1)),
        ("pi >= 0 with sum 1", (pi >= 0).all(axis=1) & (np.abs(total - 1) <= PI_SUM_TOLERANCE)),
        ("s lies in [0, 1]", (scale >= 0) & (scale <= 1)),
    ):
        if not holds.all():
            row = int(np.argmin(holds))
            raise TrainerError(
                f"{where(row)}: theta breaks the rule that {rule}; build the dataset again"
            )


class ShardSamples(torch.utils.data.Dataset[Batch]):
    """Map-style view of the samples of verified shards; asked for a batch, it decodes a batch.

    `samples.__getitems__(indices)` gives images uint8 [B, size_px, size_px, C], theta float32
    [B, K(C+6)+1] and normal indices int64 [B]: three tensors for a worker to hand over, however
    large the batch. A fault comes back as a TrainerError object instead, because a worker's
    exception would reach the user as a traceback.
    """

    def __init__(self, folder: Path, dataset: Dataset, index: SampleIndex) -> None:
        self.folder = folder
        self.dataset = dataset
        self.index = index

    def __len__(self) -> int:
        return self.dataset.samples

    def __getitem__(self, index: int) -> Batch:
        return self.batch([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch | TrainerError:
        try:
            return self.batch(indices)
        except TrainerError as error:
            return error

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples of the given indices; TrainerError when one cannot be read."""
        image, length = self.dataset.image, self.dataset.theta.length
        shape = (len(indices), image.size_px, image.size_px, image.channels)
        images: npt.NDArray[np.uint8] = np.empty(shape, np.uint8)
        thetas: npt.NDArray[np.float32] = np.empty((len(indices), length), np.float32)
        for row, index in enumerate(indices):
            data, theta, where = self._read(index)
            images[row] = decode_image(data, image.suffix, image.size_px, image.channels, where)
            thetas[row] = parse_theta(theta, length, where)
        check_thetas(thetas, image.channels, lambda row: f"sample {key_of(indices[row])}")
        normals = self.index.normal[np.asarray(indices)]
        return torch.from_numpy(images), torch.from_numpy(thetas), torch.from_numpy(normals)

    def _read(self, index: int) -> tuple[bytes, bytes, str]:
        at, shard = self.index, self.dataset.shards[int(self.index.shard[index])]
        where = f"{shard.name}: {key_of(index)}"
        start, image_bytes = int(at.start[index]), int(at.image_bytes[index])
        skip, theta_bytes = int(at.theta_start[index]) - start, int(at.theta_bytes[index])
        try:
            # One open and one read a sample, both members at once: 20 us beside a decode of 1 ms,
            # and no table of open files to share between workers.
            file = os.open(self.folder / shard.name, os.O_RDONLY)
            try:
                data = os.pread(file, skip + theta_bytes, start)
            finally:
                os.close(file)
        except OSError as error:
            raise TrainerError(f"{where}: cannot be read ({error.strerror})") from None
        if len(data) != skip + theta_bytes:
            raise TrainerError(f"{where}: the shard became shorter since it was verified")
        return data[:image_bytes], data[skip:], where


def _with_firsts(shards: Sequence[ShardRecord]) -> list[tuple[ShardRecord, int]]:
    """Each shard with the index of its first sample."""
    firsts = itertools.accumulate((shard.samples for shard in shards), initial=0)
    return list(zip(shards, firsts, strict=False))


def _check_counts(folder: Path, shards: Sequence[ShardRecord], least_bytes: int) -> None:
    """Refuse counts that the files have no room for, before arrays are made of that size."""
    for shard in shards:
        path = folder / shard.name
        with _readable(path):
            found = path.stat().st_size
        if found != shard.bytes:
            raise TrainerError(
                f"{path}: {found} bytes, dataset.json says {shard.bytes}; the shard is cut or "
                "altered, copy or build it again"
            )
        if shard.samples * least_bytes > found:
            raise TrainerError(
                f"{path}: {found} bytes cannot hold the {shard.samples} samples of at least "
                f"{least_bytes} bytes that dataset.json says; build the dataset again"
            )


def _with_verified(folder: Path, shard: ShardRecord, read: Callable[[Bytes], T]) -> T:
    """Map a shard, compare its SHA-256 with its record, and hand it to `read`."""
    path = folder / shard.name
    with (
        _readable(path),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
    ):
        if sha256(view).hexdigest() != shard.sha256:
            raise TrainerError(
                f"{path}: SHA-256 differs from dataset.json; the shard is damaged, copy or build "
                "it again"
            )
        return read(view)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise TrainerError(f"{path}: no such file, but dataset.json lists it") from None
    except OSError as error:
        raise TrainerError(f"{path}: cannot be read ({error.strerror})") from None


def _index_shard(
    view: Bytes, dataset: Dataset, shard: ShardRecord, first: int
) -> npt.NDArray[np.int64]:
    """int64 [samples, 5]: start, image bytes, theta start, theta bytes, normal."""
    image, theta = dataset.image, dataset.theta
    rows: npt.NDArray[np.int64] = np.empty((shard.samples, 5), np.int64)
    thetas: npt.NDArray[np.float32] = np.empty((shard.samples, theta.length), np.float32)
    for index, members in _samples(view, shard, first, (image.suffix, "theta.npy", "json")):
        where = f"{shard.name}: {key_of(index)}"
        _, start, count = members[image.suffix]
        _, theta_start, theta_bytes = members["theta.npy"]
        data = bytes(view[theta_start : theta_start + theta_bytes])
        thetas[index - first] = parse_theta(data, theta.length, where)
        fields = _sample_json(view, members["json"], index, ("index", "normal", "category"), where)
        normal = _normal_index(fields["normal"], dataset.normals.count, where)
        rows[index - first] = start, count, theta_start, theta_bytes, normal
    check_thetas(thetas, theta.channels, lambda row: f"{shard.name}: {key_of(first + row)}")
    return rows


def _normal_index(key: object, count: int, where: str) -> int:
    if not (isinstance(key, str) and len(key) == 9 and key.isascii() and key.isdigit()):
        raise TrainerError(f"{where}: json names the normal {key!r}, expected nine digits")
    if int(key) >= count:
        raise TrainerError(f"{where}: json names the normal {key}, the dataset has {count}")
    return int(key)


def _sample_json(
    view: Bytes, member: Member, index: int, keys: tuple[str, ...], where: str
) -> dict[str, object]:
    _, start, count = member
    try:
        if count > MAX_JSON_BYTES:
            raise ValueError(f"{count} bytes")
        fields = json.loads(bytes(view[start : start + count]))
    except (ValueError, RecursionError) as error:
        raise TrainerError(f"{where}: json cannot be read ({error})") from None
    if not isinstance(fields, dict) or set(fields) != set(keys):
        raise TrainerError(f"{where}: json must hold exactly the keys {', '.join(keys)}")
    if fields["index"] != index:
        raise TrainerError(f"{where}: json says index {fields['index']!r}, expected {index}")
    return fields


def _samples(
    view: Bytes, shard: ShardRecord, first: int, suffixes: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Member]]]:
    """Group a tar's members into samples; exactly KEY.SUFFIX in the given order, no other."""
    count = 0
    members: dict[str, Member] = {}
    for name, start, size in _members(view, shard.name):
        suffix = suffixes[len(members)]
        expected = f"{key_of(first + count)}.{suffix}"
        if name != expected or count == shard.samples:
            expected = "the end" if count == shard.samples else repr(expected)
            raise TrainerError(f"{shard.name}: found member {name!r} where {expected} belongs")
        members[suffix] = (name, start, size)
        if len(members) == len(suffixes):
            yield first + count, members
            count, members = count + 1, {}
    if members or count != shard.samples:
        raise TrainerError(
            f"{shard.name}: ends after {count} samples, dataset.json says {shard.samples}"
        )


def _members(view: Bytes, where: str) -> Iterator[Member]:
    """Walk the headers of a USTAR tar; plain files within the tar's bounds only.

    The header checksums are not looked at: the SHA-256 of the whole tar has been.
    """
    position, end = 0, len(view)
    while True:
        header = bytes(view[position : position + BLOCK])
        if len(header) < BLOCK:
            raise TrainerError(
                f"{where}: ends without the closing blocks of a tar at byte {position}"
            )
        if not any(header):
            return
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        if header[257:263] != b"ustar\0" or any(header[345:500]) or header[156:157] not in b"0\0":
            raise TrainerError(f"{where}: member {name!r} is not a plain USTAR file")
        try:
            size = int(header[124:136].rstrip(b"\0 ") or b"x", 8)
        except ValueError:
            raise TrainerError(f"{where}: member {name!r} has no readable size") from None
        start = position + BLOCK
        if not 0 < size <= end - start:
            raise TrainerError(f"{where}: member {name!r} of {size} bytes lies outside the file")
        yield name, start, size
        position = start + -(-size // BLOCK) * BLOCK


def _in_threads(
    read: Callable[[ShardRecord, int], T], parts: Sequence[tuple[ShardRecord, int]], what: str
) -> list[T]:
    """Apply `read` to shards in threads (hashing and decoding release the interpreter)."""
    threads = min(8, len(os.sched_getaffinity(0)))
    total = sum(shard.bytes for shard, _ in parts)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as bar,
    ):
        results = []
        try:
            done = pool.map(lambda part: read(*part), parts)
            for (shard, _), result in zip(parts, done, strict=True):
                results.append(result)
                bar.update(shard.bytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results
