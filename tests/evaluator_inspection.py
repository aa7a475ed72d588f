"""Writes a tiny inspection set in MVTec AD layout for the evaluator's tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_category(folder: Path, *, train: int = 5, size_px: int = 64, seed: int = 0) -> Path:
    """Noise on a ramp, 5 + 5 images; the defects are bright and dark squares with exact masks."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 160, size_px)[None, :, None]

    def surface() -> np.ndarray:
        noise = rng.normal(0, 6, (size_px, size_px, 3))
        return np.clip(ramp + noise, 0, 255).astype(np.uint8)

    for i in range(train):
        save(folder / "train" / "good" / f"{i:03d}.png", surface())
    for i in range(2):
        save(folder / "test" / "good" / f"{i:03d}.png", surface())
    for defect, grey, count in (("dark", 0, 2), ("light", 255, 1)):
        for i in range(count):
            pixels, mask = surface(), np.zeros((size_px, size_px), np.uint8)
            where = slice(20 + 8 * i, 34 + 8 * i)
            pixels[where, where] = grey
            mask[where, where] = 255
            save(folder / "test" / defect / f"{i:03d}.png", pixels)
            save(folder / "ground_truth" / defect / f"{i:03d}_mask.png", mask)
    return folder
