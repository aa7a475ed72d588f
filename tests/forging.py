"""Damage for the checks of `builder verify`, and what a careful forger does to hide it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from builder.plan import read_plan
from builder.storage import open_storage
from builder.verification import Verification
from tests.shards_by_hand import npy_bytes, rehash

FIRST, SECOND = "data/train-00000-of-00004.tar", "data/train-00001-of-00004.tar"
NORMALS = "normals/normals-00000-of-00001.tar"


def kinds(found: Verification) -> list[tuple[str, str, str]]:
    """(kind, shard, key) of each fault."""
    return [(fault.kind, fault.shard, fault.key) for fault in found.faults]


def forge(folder: Path) -> None:
    """Make index, plan and records agree with the shards as they are now: a careful forger."""
    rehash(folder)
    index = json.loads((folder / "dataset.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    plan["normals"] = index["normals"]
    (folder / "plan.json").write_text(json.dumps(plan))
    plan_sha256 = read_plan(open_storage(str(folder))).sha256
    for shard in index["shards"]:
        record = folder / "records" / Path(shard["name"]).with_suffix(".json").name
        fields = {**json.loads(record.read_text()), "plan_sha256": plan_sha256, "shard": shard}
        record.write_text(json.dumps(fields))


def edit(path: Path, change: Callable[[str, bytes], bytes], **header: object) -> None:
    """Write a tar again with its members' bytes and headers changed."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    file = io.BytesIO()
    for name, data in members:
        info = tarfile.TarInfo(name)
        data = change(name, data)
        info.size = len(data)
        for field, value in header.items():
            setattr(info, field, value)
        file.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
    path.write_bytes(file.getvalue() + bytes(1024))


def edit_theta(folder: Path, name: str, index: int, value: float) -> None:
    """Change one value of a sample of the second shard, and hide it."""

    def change(member: str, data: bytes) -> bytes:
        if member != name:
            return data
        theta = np.load(io.BytesIO(data))
        theta[index] = value
        return npy_bytes(theta)

    edit(folder / SECOND, change)
    forge(folder)
