"""Builder and trainer agree through the shards alone: built by one, rendered again by the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.dataset import read_dataset
from trainer.render import pixel_coordinates, render
from trainer.shards import ShardSamples, index_samples, read_normals
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
    words = ["build", str(recipe), "--normals", str(photographs.parent), "--jobs", "1"]
    words += ["--out", str(tmp_path / "data")]
    subprocess.run([sys.executable, "-m", "builder", *words], check=True, capture_output=True)

    dataset = read_dataset(tmp_path / "data")
    samples = ShardSamples(tmp_path / "data", dataset, index_samples(tmp_path / "data", dataset))
    normals = torch.from_numpy(read_normals(tmp_path / "data", dataset))
    images, theta, normal = samples.batch(range(24))
    again = render(to_signed(normals[normal]), theta, pixel_coordinates(64, 64))
    difference = (to_uint8(again).int() - images.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-4
