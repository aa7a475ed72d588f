"""A polished terrazzo tile in its grout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from builder.demo_camera import Surface
from builder.demo_noise import (
    REFERENCE_PX,
    Array,
    blur,
    box_distance,
    cells,
    fractal_noise,
    grid,
    inside,
    smooth_noise,
    smoothstep,
)
from builder.demo_surfaces import colour, mix, plain, shadow_of

TILE_HALF = (98.0, 98.0)
PALETTE = (
    (206, 203, 197), (200, 195, 187), (214, 211, 206), (187, 184, 180), (174, 173, 170),
    (156, 155, 154), (197, 188, 175), (190, 179, 164), (203, 198, 191), (182, 184, 182),
)  # fmt: skip


def _stones(
    rng: np.random.Generator, x: Array, y: Array, size_px: int, pitch: float, presence: float
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Stone chips of one size: signed distance (negative inside), albedo, number of the chip."""
    bend_x, bend_y = (0.07 * pitch * smooth_noise(rng, size_px, pitch * 0.5) for _ in range(2))
    ragged = 0.35 * fractal_noise(rng, size_px, 5.0, 1.0)
    number, border, count = cells(rng, x + bend_x, y + bend_y, pitch)
    margin = np.where(
        rng.random(count) < presence, pitch * rng.uniform(0.02, 0.17, count), 9.0 * pitch
    )
    shades = np.array([colour(*entry) for entry in PALETTE], dtype=np.float32)
    base = shades[rng.integers(0, len(PALETTE), count)]
    base = base * np.exp(0.045 * rng.standard_normal((count, 1))).astype(np.float32)
    vein = fractal_noise(rng, size_px, 18.0, 1.3)
    turn = rng.uniform(0.6, 1.6, count).astype(np.float32)[number]
    stone = base[number] * np.exp(0.08 * vein * turn)[..., None]
    return margin.astype(np.float32)[number] - border + ragged * 0.5, stone, number


def terrazzo(rng: np.random.Generator, size_px: int, missing: int | None = None) -> Surface:
    """A polished terrazzo tile in its grout; one of its large stones can have fallen out."""
    pixel = REFERENCE_PX / size_px
    angle = float(0.005 * rng.standard_normal())
    shift = rng.normal(0, 1.0, 2)
    x, y = grid(size_px, angle=angle, shift=(float(shift[0]), float(shift[1])))
    warm = 4 * rng.standard_normal()
    sand = fractal_noise(rng, size_px, 3.0, 0.5)
    cloud = fractal_noise(rng, size_px, 80.0, 1.8)
    cement = colour(198 + warm, 194 + 0.8 * warm, 185)
    cement = cement * np.exp(0.05 * sand + 0.03 * cloud)[..., None]
    albedo = cement
    turned = float(rng.uniform(0, np.pi / 2))
    u, v = x * np.cos(turned) + y * np.sin(turned), y * np.cos(turned) - x * np.sin(turned)
    rim = plain(size_px, 0.0)
    parts: list[Array] = []
    field = box_distance(x, y, TILE_HALF, 2.5)
    for pitch, presence in ((4.5, 0.55), (8.5, 0.45), (17.0, 0.5)):
        place = rng.uniform(0, pitch, 2).astype(np.float32)
        distance, stone, number = _stones(rng, u + place[0], v + place[1], size_px, pitch, presence)
        chip = inside(distance, pixel)
        albedo = mix(albedo, stone, chip)
        rim = rim * (1 - chip) + chip * 0.2
    loose = _loose_stones(distance, number, field)
    parts = [inside(np.where(number == one, distance, 9.0) - 0.6, pixel) for one in loose]
    albedo = albedo * np.exp(0.03 * cloud)[..., None]
    grout = colour(142, 140, 136) * np.exp(0.15 * sand + 0.10 * cloud)[..., None]
    # Joints cross at the corners and run on between the neighbours.
    joint_x, joint_y = (np.abs(np.abs(w) - TILE_HALF[0] - 4.0) for w in (x, y))
    joint = inside(np.minimum(joint_x, joint_y) - 4.0, pixel)
    albedo = mix(albedo, grout, joint)
    height = 1.1 * smoothstep(3.6, 6.0, np.minimum(joint_x, joint_y))
    height += 0.02 * cloud + joint * 0.16 * sand
    gloss = 0.055 * (1 - 0.9 * joint) * np.exp(0.06 * cloud)
    light = 1 - 0.35 * joint
    if missing is not None:
        hole = np.where(number == loose[missing], distance, 9.0)
        albedo, light, gloss, height = _socket(
            albedo, light, gloss, height, hole, cement, sand, size_px
        )
    return Surface(
        albedo=albedo.astype(np.float32),
        height=height.astype(np.float32),
        gloss=gloss.astype(np.float32),
        tilt=(0.004 * cloud, 0.004 * cloud),
        spread=(0.26, 0.26),
        light=np.asarray(light, dtype=np.float32),
        film=np.ones((size_px, size_px, 3), dtype=np.float32),
        core=colour(176, 171, 162) * np.exp(0.10 * sand + 0.05 * cloud)[..., None],
        edge=field,
        angle=angle,
        parts=parts,
    )


def _loose_stones(distance: Array, number: NDArray[np.int64], field: Array) -> list[int]:
    """Numbers of the large stones that lie wholly on the tile, the biggest eight."""
    area = np.bincount(number[(distance < 0) & (field < -4)], minlength=int(number.max()) + 1)
    touching = np.unique(number[(distance < 0) & (field >= -4)])
    area[touching] = 0
    order = np.argsort(-area, kind="stable")[:8]
    return [int(one) for one in order if area[one] > 0]


def _socket(
    albedo: Array,
    light: Array,
    gloss: Array,
    height: Array,
    hole: Array,
    cement: Array,
    sand: Array,
    size_px: int,
) -> tuple[Array, Array, Array, Array]:
    """The bed of a stone that has fallen out: rough cement, shaded by its rim."""
    bed = inside(hole, REFERENCE_PX / size_px)
    soft = blur(bed, 1.0 * size_px / REFERENCE_PX)
    shadow = bed * inside(-shadow_of(hole, size_px, 4.5), 4.0)
    albedo = mix(albedo, 0.62 * cement * np.exp(0.14 * sand)[..., None], bed)
    return (
        albedo,
        light * (1 - 0.85 * shadow),
        gloss * (1 - 0.92 * bed),
        height - 2.6 * soft * bed + bed * 0.35 * sand,
    )
