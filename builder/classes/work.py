"""One labelled shard: what a worker process does. It needs no kernel, and so no numba."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from builder.errors import BuilderError
from builder.index import ImageFormat, ShardRecord
from builder.shards import Sample, committed, json_bytes, write_commit, write_shard
from builder.sources import Photograph, prepare
from builder.storage import Folder, open_storage


class Member(NamedTuple):
    """One sample of a shard: its photograph, its label, and the hash that was planned."""

    photograph: Photograph
    label: int
    sha256: str


def make_shard(
    url: str,
    plan_sha256: str,
    name: str,
    first: int,
    image: ImageFormat,
    licence: str,
    members: Sequence[Member],
) -> tuple[ShardRecord, bool]:
    """Write one shard, whose first sample is `first`, and commit it, unless it stands.

    Its record, and whether it had to be written.
    """
    storage = open_storage(url)
    # Hashed again where that is a read of the disk, not of the network.
    standing = committed(storage, plan_sha256, name, deep=isinstance(storage, Folder))
    if standing is not None:
        return standing, False
    samples = (_sample(first + i, one, image, licence) for i, one in enumerate(members))
    record = write_shard(storage, name, samples)
    write_commit(storage, plan_sha256, record)
    return record, True


def _sample(index: int, member: Member, image: ImageFormat, licence: str) -> Sample:
    photograph = member.photograph
    prepared = prepare(photograph, image.size_px, image.channels, image.codec)
    if prepared.sha256 != member.sha256:
        raise BuilderError(
            f"{photograph.root}/{photograph.name}: {prepared.fault or 'other bytes'}: it changed "
            "since plan.json was written; put it back, or remove --out and start again"
        )
    fields: dict[str, object] = {
        "index": index,
        "category": photograph.category,
        "path": photograph.name,
        "sha256": member.sha256,
        "licence": licence,
    }
    members = [
        (image.suffix, prepared.encoded),
        ("cls", b"%d" % member.label),
        ("json", json_bytes(fields)),
    ]
    return Sample(f"{index:09d}", members)
