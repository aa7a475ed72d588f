"""A contact sheet of a dataset: normal, anomaly, mask, and the visible components as ellipses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from builder.artifacts import atomic_file
from builder.dataset import read_index, read_normals, read_parameters, verified_samples
from builder.images import decode_pixels
from builder.index import Dataset
from builder.render import check_theta, render
from builder.storage import Storage, open_storage

GAP_PX = 4
VISIBLE = 0.05  # an ellipse is drawn for a component that reaches this M at its mean


def contact_sheet(url: str, out: Path, *, samples: int = 24, seed: int = 0) -> list[str]:
    """Write a PNG of `samples` random samples of the dataset at `url`; return their keys.

    Each sample is a row of three: the normal image, the anomaly image, and the mask M (black 0,
    white 1) with an ellipse at one sigma, in its colour, for every component that is visible.
    Raises BuilderError when the dataset is unfinished or damaged.
    """
    storage = open_storage(url)
    dataset = read_index(storage)
    keys = _choose(dataset, samples, seed)
    found = _read(storage, dataset, keys)
    wanted = {int(str(one["normal"])) for one in found.values()}
    normals = read_normals(storage, dataset.normals, dataset.image.channels, wanted)
    size_px, columns = dataset.image.size_px, 2 if samples > 1 else 1
    cell = (3 * (size_px + GAP_PX) + GAP_PX * 2, size_px + GAP_PX)
    rows = -(-len(keys) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + GAP_PX, rows * cell[1] + GAP_PX), "white")
    for i, key in enumerate(keys):
        one = found[key]
        corner = (GAP_PX + (i % columns) * cell[0], GAP_PX + (i // columns) * cell[1])
        theta = one["theta"]
        normal = normals[int(str(one["normal"]))]
        image = one["image"] if "image" in one else _painted(normal, theta)
        tiles = [
            Image.fromarray(_rgb(normal)),
            Image.fromarray(_rgb(image)),
            _mask(theta, dataset),
        ]
        for j, tile in enumerate(tiles):
            sheet.paste(tile, (corner[0] + j * (size_px + GAP_PX), corner[1]))
    with atomic_file(out) as file:
        sheet.save(file, format="PNG")
    return keys


def _choose(dataset: Dataset, samples: int, seed: int) -> list[str]:
    count = min(samples, dataset.samples)
    chosen = np.random.default_rng(seed).choice(dataset.samples, count, replace=False)
    return [f"{index:09d}" for index in sorted(chosen.tolist())]


def _read(storage: Storage, dataset: Dataset, keys: list[str]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    start = 0
    for number, shard in enumerate(dataset.shards):
        stop = start + shard.samples
        wanted = [key for key in keys if start <= int(key) < stop]
        if wanted and dataset.contents == "parameters":
            normal_index, theta = read_parameters(storage, dataset, number)
            for key in wanted:
                row = int(key) - start
                found[key] = {"normal": f"{normal_index[row]:09d}", "theta": theta[row]}
        elif wanted:
            for key, members in verified_samples(storage, shard, wanted):
                found[key] = {
                    "normal": json.loads(members["json"])["normal"],
                    "image": decode_pixels(members[dataset.image.suffix], dataset.image.channels),
                    "theta": np.load(io.BytesIO(members["theta.npy"]), allow_pickle=False),
                }
        start = stop
    return found


def _painted(normal: npt.NDArray[np.uint8], theta: object) -> npt.NDArray[np.uint8]:
    assert isinstance(theta, np.ndarray)
    return np.asarray(render(normal[None], np.zeros(1, np.int64), theta[None])[0])


def _rgb(pixels: object) -> npt.NDArray[np.uint8]:
    assert isinstance(pixels, np.ndarray)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _mask(theta: object, dataset: Dataset) -> Image.Image:
    """M as an image: white defects on black are 255 M (equation 7 with v = 1, I_norm = -1)."""
    assert isinstance(theta, np.ndarray)
    channels, size_px = dataset.image.channels, dataset.image.size_px
    check_theta(theta[None], channels)
    black = np.zeros((1, size_px, size_px, channels), np.uint8)
    white = theta.copy()
    components = white[:-1].reshape(-1, channels + 6)
    components[:, :channels] = 1
    mask = Image.fromarray(_rgb(render(black, np.zeros(1, np.int64), white[None])[0]))
    draw = ImageDraw.Draw(mask)
    parts = theta[:-1].reshape(-1, channels + 6)
    for component, height in zip(parts, _heights(theta, channels), strict=True):
        if height >= VISIBLE:
            # Its colour, lightened so that a dark one shows on black.
            light = np.broadcast_to(component[:channels] * 80 + 175, 3)
            outline = _ellipse(component[channels:], size_px)
            draw.line(outline, fill=tuple(np.rint(light).astype(int).tolist()))
    return mask


def _heights(theta: npt.NDArray[np.float32], channels: int) -> npt.NDArray[np.float64]:
    """Each component's own part of M at its mean, about: s times its share of the highest."""
    part = theta[:-1].reshape(-1, channels + 6)[:, channels:].astype(np.float64)
    peak = part[:, 5] / (part[:, 2] * part[:, 3] * np.sqrt(1 - part[:, 4] ** 2))
    return np.asarray(theta[-1] * peak / peak.max())


def _ellipse(component: npt.NDArray[np.float32], size_px: int) -> list[tuple[float, float]]:
    """Points at Mahalanobis distance 1 of (mu_x, mu_y, sigma_x, sigma_y, rho, pi), in pixels."""
    mu_x, mu_y, sigma_x, sigma_y, rho = component[:5].astype(float)
    turn = np.linspace(0, 2 * np.pi, 49)
    x = mu_x + sigma_x * np.cos(turn)
    y = mu_y + sigma_y * (rho * np.cos(turn) + np.sqrt(1 - rho**2) * np.sin(turn))
    return list(zip((x + 1) / 2 * (size_px - 1), (y + 1) / 2 * (size_px - 1), strict=True))
