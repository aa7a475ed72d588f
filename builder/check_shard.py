"""Check one stored shard against dataset.json and SHARDS.md, in one read of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import IO

import numpy as np
import numpy.typing as npt

from builder.check import DataTask, ShardCheck
from builder.check_image import image_fault
from builder.check_parameters import Stored, check_choice, check_vectors, paint_again
from builder.errors import BuilderError
from builder.index import DatasetHead, ShardRecord
from builder.shards import json_bytes
from builder.storage import Folder, open_storage
from builder.tar import BLOCK, END, check_header

ROWS = 1024  # samples whose vectors are checked together
PIECE_BYTES = 2**20
MAX_JSON_MEMBER_BYTES = 2**16
MAX_PROFILE_BYTES = 2**24  # a colour profile that came with a photograph


class Cannot(Exception):
    """The walk through a damaged tar ends here; the fault is noted already."""


class Reader:
    """Reads a shard once, front to back, and hashes every byte that it hands out."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def take(self, count: int) -> bytes:
        """The next bytes, fewer where the file ends."""
        data = self._file.read(count)
        self._digest.update(data)
        return data

    def rest(self) -> str:
        """Hash what is left; the SHA-256 of the whole file."""
        while self.take(PIECE_BYTES):
            pass
        return self._digest.hexdigest()


def check_data_shard(task: DataTask) -> ShardCheck:
    """Length, hash, members, images' headers, parameters; paint again what is asked for."""
    walk = _walk_images if task.head.contents == "images" else _walk_packed
    return checked(task.url, task.record, lambda reader, check: walk(reader, check, task))


def check_normals_shard(url: str, head: DatasetHead, record: ShardRecord, start: int) -> ShardCheck:
    """Length, hash, members, images' headers and provenance of normals, the first is `start`."""
    return checked(
        url, record, lambda reader, check: _walk_normals(reader, check, head, record, start)
    )


def checked(
    url: str, record: ShardRecord, walk: Callable[[Reader, ShardCheck], None]
) -> ShardCheck:
    """Length, hash, and the archive's end of a shard whose members `walk` reads."""
    check = ShardCheck(record)
    storage = open_storage(url)
    try:
        with storage.open(record.name) as file:
            check.bytes = file.seek(0, 2)
            file.seek(0)
            if check.bytes != record.bytes:
                check.add("length", "", f"expected {record.bytes} bytes, found {check.bytes}")
            reader = Reader(file)
            try:
                walk(reader, check)
                _check_end(reader, check)
            except Cannot:
                pass
            check.sha256 = reader.rest()
    except FileNotFoundError:
        check.add("missing", "", "the file is missing")
        return check
    except OSError as error:
        check.add("unreadable", "", f"cannot be read ({error.strerror or error})")
        return check
    except BuilderError as error:
        if not isinstance(storage, Folder):  # a service that is away is no fault of the dataset
            raise
        check.add("unreadable", "", error.message)
        return check
    if check.sha256 != record.sha256 and check.bytes == record.bytes:
        check.add("sha256", "", f"SHA-256 expected {record.sha256}, found {check.sha256}")
    return check


def _check_end(reader: Reader, check: ShardCheck) -> None:
    tail = reader.take(len(END))
    if tail != END:
        check.add("tar", "", "expected two blocks of zeros after the last member")
    elif reader.take(1):
        check.add("tar", "", "bytes after the end of the archive")


def member(reader: Reader, check: ShardCheck, key: str, suffix: str, limit: int) -> bytes:
    """The bytes of the member that must come next; raises Cannot where nothing can follow it."""
    size = _open_member(reader, check, key, suffix, limit)
    padded = size + -size % BLOCK
    data = reader.take(padded)
    if len(data) != padded:
        check.add("tar", key, f"the file ends inside {key}.{suffix}")
        raise Cannot
    if data[size:].strip(b"\0"):
        check.add("tar", key, f"{key}.{suffix}: padding is not zero")
    return data[:size]


def _open_member(reader: Reader, check: ShardCheck, key: str, suffix: str, limit: int) -> int:
    size, faults = check_header(reader.take(BLOCK), f"{key}.{suffix}".encode())
    for fault in faults:
        check.add("tar", key, fault)
    if size > limit:
        check.add("tar", key, f"{key}.{suffix}: {size} bytes, at most {limit} are possible")
    if not 0 <= size <= limit:
        raise Cannot
    return size


def _walk_normals(
    reader: Reader, check: ShardCheck, head: DatasetHead, record: ShardRecord, start: int
) -> None:
    known = {category.category for category in head.normals.source.categories}
    for index in range(start, start + record.samples):
        key = f"{index:09d}"
        image = member(reader, check, key, head.normals.suffix, image_limit(head.image.size_px))
        fault = image_fault(image, "webp", head.image)
        if fault:
            check.add("image", key, fault)
        category = check_source_json(reader, check, index, head.normals.source.licence)
        if category not in known:
            check.add("json", key, f"category {category!r:.60} is none of dataset.json's")
        check.samples += 1


def check_source_json(reader: Reader, check: ShardCheck, index: int, licence: str) -> object:
    """Check the provenance of one photograph, and keep it in `check`; the category it states."""
    key = f"{index:09d}"
    data = member(reader, check, key, "json", MAX_JSON_MEMBER_BYTES)
    fields = fields_of(data)
    category = fields.get("category")
    expected = {
        "index": index,
        "category": category,
        "path": fields.get("path"),
        "sha256": fields.get("sha256"),
        "licence": licence,
    }
    check_fields(check, key, data, fields, expected)
    _check_provenance(check, key, fields)
    check.categories.append(category if isinstance(category, str) else None)
    check.photographs.append(f"{fields.get('sha256')} {category} {fields.get('path')}\n")
    return category


def _check_provenance(check: ShardCheck, key: str, fields: dict[str, object]) -> None:
    """A photograph lies below its root, and has a hash."""
    path, sha256 = fields.get("path"), fields.get("sha256")
    if isinstance(path, str) and (path[:1] in ("", "/") or ".." in path.split("/")):
        check.add(
            "json", key, f"path: expected one below the photographs' root, found {path!r:.60}"
        )
    if isinstance(sha256, str) and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        check.add("json", key, f"sha256: expected 64 hexadecimal digits, found {sha256!r:.60}")


def fields_of(data: bytes) -> dict[str, object]:
    """The fields of a JSON object; none of anything else."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def check_fields(
    check: ShardCheck, key: str, data: bytes, fields: dict[str, object], right: dict[str, object]
) -> None:
    """Compare a member's JSON with the only right one; a fault names the first field."""
    if data == json_bytes(right) and all(isinstance(v, str | int) for v in right.values()):
        return
    for name, value in right.items():
        if fields.get(name) != value or not isinstance(value, str | int):
            check.add(
                "json", key, f"{name}: expected {value!r:.60}, found {fields.get(name)!r:.60}"
            )
            return
    more = [name for name in fields if name not in right]
    fault = f"unknown field {more[0]!r:.60}" if more else "not in the builder's own bytes"
    check.add("json", key, fault)


def image_limit(size_px: int) -> int:
    """No image of ours takes more bytes: twice its pixels, and a colour profile."""
    return 6 * size_px**2 + MAX_PROFILE_BYTES


def _walk_images(reader: Reader, check: ShardCheck, task: DataTask) -> None:
    kept: list[Stored] = []
    stopped: list[Cannot] = []
    samples = _samples(reader, check, task, stopped)
    while batch := list(islice(samples, ROWS)):
        start = batch[0].number
        theta = np.stack([one.theta for one in batch])
        readable = np.array([one.readable for one in batch], np.bool_)
        normal = np.array([one.normal for one in batch], np.int64)
        in_range, differs, drawn = check_vectors(check, task, start, theta, readable)
        differs |= check_choice(check, task, start, normal, drawn)
        check.redrawn += len(batch)
        check.differing += int(np.count_nonzero(differs))
        usable = in_range & (normal >= 0)
        kept += [one for one, fine in zip(batch, usable, strict=True) if one.image and fine]
    if kept:
        paint_again(check, task, kept)
    if stopped:
        raise stopped[0]


def _samples(
    reader: Reader, check: ShardCheck, task: DataTask, stopped: list[Cannot]
) -> Iterator[Stored]:
    """The samples, up to where the walk cannot go on."""
    image, length = task.head.image, task.head.theta.length
    npy = npy_head("<f4", f"({length},)")
    try:
        for index in range(task.start, task.start + task.record.samples):
            key = f"{index:09d}"
            data = member(reader, check, key, image.suffix, image_limit(task.head.image.size_px))
            fault = image_fault(data, image.codec, image)
            if fault:
                check.add("image", key, fault)
            vector = member(reader, check, key, "theta.npy", len(npy) + 4 * length)
            readable = vector[: len(npy)] == npy and len(vector) == len(npy) + 4 * length
            theta = np.zeros(length, np.float32)
            if readable:
                theta = np.frombuffer(vector, "<f4", offset=len(npy))
            else:
                check.add("npy", key, f"theta.npy is not float32 [{length}] in npy version 1.0")
            text = member(reader, check, key, "json", MAX_JSON_MEMBER_BYTES)
            normal = _check_json(check, task, index, text)
            check.samples += 1
            wanted = index in task.rerender and not fault
            yield Stored(index, data if wanted else b"", theta, readable, normal)
    except Cannot as cannot:
        stopped.append(cannot)


def _check_json(check: ShardCheck, task: DataTask, index: int, data: bytes) -> int:
    """The number of the normal that the sample's JSON names; -1 when it names none."""
    fields, key = fields_of(data), f"{index:09d}"
    name, count = fields.get("normal"), task.head.normals.count
    known_form = isinstance(name, str) and re.fullmatch(r"[0-9]{9}", name)
    if not (isinstance(name, str) and known_form and int(name) < count):
        check.add("json", key, f"normal: expected a key below {count:09d}, found {name!r:.60}")
        return -1
    normal = int(name)
    known = task.categories[normal] if normal < len(task.categories) else None
    category = fields.get("category") if known is None else known
    right = {"index": index, "normal": name, "category": category}
    check_fields(check, key, data, fields, right)
    return normal


def npy_head(kind: str, shape: str) -> bytes:
    """The bytes before the numbers of an npy file of version 1.0: `<f4`, `(271,)`."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    length = 64 * -(-(len(text) + 11) // 64)
    text = text.ljust(length - 11) + "\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text.encode()


def _walk_packed(reader: Reader, check: ShardCheck, task: DataTask) -> None:
    """One sample a shard: every vector, then every normal's number."""
    count, key = task.record.samples, f"{task.start:09d}"
    differs, drawn = _walk_packed_theta(reader, check, task)
    head = npy_head("<i4", f"({count},)")
    data = member(reader, check, key, "normal.npy", len(head) + 4 * count)
    if data[: len(head)] != head or len(data) != len(head) + 4 * count:
        check.add("npy", key, f"normal.npy is not int32 [{count}] in npy version 1.0")
    else:
        found = np.frombuffer(data, "<i4", offset=len(head)).astype(np.int64)
        wrong = (found < 0) | (found >= task.head.normals.count)
        for row in np.flatnonzero(wrong).tolist():
            number = f"{task.start + row:09d}"
            check.add("normal", number, f"names normal {found[row]}, which is not there")
        differs |= check_choice(check, task, task.start, np.where(wrong, -1, found), drawn)
    check.samples = check.redrawn = count
    check.differing = int(np.count_nonzero(differs))


def _walk_packed_theta(
    reader: Reader, check: ShardCheck, task: DataTask
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which vectors are not the recipe's draw [n], and the normals that it draws, int64 [n]."""
    length, count, key = task.head.theta.length, task.record.samples, f"{task.start:09d}"
    head = npy_head("<f4", f"({count}, {length})")
    whole = len(head) + 4 * length * count
    size = _open_member(reader, check, key, "theta.npy", whole)
    if size != whole or reader.take(len(head)) != head:
        check.add("npy", key, f"theta.npy is not float32 [{count}, {length}] in npy version 1.0")
        raise Cannot
    differs = np.zeros(count, np.bool_)
    drawn = np.zeros(count, np.int64)
    for low in range(0, count, ROWS):  # some at a time: a shard may hold a million
        part = slice(low, min(count, low + ROWS))
        data = reader.take(4 * length * (part.stop - low))
        if len(data) != 4 * length * (part.stop - low):
            check.add("tar", key, f"the file ends inside {key}.theta.npy")
            raise Cannot
        theta = np.frombuffer(data, "<f4").reshape(-1, length)
        readable = np.ones(len(theta), np.bool_)
        _, differs[part], drawn[part] = check_vectors(
            check, task, task.start + low, theta, readable
        )
    if reader.take(-whole % BLOCK) != bytes(-whole % BLOCK):
        check.add("tar", key, f"{key}.theta.npy: padding is not zero")
    return differs, drawn
