"""Writes a tiny labelled dataset of CLASSES.md, as shards_by_hand does one of painted images.

It shares no code with the builder. Class 0 is dark, class 1 light, and so on: any reader that
mixes up labels is found out. `edit` alters a member's bytes before anything is hashed.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np

from tests.shards_by_hand import Edit, image_bytes, sha256

NAMES = ("dark", "light", "white")


def write_class_set(
    folder: Path,
    samples: int = 10,
    samples_per_shard: int = 4,
    size_px: int = 16,
    classes: int = 2,
    suffix: str = "webp",
    edit: Edit | None = None,
    seed: int = 0,
) -> tuple[list[np.ndarray], list[int]]:
    """Write a labelled dataset; its images, uint8 [H, W, 3], and their labels."""
    rng = np.random.default_rng(seed)
    images, labels, members = [], [], []
    for i in range(samples):
        label = i % classes
        low = 256 * label // classes
        pixels = rng.integers(low, low + 256 // classes, (size_px, size_px, 3)).astype(np.uint8)
        about = {
            "index": i, "category": NAMES[label], "path": f"{NAMES[label]}/{i}.png",
            "sha256": "0" * 64, "licence": "CC0-1.0",
        }  # fmt: skip
        images.append(pixels)
        labels.append(label)
        members.append((f"{i:09d}.{suffix}", image_bytes(pixels, suffix)))
        members.append((f"{i:09d}.cls", str(label).encode()))
        members.append((f"{i:09d}.json", json.dumps(about).encode()))
    count, step = -(-samples // samples_per_shard), 3 * samples_per_shard
    shards = [
        write_tar(
            folder,
            f"data/train-{s:05d}-of-{count:05d}.tar",
            members[step * s : step * (s + 1)],
            edit,
        )
        for s in range(count)
    ]
    index = class_index(shards, labels, samples_per_shard, size_px, classes, suffix)
    (folder / "dataset.json").write_text(json.dumps(index, indent=1))
    return images, labels


def write_tar(folder: Path, name: str, members: list[tuple[str, bytes]], edit: Edit | None) -> dict:
    """One shard, which ends with two blocks of zeros, and its record in dataset.json."""
    tar = b""
    for member, plain in members:
        data = plain if edit is None else edit(member, plain)
        info = tarfile.TarInfo(member)  # mtime 0, mode 0644
        info.size = len(data)
        tar += info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
    tar += bytes(1024)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar)
    return {"name": name, "samples": len(members) // 3, "bytes": len(tar), "sha256": sha256(tar)}


def class_index(
    shards: list[dict],
    labels: list[int],
    samples_per_shard: int,
    size_px: int,
    classes: int,
    suffix: str,
) -> dict:
    """dataset.json as CLASSES.md has it."""
    counts = [labels.count(label) for label in range(classes)]
    lines = "".join(f"{shard['sha256']}  {shard['name']}\n" for shard in shards)
    return {
        "format": "semiformula-classes", "format_version": 1, "builder_version": "0.1.0",
        "environment": {
            "kernel": "5f0c2a7be1d94c36", "python": "3.11.7", "numpy": "2.3.5",
            "numba": "0.62.1", "llvmlite": "0.45.1",
            "pillow": "12.0.0", "libwebp": "1.6.0", "zlib": "1.3.1", "libjpeg": "turbo 3.1.2",
            "cpu": "by hand",
        },
        "seed": 0,
        "samples_per_shard": samples_per_shard,
        "content_sha256": sha256(lines.encode()),
        "samples": len(labels),
        "classes": [
            {"category": NAMES[label], "samples": count} for label, count in enumerate(counts)
        ],
        "image": {"size_px": size_px, "channels": 3,
                  "codec": {"webp": "webp", "jpg": "jpeg"}[suffix], "suffix": suffix,
                  "lossless": suffix != "jpg"},
        "source": {
            "name": "by hand", "licence": "CC0-1.0", "citation": "", "homepage": "",
            "other_files": 0, "incomplete": False, "faults": [],
            "categories": [
                {"category": NAMES[label], "found": count, "kept": count, "expected": None,
                 "rejected": {}}
                for label, count in enumerate(counts)
            ],
        },
        "shards": shards,
    }  # fmt: skip
