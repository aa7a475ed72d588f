"""Renders one photograph of the demo set: a part without defect, or a defect and its mask.

Every image is a function of (seed, product, split, kind, index) alone: asking for more images
leaves the others as they are. Clean and defective photograph of a part share every draw, so a
mask marks exactly the pixels that the defect changed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from builder.demo_camera import Surface, develop, draw_camera, draw_lamp, expose, shade
from builder.demo_defects import DEFECTS
from builder.demo_noise import Array, blur, smoothstep, stream
from builder.demo_plank import plank
from builder.demo_plate import plate
from builder.demo_terrazzo import terrazzo

# Each draws one part from a stream; a third argument leaves out a feature, and no other draw moves.
PRODUCTS: dict[str, Callable[..., Surface]] = {"plank": plank, "plate": plate, "terrazzo": terrazzo}
VISIBLE_LEVELS = 4.0  # a change of fewer grey levels in every channel counts as invisible
COVER_MIN = 0.12


def render_normal(
    product: str, split: str, index: int, *, size_px: int, seed: int, kind: str = "good"
) -> NDArray[np.uint8]:
    """The photograph (size_px, size_px, 3) uint8 of a part without defect.

    With `kind` a defect, it is the part of that defective image before it was damaged.
    """
    key = (seed, product, split, kind, index)
    surface = PRODUCTS[product](stream("part", *key), size_px)
    rng = stream("camera", *key)
    lamp, camera = draw_lamp(rng), draw_camera(rng, size_px)
    return develop(expose(shade(surface, lamp), camera), camera)


def render_defect(
    product: str, kind: str, index: int, *, size_px: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A defective photograph (size_px, size_px, 3) and its mask (size_px, size_px), 0 or 255."""
    key = (seed, product, "test", kind, index)
    rng = stream("camera", *key)
    lamp, camera = draw_lamp(rng), draw_camera(rng, size_px)
    for attempt in range(8):
        surface, changed, cover = _damage(product, kind, key, attempt, size_px)
        clean = expose(shade(surface, lamp), camera)
        grey = expose(shade(changed, lamp), camera)
        # The lens spreads a defect a little beyond its outline; what is left there is cut off.
        reach = blur(_grow(cover, 1), camera.blur_px)
        weight = smoothstep(0.05, 0.5, reach)
        blended = clean + (grey - clean) * weight[..., None]
        mask = _visible_part(np.abs(blended - clean).max(axis=2), weight)
        if mask.mean() >= 4e-4:
            break
    blended = np.where(mask[..., None], blended, clean).astype(np.float32)
    return develop(blended, camera), mask.astype(np.uint8) * 255


def _damage(
    product: str, kind: str, key: tuple[object, ...], attempt: int, size_px: int
) -> tuple[Surface, Surface, Array]:
    """A part, the same part damaged, and the damage's coverage."""
    rng = stream("defect", attempt, *key)
    surface = PRODUCTS[product](stream("part", *key), size_px)
    if kind == "missing_part":
        index = int(rng.integers(len(surface.parts)))
        changed = PRODUCTS[product](stream("part", *key), size_px, index)
        return surface, changed, surface.parts[index]
    changed, cover = DEFECTS[kind](product, surface, rng)
    return surface, changed, cover


def _grow(field: Array, steps: int) -> Array:
    """Grey dilation with a 3 x 3 square, `steps` times."""
    for _ in range(steps):
        for axis in (0, 1):
            padded = np.pad(field, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
            parts = [np.take(padded, np.arange(field.shape[axis]) + k, axis=axis) for k in range(3)]
            field = np.maximum.reduce(parts)
    return field


def _visible_part(change: Array, weight: Array) -> NDArray[np.bool_]:
    """The covered pixels beside a visible change: a defect may fade out, a mask may not."""
    visible = ((change >= VISIBLE_LEVELS) & (weight > COVER_MIN)).astype(np.float32)
    return (_grow(visible, 1) > 0) & (weight > COVER_MIN)
