"""Noise fields and shapes that the demo surfaces are made of.

Lengths are reference pixels: an image is 256 of them wide whatever its size in pixels, so that a
part looks alike at every size. Arrays are (row, column), float32; x points right, y points down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

REFERENCE_PX = 256.0

Array = NDArray[np.floating[Any]]  # float32 wherever a picture is concerned


def stream(*key: object) -> np.random.Generator:
    """A generator that depends on nothing but the parts of its key (Philox, counter-based)."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))


def grid(size_px: int, *, angle: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> Any:
    """Coordinates x, y of every pixel, origin in the middle, in a frame shifted and then rotated.

    Two float32 arrays (size_px, size_px) in reference pixels; `angle` in radians.
    """
    line = ((np.arange(size_px) + 0.5) / size_px - 0.5).astype(np.float32) * REFERENCE_PX
    x, y = line[None, :] - shift[0], line[:, None] - shift[1]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def fourier_noise(
    rng: np.random.Generator, size_px: int, response: Callable[[Array, Array], Array]
) -> Array:
    """Gaussian noise of zero mean and unit variance with the amplitude spectrum `response`.

    `response(fx, fy)` gets frequencies in cycles per reference pixel.
    """
    scale = size_px / REFERENCE_PX
    fx = (np.fft.rfftfreq(size_px) * scale).astype(np.float32)[None, :]
    fy = (np.fft.fftfreq(size_px) * scale).astype(np.float32)[:, None]
    # The spectrum of white noise is white noise: drawn directly, one transform is saved.
    white = rng.standard_normal((size_px, size_px // 2 + 1, 2), dtype=np.float32)
    spectrum = white.view(np.complex64)[..., 0] * response(fx, fy)
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(size_px, size_px)).astype(np.float32)
    return field / max(float(field.std()), 1e-12)


def smooth_noise(rng: np.random.Generator, size_px: int, length: float) -> Array:
    """Noise without features smaller than `length`: the Gaussian spectrum."""
    return streak_noise(rng, size_px, length, length)


def streak_noise(
    rng: np.random.Generator, size_px: int, along: float, across: float, angle: float = 0.0
) -> Array:
    """Noise drawn out `along` by `across` reference pixels; angle 0 runs along x."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))

    def response(fx: Array, fy: Array) -> Array:
        u, v = fx * cos + fy * sin, fy * cos - fx * sin
        return np.exp(-10.0 * ((u * along) ** 2 + (v * across) ** 2))

    return fourier_noise(rng, size_px, response)


def fractal_noise(
    rng: np.random.Generator, size_px: int, largest: float, slope: float = 1.6
) -> Array:
    """Cloudy noise: amplitude falls as frequency ** -slope below the size `largest`."""

    def response(fx: Array, fy: Array) -> Array:
        return (fx * fx + fy * fy + np.float32(1 / largest**2)) ** np.float32(-slope / 2)

    return fourier_noise(rng, size_px, response)


def blur(field: Array, sigma: float) -> Array:
    """Gaussian blur of a (rows, columns[, channels]) field, mirrored at the edges; sigma in px."""
    radius = max(1, int(np.ceil(3 * sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        widths = [(radius, radius) if a == axis else (0, 0) for a in range(field.ndim)]
        padded = np.pad(field, widths, mode="symmetric")
        length = field.shape[axis]
        total = np.zeros_like(field)
        for tap, weight in enumerate(taps):
            part = padded[tap : tap + length] if axis == 0 else padded[:, tap : tap + length]
            total += weight * part
        field = total
    return field


def smoothstep(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, a cubic between; `low` may exceed `high`."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def inside(distance: Array, softness: float = 1.0) -> Array:
    """Antialiased indicator in [0, 1] of a negative signed distance; `softness` is a width."""
    return np.clip(0.5 - distance / softness, 0, 1)


def box_distance(x: Array, y: Array, half: tuple[float, float], corner: float) -> Array:
    """Signed distance to a box with rounded corners: negative inside."""
    qx, qy = np.abs(x) - (half[0] - corner), np.abs(y) - (half[1] - corner)
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    return outside + np.minimum(np.maximum(qx, qy), 0) - corner


def disc_distance(x: Array, y: Array, centre: tuple[float, float], radius: float) -> Array:
    """Signed distance to a disc: negative inside."""
    return np.hypot(x - centre[0], y - centre[1]) - radius


def path_distance(x: Array, y: Array, path: NDArray[Any]) -> tuple[Array, Array]:
    """Distance to a polyline and the place on it: two fields, the second in [0, 1].

    `path` is (points, 2) of x, y. The sign of the distance tells the side.
    """
    nearest = np.full(np.broadcast(x, y).shape, np.inf, dtype=np.float32)
    place = np.zeros_like(nearest)
    side = np.ones_like(nearest)
    steps = len(path) - 1
    for step, (start, end) in enumerate(pairwise(path)):
        ax, ay = float(start[0]), float(start[1])
        bx, by = float(end[0]) - ax, float(end[1]) - ay
        t = np.clip(((x - ax) * bx + (y - ay) * by) / max(bx * bx + by * by, 1e-9), 0, 1)
        dx, dy = x - ax - t * bx, y - ay - t * by
        squared = dx * dx + dy * dy
        closer = squared < nearest
        nearest = np.where(closer, squared, nearest)
        place = np.where(closer, (step + t) / steps, place)
        side = np.where(closer, np.sign(bx * dy - by * dx), side)
    return np.sqrt(nearest) * np.where(side < 0, -1, 1).astype(np.float32), place


def polygon_distance(x: Array, y: Array, corners: NDArray[Any]) -> Array:
    """Signed distance to a polygon (corners, 2): negative inside (even-odd rule)."""
    nearest = np.full(np.broadcast(x, y).shape, np.inf, dtype=np.float32)
    is_inside = np.zeros(nearest.shape, dtype=bool)
    for (ax, ay), (cx, cy) in zip(corners.tolist(), np.roll(corners, -1, 0).tolist(), strict=True):
        bx, by = cx - ax, cy - ay
        t = np.clip(((x - ax) * bx + (y - ay) * by) / max(bx * bx + by * by, 1e-9), 0, 1)
        nearest = np.minimum(nearest, (x - ax - t * bx) ** 2 + (y - ay - t * by) ** 2)
        crosses = (y < ay) != (y < cy)
        if ay != cy:
            is_inside ^= crosses & (x < ax + (y - ay) * bx / by)
    return np.sqrt(nearest) * np.where(is_inside, -1, 1).astype(np.float32)


def cells(
    rng: np.random.Generator, x: Array, y: Array, pitch: float, jitter: float = 0.46
) -> tuple[NDArray[np.int64], Array, int]:
    """Voronoi cells of a jittered lattice: cell number, distance to the border, count of cells.

    The distance is that to the bisector with the second nearest seed.
    """
    reach = int(1.6 * REFERENCE_PX / pitch) + 8  # the lattice covers a turned image and a margin
    lattice = np.arange(reach, dtype=np.float32) - reach // 2 + 0.5
    offset = (rng.random((2, reach, reach), dtype=np.float32) - 0.5) * np.float32(2 * jitter)
    seed_x = ((lattice[None, :] + offset[0]) * np.float32(pitch)).ravel()
    seed_y = ((lattice[:, None] + offset[1]) * np.float32(pitch)).ravel()
    column = np.clip(np.floor(x / pitch).astype(np.int64) + reach // 2, 1, reach - 2)
    row = np.clip(np.floor(y / pitch).astype(np.int64) + reach // 2, 1, reach - 2)
    home = row * reach + column
    first = np.full(home.shape, np.inf, dtype=np.float32)
    second, number, runner_up = first.copy(), home, home
    for step in [down * reach + right for down in (-1, 0, 1) for right in (-1, 0, 1)]:
        one = home + step
        dx, dy = x - seed_x[one], y - seed_y[one]
        squared = dx * dx + dy * dy
        wins = squared < first
        second_best = squared < second
        runner_up = np.where(wins, number, np.where(second_best, one, runner_up))
        second = np.where(wins, first, np.where(second_best, squared, second))
        number = np.where(wins, one, number)
        first = np.where(wins, squared, first)
    gap = np.hypot(seed_x[number] - seed_x[runner_up], seed_y[number] - seed_y[runner_up])
    return number, (second - first) / np.maximum(2 * gap, np.float32(1e-6)), reach * reach
