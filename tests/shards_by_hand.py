"""Writes a tiny dataset of SHARDS.md with nothing but the standard library, NumPy and Pillow.

What readers are tested on: it shares no code with the builder. `edit` alters a member's bytes
before anything is hashed; `flip_byte` and `cut` damage a finished file.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests import naive

Edit = Callable[[str, bytes], bytes]


def draw_theta(rng: np.random.Generator, components: int, channels: int) -> np.ndarray:
    """A theta within its ranges: float32 [K(C+6)+1]."""
    pi = rng.dirichlet(np.ones(components))
    rows = [
        [
            *rng.uniform(-1, 1, channels + 2),
            *np.exp(rng.uniform(np.log(0.05), np.log(0.5), 2)),
            rng.uniform(-0.9, 0.9),
            pi[k],
        ]
        for k in range(components)
    ]
    return np.array([*np.ravel(rows), rng.uniform(0, 1)], dtype=np.float32)


def write_dataset(
    folder: Path,
    samples: int = 10,
    samples_per_shard: int = 4,
    size_px: int = 16,
    channels: int = 3,
    components: int = 2,
    normals: int = 3,
    suffix: str = "webp",
    edit: Edit | None = None,
    seed: int = 0,
) -> dict[str, list[np.ndarray]]:
    """Write a dataset and return what it holds: `normals`, `images` (uint8) and `thetas`."""
    rng = np.random.default_rng(seed)
    shape = (size_px, size_px, channels)
    hold: dict[str, list[np.ndarray]] = {"normals": [], "images": [], "thetas": []}
    normal_members = []
    for n in range(normals):
        hold["normals"].append(rng.integers(0, 256, shape).astype(np.uint8))
        about: dict[str, object] = {
            "index": n,
            "category": "part",
            "path": f"part/{n}.png",
            "sha256": "0" * 64,
        }
        normal_members.append((f"{n:09d}.webp", image_bytes(hold["normals"][n], "webp")))
        about["licence"] = "CC0-1.0"
        normal_members.append((f"{n:09d}.json", json.dumps(about).encode()))
    sample_members = []
    for i in range(samples):
        theta = draw_theta(rng, components, channels)
        image = naive.render(hold["normals"][i % normals], theta)
        hold["thetas"].append(theta)
        hold["images"].append(image)
        about = {"index": i, "normal": f"{i % normals:09d}", "category": "part"}
        sample_members.append((f"{i:09d}.{suffix}", image_bytes(image, suffix)))
        sample_members.append((f"{i:09d}.theta.npy", npy_bytes(theta)))
        sample_members.append((f"{i:09d}.json", json.dumps(about).encode()))
    normal_shards = [
        write_tar(folder, "normals/normals-00000-of-00001.tar", normal_members, 2, edit)
    ]
    count = -(-samples // samples_per_shard)
    shards = [
        write_tar(
            folder,
            f"data/train-{s:05d}-of-{count:05d}.tar",
            sample_members[3 * samples_per_shard * s : 3 * samples_per_shard * (s + 1)],
            3,
            edit,
        )
        for s in range(count)
    ]
    index = index_of(normal_shards, shards, samples, normals, size_px, channels, components, suffix)
    (folder / "dataset.json").write_text(json.dumps(index, indent=1))
    return hold


def index_of(
    normal_shards: list[dict],
    shards: list[dict],
    samples: int,
    normals: int,
    size_px: int,
    channels: int,
    components: int,
    suffix: str,
) -> dict:
    """dataset.json as SHARDS.md has it."""
    codec = {"webp": "webp", "png": "png", "jpg": "jpeg"}[suffix]
    recipe = {
        "format": "semiformula-recipe", "format_version": 1, "name": "by-hand", "seed": 0,
        "samples": samples, "samples_per_shard": 4, "size_px": size_px, "channels": channels,
        "components": components, "codec": codec,
        "prior": {
            "color": {"low": -1.0, "high": 1.0}, "mean": {"low": -1.0, "high": 1.0},
            "sigma": {"kind": "log_uniform", "low": 0.05, "high": 0.5},
            "max_abs_rho": 0.9, "scale": {"low": 0.0, "high": 1.0},
        },
    }  # fmt: skip
    lines = "".join(f"{s['sha256']}  {s['name']}\n" for s in [*normal_shards, *shards])
    return {
        "format": "semiformula-shards", "format_version": 2, "builder_version": "0.1.0",
        "environment": {
            "kernel": "5f0c2a7be1d94c36", "python": "3.11.7", "numpy": "2.3.5",
            "numba": "0.62.1", "llvmlite": "0.45.1",
            "pillow": "12.0.0", "libwebp": "1.6.0", "zlib": "1.3.1", "libjpeg": "turbo 3.1.2",
            "cpu": "by hand",
        },
        "recipe": recipe,
        "recipe_sha256": sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()),
        "content_sha256": sha256(lines.encode()),
        "contents": "images",
        "samples": samples,
        "image": {"size_px": size_px, "channels": channels, "codec": codec, "suffix": suffix,
                  "lossless": suffix != "jpg"},
        "theta": {"components": components, "channels": channels,
                  "length": components * (channels + 6) + 1},
        "normals": {
            "count": normals, "suffix": "webp",
            "source": {
                "name": "by hand", "licence": "CC0-1.0", "citation": "", "homepage": "",
                "incomplete": False, "faults": [],
                "categories": [{"category": "part", "found": normals, "kept": normals,
                                "expected": None, "rejected": {}}],
            },
            "shards": normal_shards,
        },
        "shards": shards,
    }  # fmt: skip


def write_tar(
    folder: Path, name: str, members: list[tuple[str, bytes]], per_sample: int, edit: Edit | None
) -> dict:
    """One shard and its record in dataset.json."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, plain in members:
            data = plain if edit is None else edit(member, plain)
            info = tarfile.TarInfo(member)
            info.size = len(data)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(data))
    data = path.read_bytes()
    return {
        "name": name,
        "samples": len(members) // per_sample,
        "bytes": len(data),
        "sha256": sha256(data),
    }


def image_bytes(pixels: np.ndarray, suffix: str) -> bytes:
    """Encode uint8 [H, W, C]; a grey WebP becomes three equal planes."""
    buffer = io.BytesIO()
    plane = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    if suffix == "webp":
        Image.fromarray(plane).convert("RGB").save(buffer, "WEBP", lossless=True, exact=True)
    else:
        Image.fromarray(plane).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as NumPy itself writes it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rehash(folder: Path) -> None:
    """Make dataset.json agree with the shards as they are now: for damage that hashes well."""
    path = folder / "dataset.json"
    index = json.loads(path.read_text())
    records = [*index["normals"]["shards"], *index["shards"]]
    for record in records:
        data = (folder / record["name"]).read_bytes()
        record["bytes"], record["sha256"] = len(data), sha256(data)
    lines = "".join(f"{record['sha256']}  {record['name']}\n" for record in records)
    index["content_sha256"] = sha256(lines.encode())
    path.write_text(json.dumps(index))


def flip_byte(path: Path, position: int) -> None:
    """Invert one byte of a file; a negative position counts from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    """Keep the first `length` bytes of a file."""
    path.write_bytes(path.read_bytes()[:length])
