"""The only writer of tars and commit records, and the check of what is on disk. See SHARDS.md."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from builder.artifacts import atomic_file, read_json, sha256_of_file, write_json
from builder.errors import BuilderError
from builder.recipe import ShardRecord

BLOCK = 512


class Sample(NamedTuple):
    """One sample: the zero-padded key and its members (suffix, bytes) in the order written."""

    key: str
    members: Sequence[tuple[str, bytes]]


def shard_name(kind: str, index: int, count: int) -> str:
    """`data/train-00000-of-00020.tar` or `normals/normals-00000-of-00001.tar`."""
    folder = {"train": "data", "normals": "normals"}[kind]
    return f"{folder}/{kind}-{index:05d}-of-{count:05d}.tar"


def record_path(root: Path, name: str) -> Path:
    """Where the commit record of the shard `name` lies."""
    return root / "records" / Path(name).with_suffix(".json").name


def write_shard(root: Path, name: str, samples: Iterable[Sample]) -> ShardRecord:
    """Write a tar whose bytes depend on its samples alone, then its commit record.

    The tar appears whole or not at all; until its record stands, it does not count.
    """
    digest, count, written = hashlib.sha256(), 0, 0
    with atomic_file(root / name) as file:
        for sample in samples:
            for suffix, data in sample.members:
                written += _put(file, digest, f"{sample.key}.{suffix}", data)
            count += 1
        end = bytes(2 * BLOCK)
        digest.update(end)
        written += file.write(end)
    record = ShardRecord(name=name, samples=count, bytes=written, sha256=digest.hexdigest())
    write_json(record_path(root, name), record)
    return record


def _put(file: IO[bytes], digest: hashlib._Hash, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # mtime 0, owner 0, mode 0644
    info.size = len(data)
    member = info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
    digest.update(member)
    return file.write(member)


def npy_bytes(vector: npt.NDArray[np.float32]) -> bytes:
    """The npy file (version 1.0) of a float32 vector, written by hand so that it never changes."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({len(vector)},), }}"
    header = header.ljust(64 * (1 + (len(header) + 10) // 64) - 11) + "\n"
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("ascii")
    return head + vector.astype("<f4").tobytes()


def json_bytes(fields: dict[str, object]) -> bytes:
    """A small JSON object in one line, keys in the order given."""
    return json.dumps(fields, ensure_ascii=False, separators=(", ", ": ")).encode()


def fault_of(root: Path, record: ShardRecord) -> str:
    """Why the shard on disk is not the one its record describes, or an empty string."""
    path = root / record.name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"expected {record.bytes} bytes, found {size}"
        if sha256_of_file(path) != record.sha256:
            return "its SHA-256 is not the recorded one"
        with tarfile.open(path, "r:") as tar:
            keys = {member.name.split(".", 1)[0] for member in tar}
    except FileNotFoundError:
        return "the file is missing"
    except (OSError, tarfile.TarError) as error:
        return f"not readable ({error})"
    if len(keys) != record.samples:
        return f"expected {record.samples} samples, found {len(keys)}"
    return ""


def committed(root: Path, name: str) -> ShardRecord | None:
    """The record of a shard that stands on disk whole and unchanged, else None."""
    try:
        record = read_json(ShardRecord, record_path(root, name))
    except BuilderError:
        return None
    return record if record.name == name and not fault_of(root, record) else None


def read_samples(path: Path, wanted: Iterable[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, members by suffix) of the wanted keys of a verified shard, in file order."""
    keys = set(wanted)
    sample: dict[str, bytes] = {}
    last = ""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if key != last and sample:
                yield last, sample
                sample = {}
            last = key
            if key in keys:
                file = tar.extractfile(member)
                assert file is not None
                sample[suffix] = file.read()
    if sample:
        yield last, sample
