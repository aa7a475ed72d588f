"""Resampling of test images from the counts of `Statistics`, without maps and without sorting.

Images, not pixels, are what another test set would draw anew: pixels of an image go together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evaluator.metrics import LIMITS, aupro
from evaluator.report import Metric
from evaluator.statistics import Statistics

Draws = npt.NDArray[np.float64]


def image_weights(
    defective: npt.NDArray[np.bool_], draws: int, seed: int
) -> npt.NDArray[np.uint16]:
    """How often each test image occurs in each draw: uint16 [draws, T].

    Good and defective images (bool [T]) are drawn apart, with replacement, each as many as there
    are. The same for the same seed (below 2^128) on every machine and every version of NumPy: raw
    words of Philox, of which the upper halves are scaled to the number of images.
    """
    images = len(defective)
    assert images < 2**16, "weights are uint16"
    words = np.random.Philox(key=seed).random_raw(draws * images).reshape(draws, images)
    weights = np.zeros((draws, images), np.uint16)
    rows = np.arange(draws)[:, None]
    for kind in (False, True):
        members = np.flatnonzero(defective == kind)
        upper = words[:, members] >> np.uint64(32)
        chosen = (upper * np.uint64(len(members)) >> np.uint64(32)).astype(np.int64)
        np.add.at(weights, (rows, members[chosen]), 1)
    return weights


def bootstrap(s: Statistics, weights: npt.NDArray[np.uint16], metric: Metric) -> Draws | None:
    """The metric in each draw, float64 [draws]; None where it cannot be resampled.

    weights: uint16 [draws, T]. pixel_auroc, image_auroc and image_ap are exact: the same as of the
    maps of the drawn images, each as often as drawn. aupro_* follow the polyline through the
    grid's thresholds, not all, and are shifted by the (known) error without resampling, so that
    they centre on the exact value: typically 1e-4 from the exact draw, 1e-3 at most in the tests.
    NaN in draws without any positive pixel.
    """
    if metric.startswith(("pixel", "aupro")) and not s.has_masks:
        return None
    w = weights.astype(np.float64)
    if metric == "pixel_auroc":
        right = np.einsum("ni,ni->n", w[:, s.image_defective] @ s.pairs.astype(np.float64), w)
        return _ratio(right, 2 * (w @ s.positives_of) * (w @ s.negatives_of))
    if metric == "image_auroc":
        return _image_auroc(s, w)
    if metric == "image_ap":
        return _image_ap(s, w)
    if metric in LIMITS:
        everything = _grid_aupro(s, np.ones((1, w.shape[1])), LIMITS[metric])[0]
        shift = aupro(s, LIMITS[metric]) - everything
        return np.clip(_grid_aupro(s, w, LIMITS[metric]) + shift, 0, 1)
    return None


def _ratio(above: Draws, below: Draws) -> Draws:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _image_auroc(s: Statistics, w: Draws) -> Draws:
    good, bad = ~s.image_defective, s.image_defective
    difference = s.image_score[bad][:, None] - s.image_score[good]
    right = 0.5 + 0.5 * np.sign(difference)
    return _ratio(
        np.einsum("nj,nj->n", w[:, bad] @ right, w[:, good]),
        w[:, bad].sum(axis=1) * w[:, good].sum(axis=1),
    )


def _image_ap(s: Statistics, w: Draws) -> Draws:
    """Images drawn several times tie with themselves, so precision is taken after each group."""
    order = np.argsort(-s.image_score, kind="stable")
    score, bad = s.image_score[order], s.image_defective[order]
    last = np.append(score[1:] != score[:-1], True)
    positives = np.cumsum(w[:, order] * bad, axis=1)[:, last]
    reached = np.cumsum(w[:, order], axis=1)[:, last]
    gained = np.diff(positives, axis=1, prepend=0)
    precision = positives / np.maximum(reached, 1)
    return (gained * precision).sum(axis=1) / positives[:, -1]


def _grid_aupro(s: Statistics, w: Draws, limit: float) -> Draws:
    """AUPRO of each draw on the polyline through the grid's thresholds, from (0, 0)."""
    fpr = np.zeros((len(w), s.grid_negatives.shape[1] + 1))
    pro = np.zeros_like(fpr)
    fpr[:, 1:] = w @ s.grid_negatives
    fpr /= np.maximum(fpr[:, -1:], 1)  # the last threshold is reached by all
    of_region = w[:, s.region_image]
    pro[:, 1:] = of_region @ (s.grid_region / s.region_pixels[:, None])
    regions = of_region.sum(axis=1, keepdims=True)
    width = np.diff(fpr, axis=1)
    kept = np.clip(limit - fpr[:, :-1], 0, width)  # of each step's width, below the limit
    share = np.divide(kept, width, out=np.zeros_like(width), where=width > 0)
    area = kept * (pro[:, :-1] + share * np.diff(pro, axis=1) / 2)
    return _ratio(area.sum(axis=1), limit * regions[:, 0])


def interval(values: Draws, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of draws, without those that are NaN."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(differences: Draws) -> float:
    """Two-sided: twice the share of draws on the rarer side of 0, at most 1; never 0.

    (1 + k) / (1 + n) for k of n draws; draws of exactly 0 count on both sides, NaN on none.
    """
    known = differences[~np.isnan(differences)]
    rarer = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (1 + rarer) / (1 + len(known)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests, in the order given (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = least
    return corrected
