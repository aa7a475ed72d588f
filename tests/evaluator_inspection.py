"""Writes tiny inspection sets, in MVTec AD and other layouts, for the evaluator's tests."""

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


def write_btad(folder: Path) -> Path:
    """Three photographs to fit on, one good and two defective, masks as PNG and BMP."""
    for i in range(3):
        save(folder / "train" / "ok" / f"{i:04d}.bmp", grey(90 + i))
    save(folder / "test" / "ok" / "0000.bmp", grey(90))
    for i, suffix in enumerate((".png", ".bmp")):
        save(folder / "test" / "ko" / f"{i:04d}.bmp", grey(200 + i))
        save(folder / "ground_truth" / "ko" / f"{i:04d}{suffix}", square())
    return folder


def write_visa(root: Path, name: str = "candle") -> Path:
    """As above, listed in split_csv/1cls.csv with photographs of another object."""
    lines = ["object,split,label,image,mask", "pcb1,train,normal,pcb1/Data/Images/Normal/0.JPG,"]
    images = f"{name}/Data/Images"
    for i, split in enumerate(("train", "train", "test")):
        save(root / images / "Normal" / f"{i}.JPG", grey(90 + i))
        lines.append(f"{name},{split},normal,{images}/Normal/{i}.JPG,")
    save(root / images / "Anomaly" / "000.JPG", grey(200))
    save(root / name / "Data/Masks/Anomaly/000.png", square(3))
    lines.append(f"{name},test,anomaly,{images}/Anomaly/000.JPG,{name}/Data/Masks/Anomaly/000.png")
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / name


def write_loco(folder: Path) -> Path:
    """One photograph with two masks, one with one."""
    for i in range(3):
        save(folder / "train" / "good" / f"{i:03d}.png", grey(90 + i))
        save(folder / "validation" / "good" / f"{i:03d}.png", grey(80 + i))
    save(folder / "test" / "good" / "000.png", grey(90))
    for kind, count in (("logical_anomalies", 2), ("structural_anomalies", 1)):
        save(folder / "test" / kind / "000.png", grey(150 + count))
        for i in range(count):
            mask = square(200 + i, at=10 + 20 * i)
            save(folder / "ground_truth" / kind / "000" / f"{i:03d}.png", mask)
    return folder


def write_folders(folder: Path, *, masks: bool = True) -> Path:
    """Ten good and two defective photographs in two folders."""
    for i in range(10):
        save(folder / "good" / f"{i}.png", grey(90 + i))
    for i in range(2):
        save(folder / "defective" / f"{i}.png", grey(200 + i))
        if masks:
            save(folder / "masks" / f"{i}.png", square())
    return folder


def grey(value: int, size_px: int = 64) -> np.ndarray:
    return np.full((size_px, size_px, 3), value, np.uint8)


def square(value: int = 255, *, at: int = 20, size_px: int = 64) -> np.ndarray:
    """A mask of a square of 10 x 10 pixels."""
    mask = np.zeros((size_px, size_px), np.uint8)
    mask[at : at + 10, at : at + 10] = value
    return mask
