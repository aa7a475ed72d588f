"""A planed oak board with walnut plugs."""

from __future__ import annotations

import numpy as np

from builder.demo_camera import Surface
from builder.demo_noise import (
    REFERENCE_PX,
    Array,
    disc_distance,
    fourier_noise,
    grid,
    inside,
    smoothstep,
    streak_noise,
)
from builder.demo_surfaces import colour, lit_wall, mix, plain, shadow_of

PLUGS = ((0.0, -66.0), (0.0, 66.0))
PLUG_RADIUS = 13.0


def _rings(rng: np.random.Generator, u: Array, v: Array, size_px: int) -> tuple[Array, Array]:
    """Year rings on a plain-sawn board: share of latewood [0, 1] and a shade per ring.

    The board is a plane cut through a slightly conical trunk: rings are arcs around the pith, and
    the taper turns them into arches along the board.
    """
    bend = 7.0 * streak_noise(rng, size_px, 150.0, 45.0, np.pi / 2)
    ripple = 0.9 * streak_noise(rng, size_px, 34.0, 9.0, np.pi / 2)
    across = u - rng.uniform(-70, 70) + bend
    depth = rng.uniform(18, 70) + rng.choice([-1.0, 1.0]) * rng.uniform(0.18, 0.42) * v
    depth = depth + 5.0 * streak_noise(rng, size_px, 120.0, 70.0, np.pi / 2)
    radius = np.hypot(across, np.maximum(depth, 0.3 * depth)) + ripple
    widths = rng.uniform(6.0, 12.0) * np.exp(0.28 * rng.standard_normal(64))
    borders = np.concatenate([[-40.0], np.cumsum(widths) - 30.0])
    phase = np.interp(radius, borders, np.arange(len(borders))).astype(np.float32)
    number = np.floor(phase).astype(np.int64)
    part = phase - number
    pixel = REFERENCE_PX / size_px
    local = widths[np.minimum(number, 63)].astype(np.float32)
    soft = np.clip(1.2 * pixel / local, 0.05, 0.4)
    late = part**2.6 * smoothstep(0.0, 1.0, (1 - part) / soft)
    strength = np.clip(0.75 + 0.22 * rng.standard_normal(66), 0.3, 1.2).astype(np.float32)
    return late * strength[number], part


def plank(rng: np.random.Generator, size_px: int, missing: int | None = None) -> Surface:
    """A planed oak board with two flush walnut plugs, either of which can be missing."""
    pixel = REFERENCE_PX / size_px
    angle = float(0.02 * rng.standard_normal())
    shift = rng.normal(0, 2.0, 2)
    u, v = grid(size_px, angle=angle, shift=(float(shift[0]), float(shift[1])))
    along = np.pi / 2 + angle
    late, part = _rings(rng, u, v, size_px)
    fibre = streak_noise(rng, size_px, 38.0, 0.6, along)
    fibre = 0.8 * fibre + 0.6 * streak_noise(rng, size_px, 14.0, 0.4, along)
    strand = streak_noise(rng, size_px, 120.0, 3.5, along)
    cloud = streak_noise(rng, size_px, 160.0, 50.0, along)
    pores = streak_noise(rng, size_px, 8.0, 0.4, along)
    open_pore = smoothstep(1.1, 2.6, pores - 1.5 * (part - 0.35))
    shade, red = 5 * rng.standard_normal(), 2.5 * rng.standard_normal()
    early = colour(204 + shade + red, 167 + shade, 122 + 0.8 * shade - red)
    dark = colour(154 + shade + red, 108 + shade, 68 + 0.8 * shade - red)
    share = np.clip(0.95 * late + 0.10 * strand + 0.06 * fibre, 0, 1.15)
    albedo = mix(early, dark, share)
    albedo = albedo * np.exp(0.062 * fibre + 0.05 * strand + 0.06 * cloud)[..., None]
    albedo = mix(albedo, 0.5 * dark, 0.55 * open_pore)
    height = 0.05 * fibre - 0.22 * open_pore + 0.10 * late
    gloss: Array = 0.035 * np.exp(0.35 * fibre - 0.5 * open_pore)
    light: Array = plain(size_px, 1.0)
    edge = plain(size_px, -60.0)
    parts = []
    for index, centre in enumerate(PLUGS):
        jitter = rng.normal(0, 0.8, 2)
        place = (centre[0] + float(jitter[0]), centre[1] + float(jitter[1]))
        distance = disc_distance(u, v, place, PLUG_RADIUS)
        disc = inside(distance, pixel)
        parts.append(inside(distance - 1.2, pixel))
        end_grain = _end_grain(rng, u - place[0], v - place[1], size_px)
        seam = np.exp(-((distance / 0.8) ** 2))
        if index == missing:
            albedo, light, gloss, height = _empty_hole(
                albedo, light, gloss, height, distance, size_px
            )
            continue
        albedo = mix(albedo, end_grain, disc)
        albedo *= (1 - 0.5 * seam)[..., None]
        height = height * (1 - disc) + disc * 0.25 - 0.35 * seam
        gloss = gloss + (0.045 - gloss) * disc
    fresh = mix(colour(222, 190, 146), colour(150, 108, 70), np.clip(0.5 + 0.3 * fibre, 0, 1))
    return Surface(
        albedo=albedo.astype(np.float32),
        height=height.astype(np.float32),
        gloss=gloss.astype(np.float32),
        tilt=(0.02 * fibre, plain(size_px, 0.0)),
        spread=(0.55, 0.45),
        light=light,
        film=np.ones((size_px, size_px, 3), dtype=np.float32),
        core=fresh,
        edge=edge,
        angle=angle,
        parts=parts,
    )


def _end_grain(rng: np.random.Generator, x: Array, y: Array, size_px: int) -> Array:
    """Albedo of a walnut plug cut across the grain: narrow arcs and round pores."""
    away = rng.uniform(30, 60)
    turn = rng.uniform(0, 2 * np.pi)
    rough = fourier_noise(rng, size_px, lambda fx, fy: np.exp(-6 * (fx * fx + fy * fy)))
    radius = np.hypot(x - away * np.cos(turn), y - away * np.sin(turn))
    arcs = 0.5 + 0.5 * np.sin(radius * rng.uniform(1.1, 1.6) + 0.5 * rough)
    shade = 4 * rng.standard_normal()
    brown = mix(colour(112 + shade, 76 + shade, 50), colour(84 + shade, 54 + shade, 36), arcs)
    return brown * np.exp(0.10 * rough)[..., None]


def _empty_hole(
    albedo: Array, light: Array, gloss: Array, height: Array, distance: Array, size_px: int
) -> tuple[Array, Array, Array, Array]:
    """A drilled hole where the plug should sit: dark floor, lit far wall, crisp rim."""
    disc = inside(distance, REFERENCE_PX / size_px)
    wall = disc * lit_wall(-distance, size_px, 5.0)
    shadow = inside(shadow_of(distance, size_px, 9.0), 6.0)
    floor = colour(120, 84, 54) * (0.25 + 0.45 * shadow)[..., None]
    floor = mix(floor, colour(188, 148, 104), 0.85 * wall)
    light = light * (1 - disc * (1 - 0.15 - 0.85 * np.maximum(wall, 0.5 * shadow)))
    return mix(albedo, floor, disc), light, gloss * (1 - disc), height * (1 - disc)
