"""A tiny network, photographs for it, and a cache to keep its features in."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from evaluator.features import FeatureCache
from evaluator.networks import Network
from evaluator.protocols import PROTOCOLS, changed

PROTOCOL = changed(PROTOCOLS["full"], resize_px=16)
WEIGHTS = "0" * 64
CPU = torch.device("cpu")
SHAPES = ((5, 8, 8), (7, 4, 4))
FILE_BYTES = 4096 + 4 * (5 * 64 + 7 * 16)


class TwoLayers(nn.Module):
    """Two strided convolutions; counts the photographs that it has seen."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.scale = scale
        self.seen = 0

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(images)
        fine = self.fine(images) * self.scale
        return {"fine": fine, "coarse": self.coarse(fine)}


def make_network(scale: float = 1.0) -> Network:
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return Network("tiny", TwoLayers(scale), ("fine", "coarse"), SHAPES, mean, std, CPU)


def photographs(folder: Path, count: int = 3, seed: int = 0) -> list[tuple[Path, str]]:
    rng = np.random.default_rng(seed)
    found = []
    folder.mkdir(exist_ok=True)
    for i in range(count):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
        found.append((path, sha256(path.read_bytes()).hexdigest()))
    return found


def pixels(images: list[tuple[Path, str]]) -> np.ndarray:
    lanczos = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.open(p).resize((16, 16), lanczos)) for p, _ in images])


def read_all(
    cache: FeatureCache,
    network: Network,
    images: list[tuple[Path, str]],
    *,
    dtype: str = "float32",
    batch_size: int = 2,
    weights: str = WEIGHTS,
    on_images: Callable[[int], object] = lambda count: None,
) -> list[np.ndarray]:
    with cache.features(
        network, weights, "tiny", images, PROTOCOL, dtype, batch_size, on_images
    ) as features:
        return [layer.read(0, layer.height) for layer in features.layers]


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))
