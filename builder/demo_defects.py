"""Four kinds of defect on the demo's parts, each with the coverage that its mask is made of.

A defect changes a surface (relief, colour, gloss), never a photograph: highlight and shadow come
from the same lamp as the part's. Every function returns the changed surface and its coverage in
[0, 1], and leaves the surface that it is given alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.demo_camera import Surface
from builder.demo_noise import (
    REFERENCE_PX,
    Array,
    fractal_noise,
    grid,
    inside,
    path_distance,
    polygon_distance,
    smooth_noise,
    smoothstep,
)
from builder.demo_surfaces import colour, mix, shadow_of

Changed = tuple[Surface, Array]


def _spot(
    rng: np.random.Generator, surface: Surface, depth: float, reach: float = 98.0
) -> tuple[float, float]:
    """A point at least `depth` reference pixels inside the part's outline."""
    size_px = surface.height.shape[0]
    x, y = grid(size_px)
    allowed = (surface.edge < -depth) & (np.maximum(np.abs(x), np.abs(y)) < reach)
    places = np.flatnonzero(allowed)
    row, column = divmod(int(places[rng.integers(len(places))]), size_px)
    return float(x[0, column]), float(y[row, 0])


def _curve(rng: np.random.Generator, middle: tuple[float, float], length: float) -> NDArray[Any]:
    """A gently bending path (points, 2) through `middle`, with a slight tremor."""
    count = 22
    bend = rng.normal(0, 0.5) + rng.normal(0, 0.9) * np.linspace(-1, 1, count)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(bend + 0.35 * rng.standard_normal(count)) / 22
    step = length / (count - 1)
    path = np.cumsum(step * np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    return path - path[count // 2] + np.array(middle)


def scratch(product: str, surface: Surface, rng: np.random.Generator) -> Changed:
    """A groove of varying width with raised burrs, pressed harder in some places than in others."""
    size_px = surface.height.shape[0]
    pixel = REFERENCE_PX / size_px
    x, y = grid(size_px)
    middle = _spot(rng, surface, 6.0)
    length = float(np.exp(rng.uniform(np.log(34), np.log(150))))
    width = rng.uniform(0.75, 1.9) * max(1.0, 0.8 * pixel)
    strength = rng.uniform(0.45, 1.0)
    path = _curve(rng, middle, length)
    lines = [path]
    if rng.random() < 0.35:  # the same grit often leaves a second, shorter line
        first = int(rng.integers(0, 8))
        lines.append(path[first : first + 11] + rng.uniform(2.5, 5.5) * rng.choice([-1, 1]))
    groove, burr, cover = (np.zeros_like(surface.height) for _ in range(3))
    for line in lines:
        distance, place = path_distance(x, y, line)
        knots = rng.uniform(0.35, 1.0, 9) * np.array([0.3, 0.8, 1, 1, 1, 1, 1, 0.8, 0.25])
        half = (width * np.interp(place, np.linspace(0, 1, 9), knots)).astype(np.float32)
        depth = np.maximum(1 - (distance / np.maximum(half, 0.2)) ** 2, 0) * half
        groove = np.maximum(groove, depth)
        burr = np.maximum(burr, np.exp(-(((np.abs(distance) - 1.35 * half) / 0.55) ** 2)) * half)
        cover = np.maximum(cover, inside(np.abs(distance) - 1.35 * half - 0.2, pixel))
    on_part = inside(surface.edge + 0.5, pixel)
    groove, burr, cover = groove * on_part, burr * on_part, cover * on_part
    deepness = strength * {"plate": 0.85, "plank": 1.2, "terrazzo": 1.0}[product]
    # A scratch shows the bare material, or the dirt that has settled in it.
    bare = {"plate": (225, 226, 228), "plank": (108, 76, 48), "terrazzo": (248, 247, 244)}[product]
    if product != "plank" and rng.random() < 0.5:
        bare = (70, 68, 66)
    share = np.clip(
        groove * strength * {"plate": 0.6, "plank": 0.75, "terrazzo": 1.0}[product], 0, 0.85
    )
    dull = 1 - 0.75 * np.clip(groove * strength, 0, 1)
    return replace(
        surface,
        height=surface.height - deepness * groove + 0.5 * deepness * burr,
        albedo=mix(surface.albedo, colour(*bare), share),
        gloss=surface.gloss * dull,
    ), cover


def _shard(
    rng: np.random.Generator,
    centre: tuple[float, float],
    radius: float,
    stretch: float,
    turn: float,
) -> NDArray[Any]:
    """Corners of an irregular polygon, longer along `turn` by `stretch`."""
    count = int(rng.integers(6, 10))
    angles = np.sort((np.arange(count) + rng.uniform(-0.38, 0.38, count)) * 2 * np.pi / count)
    reach = radius * rng.uniform(0.6, 1.2, count)
    along, across = reach * np.cos(angles) * stretch, reach * np.sin(angles) / np.sqrt(stretch)
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack([along * cos - across * sin, along * sin + across * cos], 1) + np.array(centre)


def _rim_spot(rng: np.random.Generator, surface: Surface, inward: float) -> tuple[float, float]:
    """A point near the part's outline; `inward` is its signed distance to it."""
    size_px = surface.height.shape[0]
    x, y = grid(size_px)
    close = np.abs(surface.edge - inward) < 1.2 * REFERENCE_PX / size_px
    places = np.flatnonzero(close & (np.maximum(np.abs(x), np.abs(y)) < 107))
    row, column = divmod(int(places[rng.integers(len(places))]), size_px)
    return float(x[0, column]), float(y[row, 0])


def chip(product: str, surface: Surface, rng: np.random.Generator) -> Changed:
    """An angular piece broken off: out of a plate's or tile's outline, out of a board's face."""
    size_px = surface.height.shape[0]
    pixel = REFERENCE_PX / size_px
    x, y = grid(size_px)
    radius = float(np.exp(rng.uniform(np.log(8.5), np.log(20))))
    if product == "plank":
        centre, stretch, turn = _spot(rng, surface, 0.0, 100.0), rng.uniform(1.3, 2.4), np.pi / 2
        turn += surface.angle + rng.normal(0, 0.08)
    else:
        inward = rng.uniform(0.15, 0.5) if product == "plate" else rng.uniform(0.3, 0.75)
        centre = _rim_spot(rng, surface, -inward * radius)
        stretch, turn = rng.uniform(1.0, 1.5), rng.uniform(0, np.pi)
    outline = polygon_distance(x, y, _shard(rng, centre, radius, float(stretch), float(turn)))
    ragged = fractal_noise(rng, size_px, 9.0, 1.2)
    outline = outline + {"plate": 0.35, "plank": 0.9, "terrazzo": 0.7}[product] * ragged
    if product == "plate":
        return _broken_edge(surface, outline, ragged)
    reach = np.maximum(outline, surface.edge + 1.0)
    cover = inside(reach, pixel)
    relief = _fracture(rng, x - centre[0], y - centre[1], radius, ragged)
    depth = smoothstep(0.0, -0.55 * radius, reach) * (2.8 + 0.12 * radius) + cover * relief
    shadow = cover * inside(-shadow_of(reach, size_px, 2.6), 3.0)
    crumbs = np.exp(0.10 * ragged)[..., None]
    return replace(
        surface,
        height=surface.height * (1 - cover) + cover * surface.height - depth * cover,
        albedo=mix(surface.albedo, surface.core * crumbs, 0.92 * cover),
        gloss=surface.gloss * (1 - 0.95 * cover),
        light=surface.light * (1 - 0.55 * shadow),
        tilt=(surface.tilt[0] * (1 - cover), surface.tilt[1] * (1 - cover)),
    ), cover


def _fracture(rng: np.random.Generator, x: Array, y: Array, radius: float, ragged: Array) -> Array:
    """Relief of a fracture: the upper envelope of a few tilted planes, roughened."""
    planes = [
        (rng.normal(0, 0.22) * x + rng.normal(0, 0.22) * y + rng.normal(0, 0.06) * radius)
        for _ in range(4)
    ]
    return np.maximum.reduce(planes).astype(np.float32) + 0.28 * ragged


def _broken_edge(surface: Surface, outline: Array, ragged: Array) -> Changed:
    """A piece broken out of the plate: the belt shows, the fracture is a bright granular rim."""
    size_px = surface.height.shape[0]
    pixel = REFERENCE_PX / size_px
    on_part = inside(surface.edge, pixel)
    gone = inside(outline, pixel) * inside(surface.edge - 1.2 * pixel, pixel)
    rim = on_part * smoothstep(3.4, 1.2, outline) * (1 - inside(outline, pixel))
    shadow = inside(-shadow_of(outline, size_px, 2.6), 3.0)
    shadow = shadow * inside(shadow_of(surface.edge, size_px, 2.6), 3.0)
    granular = colour(150, 150, 152) * np.exp(0.22 * ragged)[..., None]
    return replace(
        surface,
        albedo=mix(mix(surface.albedo, surface.core, gone), granular, 0.8 * rim),
        height=surface.height * (1 - gone) - rim * (0.9 + 0.25 * ragged),
        gloss=surface.gloss * (1 - gone) * (1 - 0.75 * rim),
        light=surface.light * (1 - gone * 0.7 * shadow),
    ), np.maximum(gone, rim)


def stain(product: str, surface: Surface, rng: np.random.Generator) -> Changed:
    """A dried liquid: transparent, outlined by noise contours, darkest along its drying rim."""
    size_px = surface.height.shape[0]
    pixel = REFERENCE_PX / size_px
    x, y = grid(size_px)
    radius = float(np.exp(rng.uniform(np.log(9), np.log(34))))
    centre = _spot(rng, surface, 3.0, 96.0)
    shape = smooth_noise(rng, size_px, 1.6 * radius)
    ripple = fractal_noise(rng, size_px, 0.7 * radius, 2.3)
    stretch = rng.uniform(0.75, 1.3)
    distance = np.hypot((x - centre[0]) * stretch, (y - centre[1]) / stretch)
    outline = distance - radius * (1 + 0.25 * shape + 0.07 * ripple)
    for _ in range(int(rng.integers(0, 4))):  # droplets beside the pool
        turn, away = rng.uniform(0, 2 * np.pi), radius * rng.uniform(1.15, 1.9)
        drop = (centre[0] + away * np.cos(turn), centre[1] + away * np.sin(turn))
        size = radius * rng.uniform(0.08, 0.26) + 1.2
        outline = np.minimum(
            outline, np.hypot(x - drop[0], y - drop[1]) - size * (1 + 0.2 * ripple)
        )
    on_part = inside(surface.edge + 1.0, pixel)
    cover = inside(outline, 1.4 * pixel) * on_part
    width = rng.uniform(1.3, 2.6)
    rim = np.exp(-(((outline + 1.1 * width) / width) ** 2)) * (1 + 0.25 * ripple)
    tide = np.exp(-(((outline + rng.uniform(0.25, 0.5) * radius) / (1.6 * width)) ** 2))
    body = 0.55 + 0.16 * ripple + 0.20 * smoothstep(-radius, 0, outline)
    density = rng.uniform(0.30, 0.85) * np.clip(body + 0.85 * rim + 0.22 * tide, 0.3, 1.9) * cover
    tints = ((0.30, 0.62, 1.10), (0.45, 0.60, 0.80), (0.62, 0.55, 0.50), (0.55, 0.68, 0.58))
    absorb = np.array(tints[int(rng.integers(len(tints)))], dtype=np.float32)
    film = np.exp(-0.75 * density[..., None] * absorb)
    wet = rng.uniform(-0.4, 0.5) if product != "plate" else rng.uniform(-0.5, -0.1)
    return replace(
        surface,
        film=(surface.film * film).astype(np.float32),
        gloss=surface.gloss * (1 + wet * cover),
        height=surface.height + 0.10 * rim * cover,
    ), cover


DEFECTS: dict[str, Callable[[str, Surface, np.random.Generator], Changed]] = {
    "chip": chip,
    "scratch": scratch,
    "stain": stain,
}
KINDS = ("chip", "missing_part", "scratch", "stain")
