"""Where the samples of one verified shard lie, and whether they are what their format allows.

Walks a tar's headers in memory; nothing is extracted. The shard's SHA-256 has been compared, so
faults here are the builder's or a forger's: BadShard, one line with shard and key.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from trainer.dataset import BLOCK, Dataset, ImageFormat, ShardRecord
from trainer.errors import TrainerError

MAX_JSON_BYTES = 65536
MAX_HEADER_BYTES = 65536  # of an encoded image, beside what its plain pixels would take
PI_SUM_TOLERANCE = 1e-5  # SHARDS.md: float32 rounding of K weights

Bytes = bytes | mmap.mmap
Rows = npt.NDArray[np.int64]
Member = tuple[int, int]  # offset of the payload, its bytes


class BadShard(TrainerError):
    """A shard that is missing, damaged or ill-formed; others of the dataset may be good."""


def key_of(index: int) -> str:
    """The nine-digit key of a sample or a normal image."""
    return f"{index:09d}"


def index_shard(view: Bytes, dataset: Dataset, number: int, first: int) -> Rows:
    """The rows of data shard `number`, int64 [samples, 5], whose first sample is `first`.

    Columns: image start, image bytes, theta start, theta bytes, normal; offsets into the tar. A
    parameter-only shard has image bytes 0, a labelled one theta bytes 0 and the label for normal.
    Checks member names, JSON, theta and labels; raises BadShard.
    """
    shard = dataset.shards[number]
    if dataset.contents == "labels":
        return _index_labels(view, dataset, shard, first)
    if dataset.contents == "parameters":
        return _index_parameters(view, dataset, shard, first)
    return _index_images(view, dataset, shard, first)


def _index_images(view: Bytes, dataset: Dataset, shard: ShardRecord, first: int) -> Rows:
    image, length, normals = dataset.image, dataset.theta.length, dataset.normals.count
    rows: Rows = np.empty((shard.samples, 5), np.int64)
    thetas: npt.NDArray[np.float32] = np.empty((shard.samples, length), np.float32)
    for row, members in enumerate(
        members_of(view, shard, first, (image.suffix, "theta.npy", "json"))
    ):
        (start, count), theta, meta = members
        try:
            _refuse_large_image(count, image)
            payload = theta[0] + npy_payload(view, theta, "<f4", (length,), "theta.npy")
            thetas[row] = np.frombuffer(view, "<f4", length, payload)
            fields = sample_json(view, meta, first + row, _KEYS)
            normal = _normal_index(fields["normal"], normals)
        except ValueError as fault:
            raise BadShard(f"{shard.name}: {key_of(first + row)}: {fault}") from None
        rows[row] = start, count, *theta, normal
    check_thetas(thetas, dataset.theta.channels, lambda r: f"{shard.name}: {key_of(first + r)}")
    return rows


_KEYS = frozenset(("index", "normal", "category"))


def _index_parameters(view: Bytes, dataset: Dataset, shard: ShardRecord, first: int) -> Rows:
    """One sample of two members: theta.npy float32 [n, L] and normal.npy int32 [n]."""
    length, count = dataset.theta.length, shard.samples
    whole = shard.model_copy(update={"samples": 1})
    [(theta, normal)] = members_of(view, whole, first, ("theta.npy", "normal.npy"))
    where = f"{shard.name}: {key_of(first)}"
    try:
        theta_start = theta[0] + npy_payload(view, theta, "<f4", (count, length), "theta.npy")
        normal_start = normal[0] + npy_payload(view, normal, "<i4", (count,), "normal.npy")
    except ValueError as fault:
        raise BadShard(f"{where}: {fault}") from None
    thetas = np.frombuffer(view, "<f4", count * length, theta_start).reshape(count, length)
    normals = np.frombuffer(view, "<i4", count, normal_start)
    if not 0 <= normals.min() <= normals.max() < dataset.normals.count:
        row = int(np.argmax((normals < 0) | (normals >= dataset.normals.count)))
        raise BadShard(
            f"{shard.name}: {key_of(first + row)}: normal.npy names the normal {normals[row]}, "
            f"the dataset has {dataset.normals.count}"
        )
    check_thetas(thetas, dataset.theta.channels, lambda r: f"{shard.name}: {key_of(first + r)}")
    rows: Rows = np.zeros((count, 5), np.int64)
    rows[:, 2] = theta_start + 4 * length * np.arange(count)
    rows[:, 3] = 4 * length
    rows[:, 4] = normals
    return rows


def _index_labels(view: Bytes, dataset: Dataset, shard: ShardRecord, first: int) -> Rows:
    """Samples of CLASSES.md: an image, a label, and provenance that names the label's class."""
    rows: Rows = np.zeros((shard.samples, 5), np.int64)
    suffixes = (dataset.image.suffix, "cls", "json")
    for row, ((start, count), mark, meta) in enumerate(members_of(view, shard, first, suffixes)):
        try:
            _refuse_large_image(count, dataset.image)
            label = _label(view[mark[0] : mark[0] + min(mark[1], 10)], len(dataset.classes))
            fields = sample_json(view, meta, first + row, _LABELLED_KEYS)
            if fields["category"] != dataset.classes[label]:
                raise ValueError(
                    f"cls {label} is {dataset.classes[label]!r:.60}, json says "
                    f"{fields['category']!r:.60}"
                )
        except ValueError as fault:
            raise BadShard(f"{shard.name}: {key_of(first + row)}: {fault}") from None
        rows[row] = start, count, 0, 0, label
    return rows


_LABELLED_KEYS = frozenset(("index", "category", "path", "sha256", "licence"))


def _label(data: bytes, classes: int) -> int:
    """The label of a .cls member: an ASCII integer without leading zeros, below `classes`."""
    if not re.fullmatch(rb"0|[1-9][0-9]{0,8}", data) or int(data) >= classes:
        raise ValueError(f"cls is {data!r}, expected a number below {classes}")
    return int(data)


def _refuse_large_image(count: int, image: ImageFormat) -> None:
    """ValueError for more bytes than any codec needs: readers ask for them in one piece."""
    most = 4 * image.size_px**2 * image.channels + MAX_HEADER_BYTES
    if count > most:
        raise ValueError(f"image of {count} bytes, more than the {most} that its pixels may take")


def npy_payload(view: Bytes, member: Member, kind: str, shape: tuple[int, ...], name: str) -> int:
    """The bytes of an npy member before its numbers; ValueError unless it is of kind and shape."""
    start, size = member
    prefix = bytes(view[start : start + 10])
    header_bytes = 10 + (struct.unpack_from("<H", prefix, 8)[0] if len(prefix) == 10 else 0)
    fault = _npy_fault(bytes(view[start : start + min(header_bytes, size)]), kind, shape)
    expected = 4 * math.prod(shape)
    if fault is None and size != header_bytes + expected:
        fault = f"{size - header_bytes} bytes of data, expected {expected}"
    if fault is not None:
        raise ValueError(f"{name} {fault}")
    return header_bytes


@functools.lru_cache(maxsize=64)  # every sample has the same header
def _npy_fault(header: bytes, kind: str, shape: tuple[int, ...]) -> str | None:
    if header[:8] != b"\x93NUMPY\x01\x00":
        return "is not an npy file of version 1.0"
    try:
        fields = ast.literal_eval(header[10:].decode("latin-1").strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return "has a header that cannot be read"
    expected = {"descr": kind, "fortran_order": False, "shape": shape}
    return None if fields == expected else f"holds {fields!r:.200}, expected {expected}"


def check_thetas(
    thetas: npt.NDArray[np.float32], channels: int, where: Callable[[int], str]
) -> None:
    """Check the ranges of SHARDS.md for float32 [N, K(C+6)+1]; `where` names row i in errors."""
    parts = thetas[:, :-1].reshape(len(thetas), -1, channels + 6)
    signed, sigma = parts[:, :, : channels + 2], parts[:, :, channels + 2 : channels + 4]
    rho, pi, scale = parts[:, :, channels + 4], parts[:, :, channels + 5], thetas[:, -1]
    total = pi.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        rules = (
            ("every value is finite", np.isfinite(thetas).all(axis=1)),
            ("v and mu lie in [-1, 1]", (np.abs(signed) <= 1).all(axis=(1, 2))),
            ("sigma > 0", (sigma > 0).all(axis=(1, 2))),
            ("|rho| < 1", (np.abs(rho) < 1).all(axis=1)),
            ("pi >= 0 with sum 1", (pi >= 0).all(axis=1) & (np.abs(total - 1) <= PI_SUM_TOLERANCE)),
            ("s lies in [0, 1]", (scale >= 0) & (scale <= 1)),
        )
    for rule, holds in rules:
        if not holds.all():
            row = int(np.argmin(holds))
            raise BadShard(
                f"{where(row)}: theta breaks the rule that {rule}; build the dataset again"
            )


def _normal_index(key: object, count: int) -> int:
    if not (isinstance(key, str) and len(key) == 9 and key.isascii() and key.isdigit()):
        raise ValueError(f"json names the normal {key!r:.60}, expected nine digits")
    if int(key) >= count:
        raise ValueError(f"json names the normal {key}, the dataset has {count}")
    return int(key)


def sample_json(view: Bytes, member: Member, index: int, keys: frozenset[str]) -> dict[str, object]:
    """The fields of a sample's JSON; ValueError for other keys than `keys` or another index."""
    start, count = member
    try:
        if count > MAX_JSON_BYTES:
            raise ValueError(f"{count} bytes")
        fields = json.loads(view[start : start + count])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json cannot be read ({error})") from None
    if not isinstance(fields, dict) or fields.keys() != keys:
        raise ValueError(f"json must hold exactly the keys {', '.join(sorted(keys))}")
    if fields["index"] != index:
        raise ValueError(f"json says index {fields['index']!r:.60}, expected {index}")
    return fields


def members_of(
    view: Bytes, shard: ShardRecord, first: int, suffixes: tuple[str, ...]
) -> Iterator[list[Member]]:
    """Group a tar's members into samples; exactly KEY.SUFFIX in the given order, no other."""
    ends = [f".{suffix}".encode() for suffix in suffixes]
    position, end = 0, len(view)
    for index in range(first, first + shard.samples):
        key, members = b"%09d" % index, []
        for suffix in ends:
            header = view[position : position + BLOCK]
            name = key + suffix
            if header[:100].rstrip(b"\0") != name or header[156:263] != _PLAIN:
                _refuse_header(header, position, name.decode(), shard.name)
            start = position + BLOCK
            size = _size_of(header, end - start, shard.name)
            members.append((start, size))
            position = start + size + -size % BLOCK
        yield members
    header = view[position : position + BLOCK]
    if len(header) < BLOCK or any(header):
        _refuse_header(header, position, None, shard.name)


# The type of a plain file, no target of a link, and the magic.
_PLAIN = b"0" + bytes(100) + b"ustar\0"
_NO_PREFIX = bytes(155)


def _size_of(header: bytes, room: int, where: str) -> int:
    name = header[:100].rstrip(b"\0").decode("ascii", "replace")
    digits = header[124:136].rstrip(b"\0 ")
    # Larger ones are written in binary: 8 GiB and more.
    if not digits.isdigit() or digits.translate(None, b"01234567") or header[345:500] != _NO_PREFIX:
        raise BadShard(f"{where}: member {name!r} is not a plain USTAR file with a readable size")
    size = int(digits, 8)
    if not 0 < size <= room:
        raise BadShard(f"{where}: member {name!r} of {size} bytes lies outside the file")
    return size


def _refuse_header(header: bytes, position: int, expected: str | None, where: str) -> None:
    """Say what is wrong with the block where a header, or the end (None), should be."""
    if len(header) < BLOCK:
        raise BadShard(f"{where}: ends without the closing blocks of a tar at byte {position}")
    belongs = "the end" if expected is None else repr(expected)
    if not any(header):
        raise BadShard(f"{where}: ends before {belongs}, dataset.json has more samples")
    name = header[:100].rstrip(b"\0").decode("ascii", "replace")
    if name != expected:
        raise BadShard(f"{where}: found member {name!r} where {belongs} belongs")
    raise BadShard(f"{where}: member {name!r} is not a plain USTAR file")
