"""Every metric from the counts of `Statistics`: no pixel is looked at again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt

from evaluator.report import Metric
from evaluator.statistics import Statistics

METRICS: tuple[Metric, ...] = get_args(Metric)
LIMITS: dict[Metric, float] = {"aupro_30": 0.3, "aupro_05": 0.05, "aupro_01": 0.01}
# Dense where thresholds are set in practice: at few false positives.
CURVE_FPR: tuple[float, ...] = (
    0.0,
    *(round(10 ** (-4 + i / 10), 6) for i in range(20)),
    *(i / 100 for i in range(1, 30)),
    *(i / 20 for i in range(6, 21)),
)

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (ddof 1) over seeds; the latter None for a single seed."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def measure(s: Statistics) -> dict[Metric, float | None]:
    """All metrics, in [0, 1]; None for those of pixels where there are no masks.

    AUROC: the probability that a positive scores higher than a negative, ties counting half.
    AUPRO: the area under the official polyline (per-region overlap against false positive rate
    over all negative pixels) up to the limit, over the limit. AP: scikit-learn's
    average_precision_score. F1-max: the best over all thresholds, so fitted on the test images.
    """
    found: dict[Metric, float | None] = dict.fromkeys(METRICS)
    if s.has_masks:
        found["pixel_auroc"] = int(s.pairs.sum()) / (2 * s.positives * s.negatives)
        for metric, limit in LIMITS.items():
            found[metric] = aupro(s, limit)
        found["pixel_ap"] = _average_precision(s.above, s.tied, s.same_score)
        found["pixel_f1_max"] = _f1_max(s.above, s.tied)
    above, tied, same = _rank_images(s)
    good = int((~s.image_defective).sum())
    right = 2 * good * len(above) - 2 * int(above.sum()) - int(tied.sum())
    found["image_auroc"] = right / (2 * good * len(above))
    found["image_ap"] = _average_precision(above, tied, same)
    found["image_f1_max"] = _f1_max(above, tied)
    return found


def _rank_images(s: Statistics) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """For each defective image, by descending score: good ones above, tied; tied to the last."""
    good = np.sort(s.image_score[~s.image_defective])
    score = np.sort(s.image_score[s.image_defective])[::-1]
    below = np.searchsorted(good, score, side="left")
    not_above = np.searchsorted(good, score, side="right")
    same = np.append(False, score[1:] == score[:-1])
    return len(good) - not_above, not_above - below, same


def aupro(s: Statistics, limit: float) -> float:
    """The mean of the regions' scores, [0, 1]."""
    return math.fsum(region_scores(s, limit).tolist()) / len(s.region_pixels)


def _average_precision(above: Ints, tied: Ints, same_score: npt.NDArray[np.bool_]) -> float:
    """Sum over thresholds of precision times the recall gained there."""
    last = np.append(~same_score[1:], True)  # of each group of equal scores
    reached = np.flatnonzero(last) + 1
    gained = np.diff(reached, prepend=0)
    precision = reached / (reached + above[last].astype(np.int64) + tied[last])
    return min(1.0, float((gained * precision).sum()) / len(above))


def _f1_max(above: Ints, tied: Ints) -> float:
    """2 TP / (2 TP + FP + FN), at its best.

    Counting too few of a group of equal scores only lowers it, so groups need no attention.
    """
    positives = len(above)
    reached = np.arange(1, positives + 1)
    return float((2 * reached / (reached + above.astype(np.int64) + tied + positives)).max())


def region_scores(s: Statistics, limit: float) -> Float:
    """Each region's share of AUPRO, float64 [R] in [0, 1]: their mean is AUPRO up to `limit`.

    A pixel whose ties span the false positive rates f0 .. f1 adds, before division by the
    region's size and by the limit, limit - (f0 + f1) / 2 when f1 <= limit, and
    (limit - f0)^2 / (2 (f1 - f0)) when f0 < limit < f1.
    """
    negatives, regions = s.negatives, len(s.region_pixels)
    most = limit * negatives  # negatives above a threshold at the limit
    above = s.above.astype(np.int64)
    reached = above + s.tied  # never falls from one positive to the next
    inside = int(np.searchsorted(reached, most, side="right"))
    area = np.zeros(regions)
    # Sums of integers below 2^53: exact in float64.
    area += most * np.bincount(s.region[:inside], minlength=regions)
    sums = np.bincount(s.region[:inside], (above + reached)[:inside], minlength=regions)
    area -= sums / 2
    cut = slice(inside, int(np.searchsorted(above, most, side="left")))
    if cut.start < cut.stop:  # one group of ties at most crosses the limit
        part = (most - above[inside]) ** 2 / (2 * int(s.tied[inside]))
        area += part * np.bincount(s.region[cut], minlength=regions)
    return np.clip(area / (most * s.region_pixels), 0, 1)


def image_pixel_auroc(s: Statistics) -> Float:
    """Pixel AUROC of each image's positives against all negatives of the category: float64 [T].

    NaN for images without positive pixels.
    """
    found = np.full(len(s.image_score), np.nan)
    found[s.image_defective] = s.pairs.sum(axis=1)
    most = 2.0 * s.positives_of * s.negatives
    return np.divide(found, most, out=np.full(len(found), np.nan), where=most > 0)


def curves(s: Statistics, fpr: Sequence[float]) -> tuple[Float, Float]:
    """The ROC and the PRO curve at the given false positive rates, float64 [n] each, in [0, 1].

    Exact on the polylines through the points of all thresholds; where a curve jumps, its upper end.
    """
    most = np.asarray(fpr, np.float64) * s.negatives
    whole = np.round(most)
    most = np.where(np.abs(most - whole) < 1e-6, whole, most)  # k / N * N must be k again
    reached = s.above.astype(np.int64) + s.tied
    inside = np.searchsorted(reached, most, side="right")
    begun = np.maximum(np.searchsorted(s.above, most, side="left"), inside)
    tpr, pro = np.empty((2, len(most)))
    regions = len(s.region_pixels)
    for i, (full, end) in enumerate(zip(inside.tolist(), begun.tolist(), strict=True)):
        counts = np.bincount(s.region[:full], minlength=regions).astype(np.float64)
        if full < end:
            share = (most[i] - int(s.above[full])) / int(s.tied[full])
            counts += share * np.bincount(s.region[full:end], minlength=regions)
        tpr[i] = counts.sum() / s.positives
        pro[i] = (counts / s.region_pixels).mean()
    return np.minimum(tpr, 1), np.minimum(pro, 1)
