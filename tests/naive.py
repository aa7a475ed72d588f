"""Slow, obvious versions of what the packages compute fast, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import ndimage

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


# Evaluator: PaDiM and AUROC


def padim_distances(
    layers: list[np.ndarray], dims: list[int], train_images: int, epsilon: float
) -> np.ndarray:
    """PaDiM, one position at a time, with an explicit inverse.

    layers: [images, channels, rows, columns] each, the finest first; the first `train_images` are
    normal. Returns the Mahalanobis distances of the others: float64 [images, rows, columns].
    """
    _, _, rows, columns = layers[0].shape
    distances = np.empty((len(layers[0]) - train_images, rows, columns))
    for i in range(rows):
        for j in range(columns):
            # Nearest repetition: cell (i, j) of the fine grid lies in this cell of a coarse one.
            parts = [
                layer[:, :, i * layer.shape[2] // rows, j * layer.shape[3] // columns]
                for layer in layers
            ]
            x = np.concatenate(parts, axis=1).astype(np.float64)[:, dims]
            train, test = x[:train_images], x[train_images:]
            covariance = np.cov(train, rowvar=False, ddof=1) + epsilon * np.eye(len(dims))
            inverse = np.linalg.inv(covariance)
            for k, image in enumerate(test):
                d = image - train.mean(axis=0)
                distances[k, i, j] = np.sqrt(d @ inverse @ d)
    return distances


def auroc(defective: list[bool], score: list[float]) -> float:
    """The share of (defective, good) pairs that are in the right order; a tie is half a pair."""
    pairs = [
        1.0 if bad > good else 0.5 if bad == good else 0.0
        for bad, is_bad in zip(score, defective, strict=True)
        for good, also_bad in zip(score, defective, strict=True)
        if is_bad and not also_bad
    ]
    return sum(pairs) / len(pairs)


# Trainer: the loss on parameters


def direct_loss(estimate: np.ndarray, theta: np.ndarray, channels: int) -> float:
    """Equation 9 for one sample by plain loops; both vectors have K(C+6)+1 values."""
    distances = component_distances(estimate, theta, channels)
    total = (float(theta[-1]) - float(estimate[-1])) ** 2
    return (total + sum(min(row) for row in distances)) / (len(distances) + 1)


def component_distances(
    estimate: np.ndarray, theta: np.ndarray, channels: int
) -> list[list[float]]:
    """Mean squared difference of each true component (row) to each estimated one."""
    size = channels + 6
    count = (len(theta) - 1) // size
    rows = []
    for k in range(count):
        row = []
        for j in range(count):
            squares = 0.0
            for i in range(size):
                squares += (float(theta[k * size + i]) - float(estimate[j * size + i])) ** 2
            row.append(squares / size)
        rows.append(row)
    return rows


def one_to_one_loss(estimate: np.ndarray, theta: np.ndarray, channels: int) -> float:
    """Equation 9 with an estimate of its own for each component: every assignment is tried."""
    distances = component_distances(estimate, theta, channels)
    total = (float(theta[-1]) - float(estimate[-1])) ** 2
    least = min(
        sum(distances[k][j] for k, j in enumerate(order))
        for order in itertools.permutations(range(len(distances)))
    )
    return (total + least) / (len(distances) + 1)


def mask_shares(theta: np.ndarray, channels: int, size_px: int = 400) -> np.ndarray:
    """Each component's largest share of the mask in a picture of size_px, float64 [K]."""
    components = theta[:-1].astype(np.float64).reshape(-1, channels + 6)[:, channels:]
    line = np.linspace(-1, 1, size_px)
    x, y = np.meshgrid(line, line)
    densities = []
    for mx, my, sx, sy, rho, pi in components:
        zx, zy = (x - mx) / sx, (y - my) / sy
        root = math.sqrt(1 - rho**2)
        form = (zx**2 - 2 * rho * zx * zy + zy**2) / (2 * root**2)
        densities.append(pi * np.exp(-form) / (sx * sy * root))
    largest = np.sum(densities, axis=0).max()
    return np.array([theta[-1] * one.max() / largest for one in densities])


# Evaluator: metrics of whole categories


def pro_curve(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The official MVTec PRO curve: rates of false positives, and mean overlaps of the regions.

    maps: float [T, S, S]; masks: bool [T, S, S]. Every pixel is a threshold; of equal scores the
    last counts; the curve starts at (0, 0).
    """
    false = np.zeros(maps.shape, np.float64)
    overlap = np.zeros(maps.shape, np.float64)
    regions = 0
    for image, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        for region in range(1, count + 1):
            overlap[image][labels == region] = 1 / (labels == region).sum()
        false[image] = ~mask
        regions += count
    order = np.argsort(-maps, axis=None)
    score = maps.ravel()[order]
    last = np.append(score[1:] != score[:-1], True)
    fpr = np.cumsum(false.ravel()[order])[last] / false.sum()
    pro = np.cumsum(overlap.ravel()[order])[last] / regions
    return np.append(0, fpr), np.append(0, pro)


def area_up_to(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """The trapezoid rule up to `limit`, with a linearly interpolated last point."""
    inside = x <= limit
    area = np.sum(np.diff(x[inside]) * (y[inside][1:] + y[inside][:-1]) / 2)
    if not inside.all():
        k = int(inside.sum())
        end = y[k - 1] + (y[k] - y[k - 1]) * (limit - x[k - 1]) / (x[k] - x[k - 1])
        area += (limit - x[k - 1]) * (y[k - 1] + end) / 2
    return float(area)


def au_pro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """The official MVTec AU-PRO up to a false positive rate, in [0, 1]."""
    return area_up_to(*pro_curve(maps, masks), limit) / limit


def pair_counts(maps: np.ndarray, masks: np.ndarray, i: int, j: int) -> int:
    """Twice the pairs (positive pixel of image i, negative of j) in order, plus the ties."""
    positive, negative = maps[i][masks[i]][:, None], maps[j][~masks[j]]
    return int(2 * (positive > negative).sum() + (positive == negative).sum())
