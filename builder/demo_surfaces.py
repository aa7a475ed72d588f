"""The three parts of the demo set: a stamped plate, a planed board, a terrazzo tile.

Each function draws one part. `missing` is the index of the feature that is left out; it changes
no other draw, so the part with and without the feature are the same part.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from builder.demo_camera import Surface
from builder.demo_noise import (
    REFERENCE_PX,
    Array,
    blur,
    box_distance,
    cells,
    disc_distance,
    fourier_noise,
    fractal_noise,
    grid,
    inside,
    smooth_noise,
    smoothstep,
    streak_noise,
)

LIGHT_SIDE = (-0.62, -0.78)  # where the lamp stands, seen in the picture


def colour(red: float, green: float, blue: float) -> Array:
    """Linear RGB of an sRGB colour given as grey values."""
    return (np.array([red, green, blue], dtype=np.float32) / 255) ** np.float32(2.2)


def mix(low: Array, high: Array, share: Array) -> Array:
    """Blend two colours or colour fields by a field (rows, columns)."""
    return low + (high - low) * share[..., None]


def plain(size_px: int, value: float) -> Array:
    """A constant field."""
    return np.full((size_px, size_px), value, dtype=np.float32)


# --- metal -------------------------------------------------------------------------------------

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


def metal(rng: np.random.Generator, size_px: int, missing: int | None = None) -> Surface:
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
    shadow = inside(_shadow_of(edge, size_px, 5.0), 7.0)
    light = 1 - (1 - plate) * (0.78 * shadow)
    contact = np.exp(-np.maximum(edge, 0) / 4.0) * (1 - plate)
    albedo *= (1 - 0.45 * contact)[..., None]
    wall = (1 - plate) * _lit_wall(edge, size_px, 3.2)
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
        core=belt * 0.8,
        edge=edge,
        angle=angle,
        parts=parts,
    )


def _shadow_of(edge: Array, size_px: int, reach: float) -> Array:
    """The signed distance field moved away from the lamp by `reach` reference pixels."""
    step = reach * size_px / REFERENCE_PX
    return np.roll(edge, (round(-LIGHT_SIDE[1] * step), round(-LIGHT_SIDE[0] * step)), (0, 1))


def _lit_wall(edge: Array, size_px: int, width: float) -> Array:
    """The strip of a hole's inner wall that faces the lamp: on the hole's lower right."""
    gradient_y, gradient_x = np.gradient(edge, np.float32(REFERENCE_PX / size_px))
    # `edge` grows into the hole; the far wall is where it grows against the light.
    facing = np.maximum(gradient_x * LIGHT_SIDE[0] + gradient_y * LIGHT_SIDE[1], 0)
    return facing * smoothstep(width, 0.0, edge) * smoothstep(-1.0, 0.5, edge)


def _shade_side(x: Array, y: Array, centre: tuple[float, float]) -> Array:
    """1 on the side away from the lamp, -1 on the lamp's side."""
    dx, dy = x - centre[0], y - centre[1]
    return -(dx * LIGHT_SIDE[0] + dy * LIGHT_SIDE[1]) / (np.hypot(dx, dy) + 1e-3)


# --- wood --------------------------------------------------------------------------------------

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


def wood(rng: np.random.Generator, size_px: int, missing: int | None = None) -> Surface:
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
    pores = streak_noise(rng, size_px, 9.0, 0.5, along)
    open_pore = smoothstep(1.1, 2.6, pores - 1.5 * (part - 0.35))
    shade = 5 * rng.standard_normal()
    early = colour(206 + shade, 168 + shade, 122 + 0.8 * shade)
    dark = colour(158 + shade, 112 + shade, 70 + 0.8 * shade)
    share = np.clip(0.95 * late + 0.10 * strand + 0.06 * fibre, 0, 1.15)
    albedo = mix(early, dark, share)
    albedo = albedo * np.exp(0.055 * fibre + 0.05 * strand + 0.05 * cloud)[..., None]
    albedo = mix(albedo, 0.5 * dark, 0.55 * open_pore)
    height = 0.05 * fibre - 0.22 * open_pore + 0.10 * late
    gloss = 0.035 * np.exp(0.35 * fibre - 0.5 * open_pore)
    light = plain(size_px, 1.0)
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
        gloss = gloss * (1 - disc) + 0.045 * disc
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
    wall = disc * _lit_wall(-distance, size_px, 5.0)
    shadow = inside(_shadow_of(distance, size_px, 9.0), 6.0)
    floor = colour(120, 84, 54) * (0.25 + 0.45 * shadow)[..., None]
    floor = mix(floor, colour(188, 148, 104), 0.85 * wall)
    light = light * (1 - disc * (1 - 0.15 - 0.85 * np.maximum(wall, 0.5 * shadow)))
    return mix(albedo, floor, disc), light, gloss * (1 - disc), height * (1 - disc)


# --- tile --------------------------------------------------------------------------------------

TILE_HALF = (116.0, 116.0)
PALETTE = (
    (212, 209, 202), (202, 197, 188), (220, 217, 211), (186, 183, 178), (168, 167, 164),
    (146, 145, 145), (200, 190, 174), (192, 178, 158), (208, 203, 194), (178, 181, 178),
)  # fmt: skip


def _stones(
    rng: np.random.Generator, x: Array, y: Array, size_px: int, pitch: float, presence: float
) -> tuple[Array, Array, Array]:
    """Stone chips of one size: signed distance (negative inside), albedo, number of the chip."""
    bend_x, bend_y = (0.07 * pitch * smooth_noise(rng, size_px, pitch * 0.5) for _ in range(2))
    ragged = 0.35 * fractal_noise(rng, size_px, 5.0, 1.0)
    number, border = cells(rng, x + bend_x, y + bend_y, pitch)
    count = int(number.max()) + 1
    margin = np.where(
        rng.random(count) < presence, pitch * rng.uniform(0.02, 0.17, count), 9.0 * pitch
    )
    shades = np.array([colour(*entry) for entry in PALETTE], dtype=np.float32)
    base = shades[rng.integers(0, len(PALETTE), count)]
    base = base * np.exp(0.06 * rng.standard_normal((count, 1))).astype(np.float32)
    vein = fractal_noise(rng, size_px, 18.0, 1.3)
    turn = rng.uniform(0.6, 1.6, count).astype(np.float32)[number]
    stone = base[number] * np.exp(0.12 * vein * turn)[..., None]
    return margin.astype(np.float32)[number] - border + ragged * 0.5, stone, number


def tile(rng: np.random.Generator, size_px: int, missing: int | None = None) -> Surface:
    """A polished terrazzo tile in its grout; one of its large stones can have fallen out."""
    pixel = REFERENCE_PX / size_px
    angle = float(0.009 * rng.standard_normal())
    shift = rng.normal(0, 1.6, 2)
    x, y = grid(size_px, angle=angle, shift=(float(shift[0]), float(shift[1])))
    warm = 4 * rng.standard_normal()
    sand = fractal_noise(rng, size_px, 3.0, 0.5)
    cloud = fractal_noise(rng, size_px, 80.0, 1.8)
    cement = colour(198 + warm, 194 + 0.8 * warm, 185)
    cement = cement * np.exp(0.07 * sand + 0.04 * cloud)[..., None]
    albedo = cement
    turned = float(rng.uniform(0, np.pi / 2))
    u, v = x * np.cos(turned) + y * np.sin(turned), y * np.cos(turned) - x * np.sin(turned)
    rim = plain(size_px, 0.0)
    parts: list[Array] = []
    field = box_distance(x, y, TILE_HALF, 2.5)
    for pitch, presence in ((4.5, 0.62), (8.5, 0.5), (18.0, 0.5)):
        place = rng.uniform(0, pitch, 2).astype(np.float32)
        distance, stone, number = _stones(
            rng, u + place[0], v + place[1], size_px, pitch, presence
        )
        chip = inside(distance, pixel)
        albedo = mix(albedo, stone, chip)
        rim = rim * (1 - chip) + chip * 0.2
    loose = _loose_stones(distance, number, field)
    parts = [inside(np.where(number == one, distance, 9.0) - 0.6, pixel) for one in loose]
    albedo = albedo * np.exp(0.03 * cloud)[..., None]
    inner = inside(field, pixel)
    grout = colour(142, 140, 136) * np.exp(0.13 * sand + 0.08 * cloud)[..., None]
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
        core=colour(166, 156, 142) * np.exp(0.10 * sand + 0.05 * cloud)[..., None],
        edge=field,
        angle=angle,
        parts=parts,
    )


def _loose_stones(distance: Array, number: Array, field: Array) -> list[int]:
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
    shadow = bed * inside(-_shadow_of(hole, size_px, 4.5), 4.0)
    albedo = mix(albedo, 0.62 * cement * np.exp(0.14 * sand)[..., None], bed)
    return (
        albedo,
        light * (1 - 0.85 * shadow),
        gloss * (1 - 0.92 * bed),
        height - 2.6 * soft * bed + bed * 0.35 * sand,
    )


PRODUCTS: dict[str, Callable[..., Surface]] = {"metal": metal, "tile": tile, "wood": wood}
