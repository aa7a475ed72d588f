"""Slow, obvious versions of what the packages compute fast, in float64."""

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
    log_p = []
    for component in theta[:-1].reshape(-1, channels + 6):
        mu_x, mu_y, sigma_x, sigma_y, rho, pi = component[channels:]
        z_x, z_y = (x - mu_x) / sigma_x, (y - mu_y) / sigma_y
        q = ((z_x - rho * z_y) ** 2) / (1 - rho**2) + z_y**2
        with np.errstate(divide="ignore"):  # pi = 0
            log_pi = np.log(pi)
        log_p.append(log_pi - q / 2 - np.log(2 * np.pi * sigma_x * sigma_y * np.sqrt(1 - rho**2)))
    # Only ratios p_k / max p count, so a common factor keeps far tails from underflow.
    p_gauss = np.exp(np.array(log_p) - np.max(log_p))
    p_gmm = p_gauss.sum(axis=0)
    mask = (scale * p_gmm / p_gmm.max())[:, :, None]
    v_def = sum(
        scale * (p / p_gmm.max())[:, :, None] * component[:channels]
        for p, component in zip(p_gauss, theta[:-1].reshape(-1, channels + 6), strict=True)
    )
    return (normal / 127.5 - 1) * (1 - mask) + v_def
