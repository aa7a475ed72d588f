"""Writes a tiny parameter-only dataset of SHARDS.md, as shards_by_hand does one of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.shards_by_hand import Edit, npy_bytes, sha256, write_dataset, write_tar


def write_parameters(
    folder: Path, samples: int = 10, samples_per_shard: int = 4, edit: Edit | None = None
) -> dict[str, list[np.ndarray]]:
    """Write the dataset of images of the same arguments, and make one of its parameters of it."""
    hold = write_dataset(folder, samples, samples_per_shard)
    index = json.loads((folder / "dataset.json").read_text())
    normals = len(hold["normals"])
    shards = []
    for first, record in zip(range(0, samples, samples_per_shard), index["shards"], strict=True):
        (folder / record["name"]).unlink()
        rows = range(first, min(first + samples_per_shard, samples))
        thetas = np.stack([hold["thetas"][row] for row in rows])
        members = [
            (f"{first:09d}.theta.npy", npy_bytes(thetas)),
            (f"{first:09d}.normal.npy", npy_bytes(np.array([r % normals for r in rows], "<i4"))),
        ]
        name = record["name"].replace("train", "theta")
        shards.append(write_tar(folder, name, members, 2, edit) | {"samples": len(rows)})
    index["contents"], index["shards"] = "parameters", shards
    lines = "".join(f"{s['sha256']}  {s['name']}\n" for s in [*index["normals"]["shards"], *shards])
    index["content_sha256"] = sha256(lines.encode())
    (folder / "dataset.json").write_text(json.dumps(index))
    return hold
