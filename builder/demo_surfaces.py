"""Colours and shadows that the demo parts share."""

from __future__ import annotations

import numpy as np

from builder.demo_noise import REFERENCE_PX, Array, smoothstep

LIGHT_SIDE = (-0.62, -0.78)  # where the lamp stands, seen in the picture


def colour(red: float, green: float, blue: float) -> Array:
    """Linear RGB of an sRGB colour given as grey values."""
    return (np.array([red, green, blue], dtype=np.float32) / 255) ** np.float32(2.2)


def mix(low: Array, high: Array, share: Array) -> Array:
    """Blend two colours or colour fields by a field (rows, columns)."""
    return low + (high - low) * share[..., None]


def plain(size_px: int, value: float) -> Array:
    """A constant field."""
    field: Array = np.full((size_px, size_px), value, dtype=np.float32)
    return field


def shadow_of(edge: Array, size_px: int, reach: float) -> Array:
    """The signed distance field moved away from the lamp by `reach` reference pixels."""
    step = reach * size_px / REFERENCE_PX
    return np.roll(edge, (round(-LIGHT_SIDE[1] * step), round(-LIGHT_SIDE[0] * step)), (0, 1))


def lit_wall(edge: Array, size_px: int, width: float) -> Array:
    """The strip of a hole's inner wall that faces the lamp: on the hole's lower right."""
    gradient_y, gradient_x = np.gradient(edge, np.float32(REFERENCE_PX / size_px))
    # `edge` grows into the hole; the far wall is where it grows against the light.
    facing = np.maximum(gradient_x * LIGHT_SIDE[0] + gradient_y * LIGHT_SIDE[1], 0)
    return facing * smoothstep(width, 0.0, edge) * smoothstep(-1.0, 0.5, edge)
