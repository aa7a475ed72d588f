"""Resampling of test images from the counts of `Statistics`, without maps and without sorting.

Images, not pixels, are what another test set would draw anew: pixels of an image go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import special

from evaluator.metrics import LIMITS, aupro
from evaluator.report import Metric
from evaluator.statistics import Statistics

Draws = npt.NDArray[np.float64]
Weights = npt.NDArray[np.uint16]
ZERO = 1e-9  # in percent: means over seeds differ in the last bit by the order of their terms


def image_weights(
    defective: npt.NDArray[np.bool_], draws: int, stream: np.random.Philox
) -> Weights:
    """How often each test image occurs in each of the next draws of `stream`: uint16 [draws, T].

    Good and defective images (bool [T]) are drawn apart, with replacement, each as many as there
    are. The same for the same key on every machine and every version of NumPy, in one call or in
    several: raw words of Philox, of which the upper halves are scaled to the number of images.
    """
    images = len(defective)
    assert images < 2**16, "weights are uint16"
    words = stream.random_raw(draws * images).reshape(draws, images)
    weights = np.zeros((draws, images), np.uint16)
    rows = np.arange(draws)[:, None]
    for kind in (False, True):
        members = np.flatnonzero(defective == kind)
        upper = words[:, members] >> np.uint64(32)
        chosen = (upper * np.uint64(len(members)) >> np.uint64(32)).astype(np.int64)
        np.add.at(weights, (rows, members[chosen]), 1)
    return weights


def weight_chunks(
    defective: npt.NDArray[np.bool_], draws: int, seed: int, rows: int
) -> Iterator[Weights]:
    """The weights of all draws from `seed` (below 2^128), at most `rows` draws at a time."""
    stream = np.random.Philox(key=seed)
    for first in range(0, draws, rows):
        yield image_weights(defective, min(rows, draws - first), stream)


def without_each(images: int, rows: int) -> Iterator[Weights]:
    """Weights that leave out each image in turn, at most `rows` at a time: [images, images]."""
    for first in range(0, images, rows):
        left_out = np.arange(first, min(first + rows, images))
        weights = np.ones((len(left_out), images), np.uint16)
        weights[np.arange(len(left_out)), left_out] = 0
        yield weights


def resampler(s: Statistics, metric: Metric) -> Callable[[Weights], Draws] | None:
    """The metric as a function of weights, uint16 [draws, T] -> float64 [draws], or None.

    pixel_auroc, image_auroc and image_ap are exact: the same as of the maps of the drawn images,
    each as often as drawn. aupro_* follow the polyline through the grid's thresholds, not all, and
    are shifted by the (known) error without resampling, so that they centre on the exact value:
    typically 1e-4 from the exact draw, 1e-3 at most in the tests. NaN in draws without any
    positive pixel. None where the metric cannot be resampled.
    """
    if metric.startswith(("pixel", "aupro")) and not s.has_masks:
        return None
    if metric == "pixel_auroc":
        return lambda weights: _pixel_auroc(s, weights.astype(np.float64))
    if metric == "image_auroc":
        return lambda weights: _image_auroc(s, weights.astype(np.float64))
    if metric == "image_ap":
        return lambda weights: _image_ap(s, weights.astype(np.float64))
    if metric in LIMITS:
        limit = LIMITS[metric]
        shift = aupro(s, limit) - _grid_aupro(s, np.ones((1, len(s.image_score))), limit)[0]
        return lambda weights: np.clip(
            _grid_aupro(s, weights.astype(np.float64), limit) + shift, 0, 1
        )
    return None


def _pixel_auroc(s: Statistics, w: Draws) -> Draws:
    right = np.einsum("ni,ni->n", w[:, s.image_defective] @ s.pairs.astype(np.float64), w)
    return _ratio(right, 2 * (w @ s.positives_of) * (w @ s.negatives_of))


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

    (1 + k) / (1 + n) for k of n draws; draws of 0 (within 1e-9) count on both sides, NaN on none.
    """
    known = differences[~np.isnan(differences)]
    rarer = min(int((known <= ZERO).sum()), int((known >= -ZERO).sum()))
    return min(1.0, 2 * (1 + rarer) / (1 + len(known)))


def t_test_p(difference: float, without: Sequence[Draws]) -> float:
    """Two-sided p of a difference by the jackknife over images, which holds for few images too.

    without: for each kind of image (drawn apart) of each category, float64 [n], the difference,
    up to a constant, without one of its n images. Variance: the sum over kinds of (n - 1) / n times
    their squared deviations (Efron and Stein 1981); Student's t with Satterthwaite's degrees of
    freedom. At least 2 / 2^images, as small as a test that swaps the two backbones on any of the
    images can get. 1 where a kind has a single image, or nothing is left without one.
    """
    if abs(difference) <= ZERO or any(len(x) < 2 or np.isnan(x).any() for x in without):
        return 1.0
    parts = [(len(x) - 1) ** 2 / len(x) * float(np.var(x, ddof=1)) for x in without]
    variance = sum(parts)
    smallest = 2.0 ** (1 - sum(map(len, without)))
    if variance == 0:
        return smallest
    shares = [part / variance for part in parts]
    freedom = 1 / sum(share**2 / (len(x) - 1) for share, x in zip(shares, without, strict=True))
    p = 2 * float(special.stdtr(freedom, -abs(difference) / np.sqrt(variance)))
    return max(p, smallest)


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
