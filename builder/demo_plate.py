"""A stamped plate of brushed steel on a conveyor belt."""

from __future__ import annotations

import numpy as np

from builder.demo_camera import Surface
from builder.demo_noise import (
    REFERENCE_PX,
    Array,
    box_distance,
    disc_distance,
    fractal_noise,
    grid,
    inside,
    smooth_noise,
    smoothstep,
    streak_noise,
)
from builder.demo_surfaces import LIGHT_SIDE, colour, lit_wall, mix, shadow_of

PLATE_HALF = (106.0, 88.0)
SCREWS = ((-86.0, -68.0), (86.0, -68.0), (86.0, 68.0), (-86.0, 68.0))
SLOTS = ((-64.0, 0.0), (64.0, 0.0))


def _belt(rng: np.random.Generator, size_px: int) -> tuple[Array, Array]:
    """A grey-green conveyor belt: albedo and height of its weave."""
    x, y = grid(size_px, angle=0.02 * rng.standard_normal(), shift=tuple(rng.uniform(0, 9, 2)))
    wander = 0.5 * smooth_noise(rng, size_px, 30.0)
    weave = np.sin((x + wander) * 1.05) * np.sin((y + wander) * 1.05)
    dirt = fractal_noise(rng, size_px, 60.0, 1.3)
    grain = fractal_noise(rng, size_px, 4.0, 0.6)
    tone = np.exp(0.06 * dirt + 0.16 * grain + 0.12 * weave)
    return colour(58, 66, 64) * tone[..., None], 0.2 * weave + 0.16 * grain


def _slot_distance(x: Array, y: Array, centre: tuple[float, float]) -> Array:
    return box_distance(x - centre[0], y - centre[1], (7.0, 24.0), 7.0)


def _brush(rng: np.random.Generator, size_px: int, angle: float) -> tuple[Array, Array]:
    """Brush marks: fine relief (unit variance) and the coarser wander of the strokes' slope."""
    fine = streak_noise(rng, size_px, 46.0, 0.9, angle)
    middle = streak_noise(rng, size_px, 110.0, 2.2, angle + 0.006)
    coarse = streak_noise(rng, size_px, 170.0, 7.0, angle)
    depth = np.exp(0.35 * streak_noise(rng, size_px, 90.0, 12.0, angle))
    grain = streak_noise(rng, size_px, 5.0, 0.7, angle)
    return (0.62 * fine + 0.38 * middle + 0.22 * coarse + 0.2 * grain) * depth, middle + coarse


def _screw(
    rng: np.random.Generator, x: Array, y: Array, centre: tuple[float, float]
) -> tuple[Array, Array, Array]:
    """A button-head screw: signed distance, height of its dome, depth of its hexagonal socket."""
    dx, dy = x - centre[0], y - centre[1]
    radius = np.hypot(dx, dy)
    turn = np.arctan2(dy, dx) + rng.uniform(0, 2 * np.pi)
    sector = np.float32(np.pi / 3)
    hexagon = radius * np.cos(np.mod(turn, sector) - sector / 2) - 4.4
    dome = 2.6 * np.sqrt(np.maximum(1 - (radius / 11.5) ** 2, 0))
    return radius - 10.0, dome.astype(np.float32), inside(hexagon, 1.4)


def plate(rng: np.random.Generator, size_px: int, missing: int | None = None) -> Surface:
    """A brushed steel plate with a collared bore, two slots and four screws, on a conveyor belt.

    Features that can be missing: screws 0 to 3 (an empty hole is left), slots 4 and 5 (unpunched).
    """
    pixel = REFERENCE_PX / size_px
    angle = float(0.018 * rng.standard_normal())
    shift = rng.normal(0, 1.8, 2)
    x, y = grid(size_px, angle=angle, shift=(float(shift[0]), float(shift[1])))
    belt, weave = _belt(rng, size_px)
    brush, wander = _brush(rng, size_px, angle)
    cloud = fractal_noise(rng, size_px, 90.0, 1.8)
    tint = colour(*(np.array([203, 203, 200]) + rng.normal(0, 1.5, 3)))

    outline = box_distance(x, y, PLATE_HALF, 15.0)
    bore = disc_distance(x, y, (0.0, 0.0), 25.0)
    collar = np.hypot(x, y)
    edge = np.maximum(outline, -bore)
    for index, centre in enumerate(SLOTS, start=4):
        if index != missing:
            edge = np.maximum(edge, -_slot_distance(x, y, centre))
    for index, centre in enumerate(SCREWS):
        if index == missing:
            edge = np.maximum(edge, -disc_distance(x, y, centre, 6.2))
    plate = inside(edge, pixel)

    height = 1.5 * smoothstep(0.6, -2.6, edge)
    height += 2.0 * smoothstep(46.5, 41.0, collar) * smoothstep(30.5, 36.0, collar)
    height += plate * 0.12 * smooth_noise(rng, size_px, 60.0)
    steel = tint * np.exp(0.05 * brush + 0.035 * cloud)[..., None]
    albedo = mix(belt, 0.22 * steel, plate)
    gloss = 0.008 + plate * (0.42 * np.exp(0.10 * brush + 0.03 * wander) - 0.008)

    # The plate stands 8 px above the belt: its shadow falls to the lower right, and into holes.
    shadow = inside(shadow_of(edge, size_px, 5.0), 7.0)
    light = 1 - (1 - plate) * (0.78 * shadow)
    contact = np.exp(-np.maximum(edge, 0) / 4.0) * (1 - plate)
    albedo *= (1 - 0.45 * contact)[..., None]
    wall = (1 - plate) * lit_wall(edge, size_px, 3.2)
    albedo = mix(albedo, colour(120, 120, 118), 0.75 * wall)
    height = height + (1 - plate) * weave * smoothstep(0, 3, edge)

    tilt_x = (0.0035 * wander + 0.004 * brush) * plate
    tilt_y = 0.05 * brush * plate
    zinc = colour(176, 180, 186)
    for index, centre in enumerate(SCREWS):
        distance, dome, socket = _screw(rng, x, y, centre)
        if index == missing:
            continue
        head = inside(distance, pixel)
        ring = np.exp(-((np.maximum(distance, 0) / 2.2) ** 2)) * (1 - head)
        light = light * (1 - 0.5 * ring * (0.5 + 0.5 * _shade_side(x, y, centre)))
        height = height * (1 - head) + head * (1.5 + dome - 1.1 * socket)
        albedo = mix(albedo, zinc * 0.5, head)
        albedo *= (1 - 0.84 * socket * head)[..., None]
        gloss = gloss * (1 - head) + head * 0.34 * (1 - 0.9 * socket)
        tilt_x, tilt_y = tilt_x * (1 - head), tilt_y * (1 - head)
    parts = [inside(disc_distance(x, y, centre, 11.5), pixel) for centre in SCREWS]
    parts += [inside(_slot_distance(x, y, centre) - 3.0, pixel) for centre in SLOTS]
    return Surface(
        albedo=albedo,
        height=height,
        gloss=gloss.astype(np.float32),
        tilt=(tilt_x, tilt_y),
        spread=(0.085, 0.62),
        light=light.astype(np.float32),
        film=np.ones((size_px, size_px, 3), dtype=np.float32),
        core=0.92 * belt,
        edge=edge,
        angle=angle,
        parts=parts,
    )


def _shade_side(x: Array, y: Array, centre: tuple[float, float]) -> Array:
    """1 on the side away from the lamp, -1 on the lamp's side."""
    dx, dy = x - centre[0], y - centre[1]
    return -(dx * LIGHT_SIDE[0] + dy * LIGHT_SIDE[1]) / (np.hypot(dx, dy) + 1e-3)
