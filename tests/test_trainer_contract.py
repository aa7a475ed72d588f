"""Builder and trainer agree through the shards alone: built by one, rendered again by the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cache import Cache
from trainer.dataset import read_dataset
from trainer.paint import paint
from trainer.render import pixel_coordinates, render
from trainer.samples import read_now
from trainer.shards import read_normals
from trainer.storage import open_storage
from trainer.task import to_signed

RECIPE = """
format = "semiformula-recipe"
format_version = 1
name = "contract"
samples = 24
samples_per_shard = 10
size_px = 64
channels = {channels}

[prior.sigma]
{sigma}
"""
SIGMAS = {
    "fine": 'kind = "log_uniform"\nlow = 0.02\nhigh = 0.3',
    "paper": 'kind = "softplus_normal"\noffset = 0.01',
}


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [B, C, H, W] in [-1, 1] to the nearest grey level: uint8 [B, H, W, C]."""
    levels = ((images + 1) * 127.5 + 0.5).floor().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize(("prior", "channels"), [("fine", 3), ("paper", 3), ("fine", 1)])
def test_stored_theta_renders_the_stored_image(tmp_path: Path, prior: str, channels: int) -> None:
    photographs = tmp_path / "normals" / "part"
    photographs.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (80, 70, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photographs / f"{number}.png")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(channels=channels, sigma=SIGMAS[prior]))
    for name in ("stored", "none"):
        words = ["build", str(recipe), "--normals", str(photographs.parent), "--jobs", "1"]
        words += ["--images", name, "--out", str(tmp_path / name)]
        subprocess.run([sys.executable, "-m", "builder", *words], check=True, capture_output=True)

    storages = [open_storage(str(tmp_path / name)) for name in ("stored", "none")]
    stored, bare = (read_dataset(storage) for storage in storages)
    assert stored.order_key == bare.order_key
    cache = Cache(tmp_path / "cache", 0)
    batch, alone = (
        read_now(storage, cache, dataset, range(24))
        for storage, dataset in zip(storages, (stored, bare), strict=True)
    )
    assert torch.equal(batch.theta, alone.theta)
    assert torch.equal(batch.normal, alone.normal)
    assert torch.equal(batch.index, torch.arange(24))
    normals, others = (
        torch.from_numpy(read_normals(storage, cache, dataset))
        for storage, dataset in zip(storages, (stored, bare), strict=True)
    )
    assert torch.equal(normals, others)
    again = render(to_signed(normals[batch.normal]), batch.theta, pixel_coordinates(64, 64))
    for found in (to_uint8(again), paint(normals[batch.normal], batch.theta)):
        difference = (found.int() - batch.images.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 1e-4
