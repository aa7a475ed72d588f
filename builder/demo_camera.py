"""From a surface to a photograph: a lamp with two soft boxes, a lens, a sensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from builder.demo_noise import REFERENCE_PX, Array, blur, grid, smooth_noise


@dataclass
class Surface:
    """What the camera looks at; arrays (rows, columns[, 3]) float32.

    albedo: diffuse colour, linear, [0, 1]. height: reference pixels. tilt: slopes in x and y that
    only the gloss sees (brush marks). gloss: mirror reflectance [0, 1]. spread: width of the
    reflected soft box in x and y. light: share of the lamp that arrives (cast shadows). film:
    transmission of what lies on the surface. core: albedo of the inside, seen where it is broken.
    edge: signed distance to the part's outline, negative inside. parts: coverage of each feature
    that can be missing.
    """

    albedo: Array
    height: Array
    gloss: Array
    tilt: tuple[Array, Array]
    spread: tuple[float, float]
    light: Array
    film: Array
    core: Array
    edge: Array
    angle: float
    parts: list[Array] = field(default_factory=list)


@dataclass
class Lamp:
    """The lighting of one photograph."""

    direction: tuple[float, float, float]
    ambient: float
    boxes: list[tuple[float, float, float]]  # position in reflection space x, y; intensity
    gradient: tuple[float, float]


def draw_lamp(rng: np.random.Generator) -> Lamp:
    """The station's lamp stands upper left; it is moved a little between photographs."""
    x, y = -0.46 + 0.05 * rng.standard_normal(), -0.56 + 0.05 * rng.standard_normal()
    z = np.sqrt(1 - x * x - y * y)
    boxes = [
        (-0.07 + 0.035 * rng.standard_normal(), -0.10 + 0.03 * rng.standard_normal(), 1.0),
        (0.17 + 0.03 * rng.standard_normal(), 0.10, 0.35),
    ]
    gradient = (-0.05 + 0.03 * rng.standard_normal(), -0.06 + 0.03 * rng.standard_normal())
    return Lamp((float(x), float(y), float(z)), rng.uniform(0.38, 0.46), boxes, gradient)


def shade(surface: Surface, lamp: Lamp) -> Array:
    """Radiance (rows, columns, 3) of a surface: Lambert's law plus the soft boxes' reflections."""
    size_px = surface.height.shape[0]
    x, y = grid(size_px)
    x, y = x / REFERENCE_PX, y / REFERENCE_PX
    slope_y, slope_x = np.gradient(surface.height, np.float32(REFERENCE_PX / size_px))
    norm = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    lx, ly, lz = lamp.direction
    lambert = np.maximum(norm * (lz - lx * slope_x - ly * slope_y), 0) / np.float32(lz)
    field_ = 1 + lamp.gradient[0] * 2 * x + lamp.gradient[1] * 2 * y
    diffuse = lamp.ambient + (1 - lamp.ambient) * lambert * surface.light
    # The mirror direction: the normal's tilt counts twice, the view changes across the picture.
    mirror_x = -2 * (slope_x + surface.tilt[0]) * norm + 0.16 * x
    mirror_y = -2 * (slope_y + surface.tilt[1]) * norm + 0.16 * y
    # The hall around the soft boxes: brighter towards the lamp, dark on the other side.
    glare = 0.26 + 0.22 * np.tanh(1.3 * (lx * mirror_x + ly * mirror_y))
    glare += 0.9 * np.exp(-((mirror_x - 1.8 * lx) ** 2 + (mirror_y - 1.8 * ly) ** 2) / 0.5)
    for box_x, box_y, intensity in lamp.boxes:
        glare += intensity * np.exp(
            -(((mirror_x - box_x) / surface.spread[0]) ** 2)
            - ((mirror_y - box_y) / surface.spread[1]) ** 2
        )
    glare *= surface.gloss * (0.25 + 0.75 * surface.light)
    radiance = surface.albedo * diffuse[..., None] + glare[..., None]
    return np.asarray(radiance * field_[..., None] * surface.film, dtype=np.float32)


@dataclass
class Camera:
    """The state of lens and sensor in one photograph."""

    exposure: float
    balance: Array
    blur_px: float
    vignette: float
    noise: Array
    mottle: Array


def draw_camera(rng: np.random.Generator, size_px: int) -> Camera:
    """Small changes between photographs, and the sensor noise of this one."""
    warmth = 0.012 * rng.standard_normal()
    noise = rng.standard_normal((size_px, size_px, 3), dtype=np.float32)
    # Demosaicing spreads the noise of one photosite over its neighbours.
    noise = 0.72 * noise + 0.4 * np.roll(noise, 1, axis=0) + 0.4 * np.roll(noise, 1, axis=1)
    noise = 0.75 * noise + 0.6 * noise.mean(axis=2, keepdims=True)
    return Camera(
        exposure=float(np.exp(0.045 * rng.standard_normal())),
        balance=np.array([1 + warmth, 1.0, 1 - 1.3 * warmth], dtype=np.float32),
        blur_px=rng.uniform(0.42, 0.62) * max(size_px / REFERENCE_PX, 0.6),
        vignette=rng.uniform(0.08, 0.16),
        noise=noise,
        mottle=smooth_noise(rng, size_px, 70.0),
    )


def expose(radiance: Array, camera: Camera) -> Array:
    """Grey values (rows, columns, 3) in [0, 255] before noise and rounding: lens and tone curve."""
    x, y = grid(radiance.shape[0])
    falloff = 1 - camera.vignette * 2 * (x * x + y * y) / np.float32(REFERENCE_PX**2)
    falloff = falloff * (1 + 0.008 * camera.mottle)
    linear = blur(radiance, camera.blur_px) * falloff[..., None]
    linear = np.maximum(linear * (camera.exposure * camera.balance), 0)
    # A shoulder like a camera's: highlights roll off instead of clipping.
    linear = np.where(linear > 0.7, 0.7 + 0.3 * np.tanh((linear - 0.7) / 0.3), linear)
    return np.asarray(255 * linear ** np.float32(1 / 2.2), dtype=np.float32)


def develop(grey: Array, camera: Camera) -> NDArray[np.uint8]:
    """Add the sensor's noise (larger in the shadows after the tone curve) and round to uint8."""
    sigma = 1.1 + 0.9 * (1 - grey / 255)
    return np.clip(np.rint(grey + sigma * camera.noise), 0, 255).astype(np.uint8)
