"""Slow, obvious versions of what the packages compute fast: float64, one pixel or one position at a time."""

from __future__ import annotations

import numpy as np


# Builder: the anomaly generator


def render(normal: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Equations 3 to 7 as written. normal: uint8 [H, W, C]; theta: [K(C+6)+1]; returns uint8."""
    value = (render_exact(normal, theta) + 1) * 127.5
    return np.floor(value + 0.5).astype(np.uint8)


def render_exact(normal: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """I_ano in [-1, 1] before rounding, float64 [H, W, C]."""
    theta = theta.astype(np.float64)
    height, width, channels = normal.shape
    x = (2 * np.arange(width) / (width - 1) - 1)[None, :]
    y = (2 * np.arange(height) / (height - 1) - 1)[:, None]
    scale = theta[-1]
    p_gmm = np.zeros((height, width))
    painted = np.zeros((height, width, channels))
    for component in theta[:-1].reshape(-1, channels + 6):
        v = component[:channels]
        mu_x, mu_y, sigma_x, sigma_y, rho, pi = component[channels:]
        z_x, z_y = (x - mu_x) / sigma_x, (y - mu_y) / sigma_y
        q = (z_x**2 - 2 * rho * z_x * z_y + z_y**2) / (1 - rho**2)
        p_gauss = pi * np.exp(-q / 2) / (2 * np.pi * sigma_x * sigma_y * np.sqrt(1 - rho**2))
        p_gmm += p_gauss
        painted += p_gauss[:, :, None] * v
    if not p_gmm.max() > 0:
        return normal / 127.5 - 1
    mask = (scale * p_gmm / p_gmm.max())[:, :, None]
    v_def = scale * painted / p_gmm.max()
    return (normal / 127.5 - 1) * (1 - mask) + v_def
