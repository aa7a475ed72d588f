"""Procedural textures to paint on: backgrounds where photographs are few. Licence CC0 1.0.

Six families, none of which is a surface of the demo products: what is evaluated there stays unseen.
Every texture is a function of (seed, number) alone.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from builder.artifacts import Model, atomic_file, read_json, write_json
from builder.demo import LICENSE, PNG_LEVEL
from builder.demo_noise import Array, cells, fractal_noise, grid, smooth_noise, smoothstep, stream
from builder.errors import BuilderError
from builder.workers import results, usable_cores, worker_pool

MAX_COUNT = 10**6
RECORD = "textures.json"


class TexturesRecord(Model):
    """textures.json: what the pictures beside it are functions of, but for their numbers."""

    format: Literal["semiformula-textures"] = "semiformula-textures"
    format_version: Literal[1] = 1
    licence: str = "CC0-1.0"
    seed: int
    size_px: int


def weave(rng: np.random.Generator, size_px: int) -> Array:
    """Over and under of threads of random pitch."""
    x, y = _warped(rng, size_px, 1.5)
    pitch = rng.uniform(6, 20)
    over = np.cos(np.pi * x / pitch) * np.cos(np.pi * y / pitch) > 0
    warp, weft = np.abs(np.sin(np.pi * x / pitch)), np.abs(np.sin(np.pi * y / pitch))
    return np.where(over, warp, weft) ** np.float32(0.5)


def clouds(rng: np.random.Generator, size_px: int) -> Array:
    """Fractal noise of random roughness: paper, stone, cast metal."""
    field = fractal_noise(rng, size_px, rng.uniform(20, 120), rng.uniform(1.1, 2.2))
    return 0.5 + 0.2 * field


def dots(rng: np.random.Generator, size_px: int) -> Array:
    """A lattice of round holes or studs."""
    x, y = _warped(rng, size_px, 1.0)
    pitch = rng.uniform(10, 36)
    row = np.floor(y / pitch)
    shifted = x + np.where(row % 2 == 0, 0, rng.choice([0.0, 0.5]) * pitch)
    dx = shifted - pitch * (np.floor(shifted / pitch) + 0.5)
    dy = y - pitch * (row + 0.5)
    radius = rng.uniform(0.2, 0.42) * pitch
    return smoothstep(radius + 1, radius - 1, np.hypot(dx, dy))


def ribs(rng: np.random.Generator, size_px: int) -> Array:
    """Parallel ribs: corduroy, corrugated board, knurls where a second set crosses them."""
    x, y = _warped(rng, size_px, 2.0)
    pitch = rng.uniform(6, 32)
    field = 0.5 + 0.5 * np.sin(2 * np.pi * x / pitch)
    if rng.random() < 0.4:
        field = np.minimum(field, 0.5 + 0.5 * np.sin(2 * np.pi * y / pitch))
    return np.asarray(field, np.float32)


def leather(rng: np.random.Generator, size_px: int) -> Array:
    """Cells with dark borders: leather, crackle, tiles."""
    x, y = _warped(rng, size_px, 2.0)
    _, border, _ = cells(rng, x, y, rng.uniform(8, 36), rng.uniform(0.1, 0.46))
    return smoothstep(0.0, rng.uniform(1.5, 6), border)


def pores(rng: np.random.Generator, size_px: int) -> Array:
    """Blots on an even ground: foam, sponge, rust."""
    field = smooth_noise(rng, size_px, rng.uniform(2, 12))
    level = rng.uniform(0.0, 1.2)
    return smoothstep(level - 0.3, level + 0.3, field)


FAMILIES: tuple[Callable[[np.random.Generator, int], Array], ...] = (
    weave,
    clouds,
    dots,
    ribs,
    leather,
    pores,
)


def _warped(rng: np.random.Generator, size_px: int, strength: float) -> tuple[Array, Array]:
    """Coordinates of a turned, shifted and slightly bent surface, in reference pixels."""
    angle, shift = rng.uniform(0, np.pi), tuple(rng.uniform(-40, 40, 2))
    x, y = grid(size_px, angle=angle, shift=(float(shift[0]), float(shift[1])))
    bend = rng.uniform(0, strength)
    return (
        x + np.float32(bend) * smooth_noise(rng, size_px, 40),
        y + np.float32(bend) * smooth_noise(rng, size_px, 40),
    )


def texture(number: int, *, size_px: int, seed: int) -> NDArray[np.uint8]:
    """Texture `number`, uint8 [size_px, size_px, 3]: a family in two colours, light and noise."""
    rng = stream("texture", seed, number)
    field = np.clip(FAMILIES[number % len(FAMILIES)](rng, size_px), 0, 1)
    base = rng.uniform(0.1, 0.9) + rng.uniform(-0.25, 0.25, 3)
    other = base + rng.uniform(0.1, 0.5) * rng.choice([-1, 1]) + rng.uniform(-0.1, 0.1, 3)
    picture = base + (other - base) * field[..., None]
    light = 1 + 0.15 * smooth_noise(rng, size_px, 150) * rng.uniform(0, 1)
    grain = rng.uniform(0.005, 0.03) * rng.standard_normal((size_px, size_px, 1))
    levels = np.clip(picture * light[..., None] + grain, 0, 1) * 255
    return np.asarray(np.round(levels), np.uint8)


def make_textures(
    out: Path, *, count: int, size_px: int = 256, seed: int = 0, jobs: int | None = None
) -> str:
    """Write `count` textures to FAMILY/NNNNNN.png below `out`, and say so in a line.

    What is there is kept: the same call finishes an interrupted one, and a larger count adds to
    it. Raises BuilderError for numbers out of range, a folder of another seed, size or larger
    count, and one that cannot be written.
    """
    started = time.monotonic()
    for name, value, low, high in (
        ("count", count, 1, MAX_COUNT),
        ("size", size_px, 16, 4096),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            raise BuilderError(f"textures: {name} must lie in [{low}, {high}], found {value}")
    record = TexturesRecord(seed=seed, size_px=size_px)
    if (out / RECORD).is_file():
        before = read_json(TexturesRecord, out / RECORD)
        if before != record:
            raise BuilderError(
                f"{out}: holds textures of seed {before.seed} and {before.size_px} px, asked for "
                f"seed {seed} and {size_px} px; delete the folder or name another one"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise BuilderError(
            f"{out}: is not empty and holds no {RECORD}: not a folder of textures; give another one"
        )
    drawn = [path for path in out.glob("*/*.png") if re.fullmatch(r"\d{6}", path.stem)]
    surplus = [path for path in drawn if int(path.stem) >= count]
    if surplus:
        raise BuilderError(
            f"{out}: holds {len(surplus)} textures beyond --count {count}; give another folder"
        )
    write_json(out / RECORD, record)
    with atomic_file(out / "LICENSE.txt") as file:
        file.write(LICENSE.encode())
    paths = [out / _name(number) for number in range(count)]
    todo = [number for number, path in enumerate(paths) if not path.is_file()]
    tasks = [partial(_write, out / _name(number), size_px, seed, number) for number in todo]
    for _ in tqdm(_drawn(tasks, jobs), total=len(todo), unit="image", disable=None):
        pass
    return (
        f"textures: {count} of {len(FAMILIES)} families in {out}, {len(todo)} drawn in "
        f"{time.monotonic() - started:.1f} s"
    )


def _name(number: int) -> str:
    return f"{FAMILIES[number % len(FAMILIES)].__name__}/{number:06d}.png"


def _drawn(tasks: Sequence[Callable[[], None]], jobs: int | None) -> Iterator[object]:
    processes = min(jobs or usable_cores(), max(1, len(tasks) // 8))
    if processes == 1:
        yield from (task() for task in tasks)
        return
    with worker_pool(processes) as pool:
        yield from results(pool, tasks)


def _write(path: Path, size_px: int, seed: int, number: int) -> None:
    buffer = io.BytesIO()
    picture = Image.fromarray(texture(number, size_px=size_px, seed=seed))
    picture.save(buffer, "PNG", compress_level=PNG_LEVEL)
    with atomic_file(path) as file:
        file.write(buffer.getvalue())
