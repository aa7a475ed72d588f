"""The only writer of tars and commit records, and the check of what is stored. See SHARDS.md."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy.typing as npt

from builder.artifacts import parse_json, readable_json
from builder.errors import BuilderError
from builder.index import Commit, Contents, ShardRecord
from builder.storage import Storage
from builder.tar import read_header

BLOCK = 512
# Where each kind of shard lies.
FOLDERS = {"train": "data", "theta": "data", "normals": "normals"}
# The data shards' kind by what they hold.
KIND: dict[Contents, str] = {"images": "train", "parameters": "theta"}

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(", ", ": "))  # made once: it is per sample


class Sample(NamedTuple):
    """One sample: the zero-padded key and its members (suffix, bytes) in the order written."""

    key: str
    members: Sequence[tuple[str, bytes]]


def shard_name(kind: str, index: int, count: int) -> str:
    """`data/train-00000-of-00020.tar`, `normals/normals-00000-of-00001.tar`."""
    return f"{FOLDERS[kind]}/{kind}-{index:05d}-of-{count:05d}.tar"


def commit_name(shard: str) -> str:
    """Where the commit record of a shard lies: `records/train-00000-of-00020.json`."""
    return f"records/{shard[shard.rindex('/') + 1 :].removesuffix('.tar')}.json"


def write_shard(storage: Storage, name: str, samples: Iterable[Sample]) -> ShardRecord:
    """Write a tar whose bytes depend on its samples alone; it appears whole or not at all."""
    digest, count, written = hashlib.sha256(), 0, 0
    with storage.write(name) as file:
        for sample in samples:
            for suffix, data in sample.members:
                written += _put(file, digest, f"{sample.key}.{suffix}", data)
            count += 1
        end = bytes(2 * BLOCK)
        digest.update(end)
        written += file.write(end)
    return ShardRecord(name=name, samples=count, bytes=written, sha256=digest.hexdigest())


def _put(file: IO[bytes], digest: hashlib._Hash, name: str, data: bytes) -> int:
    member = b"".join((_header(name.encode("ascii"), len(data)), data, bytes(-len(data) % BLOCK)))
    digest.update(member)
    return file.write(member)


def _header(name: bytes, size: int) -> bytes:
    """The header that tarfile writes for a plain member, put together at a tenth of the cost."""
    template, template_sum = _header_template()
    digits = b"%011o" % size
    assert len(name) <= 100
    assert len(digits) == 11
    checksum = b"%06o\0 " % (template_sum + sum(name) + sum(digits))
    parts = (
        name.ljust(100, b"\0"),
        template[100:124],  # mode, uid, gid
        digits,
        template[135:148],  # the digits' end, mtime
        checksum,
        template[156:],
    )
    return b"".join(parts)


@lru_cache(maxsize=1)
def _header_template() -> tuple[bytes, int]:
    """A header without name and size, and the sum of its bytes with blanks for the checksum."""
    header = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # mtime 0, owner 0, mode 0644
    fixed = header[:124] + bytes(11) + header[135:148] + b" " * 8 + header[156:]
    return header, sum(fixed)


def write_commit(storage: Storage, plan_sha256: str, shard: ShardRecord) -> None:
    """Write the record that makes a shard count."""
    commit = Commit(
        format="semiformula-commit", format_version=1, plan_sha256=plan_sha256, shard=shard
    )
    with storage.write(commit_name(shard.name)) as file:
        file.write(readable_json(commit))


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """The npy file (version 1.0) of a float32 or int32 array, by hand so that it never changes."""
    kind = {"float32": "<f4", "int32": "<i4"}[array.dtype.name]
    return npy_head(kind, array.shape) + array.astype(kind, copy=False).tobytes()


@lru_cache(maxsize=64)
def npy_head(kind: str, shape: tuple[int, ...]) -> bytes:
    """The bytes before the numbers of an npy file of version 1.0: `<f4`, (271,)."""
    lengths = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {lengths}, }}"
    header = header.ljust(64 * (1 + (len(header) + 10) // 64) - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("ascii")


def json_bytes(fields: dict[str, object]) -> bytes:
    """A small JSON object in one line, keys in the order given."""
    return _JSON.encode(fields).encode()


def fault_of(storage: Storage, shard: ShardRecord) -> str:
    """Why the stored shard is not the one its record describes, or an empty string."""
    try:
        with storage.open(shard.name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            size = file.tell()
    except FileNotFoundError:
        return "the file is missing"
    if size != shard.bytes:
        return f"expected {shard.bytes} bytes, found {size}"
    return "" if digest == shard.sha256 else "its SHA-256 is not the recorded one"


def committed(storage: Storage, plan_sha256: str, name: str, *, deep: bool) -> ShardRecord | None:
    """The record of a shard of this plan that is stored with the recorded size, else None.

    `deep` reads and hashes the shard too.
    """
    where = commit_name(name)
    [data] = storage.read_many([where])
    try:
        commit = parse_json(Commit, data or b"", storage.where(where))
    except BuilderError:
        return None
    if commit.plan_sha256 != plan_sha256 or commit.shard.name != name:
        return None
    # The size always: what is no plain file does not count, whatever opening it would give.
    whole = storage.size(name) == commit.shard.bytes
    return commit.shard if whole and not (deep and fault_of(storage, commit.shard)) else None


def read_samples(
    storage: Storage, name: str, wanted: Iterable[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, members by suffix) of the wanted keys (None: all) of a verified shard, in order.

    Raises BuilderError for what is no tar of SHARDS.md. tarfile would unpack sparse members, to
    any size.
    """
    keys = None if wanted is None else set(wanted)
    sample: dict[str, bytes] = {}
    last = ""
    try:
        with storage.open(name) as file:
            for member, size in _members(file, storage.where(name)):
                key, _, suffix = member.partition(".")
                if key != last and sample:
                    yield last, sample
                    sample = {}
                last = key
                if keys is None or key in keys:
                    sample[suffix] = file.read(size)
    except FileNotFoundError:
        raise BuilderError(f"{storage.where(name)}: no such file") from None
    if sample:
        yield last, sample


def _members(file: IO[bytes], where: str) -> Iterator[tuple[str, int]]:
    """The name and the size of each member; the file stands at its first byte."""
    end, position = file.seek(0, os.SEEK_END), 0
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            return
        member = read_header(header)
        if member is None or position + BLOCK + member[1] > end:
            raise BuilderError(f"{where}: not readable as a tar: no member at byte {position}")
        yield member
        position += BLOCK + member[1] + -member[1] % BLOCK
