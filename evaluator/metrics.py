"""AUROC from one sort, and mean and spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def auroc(defective: npt.NDArray[np.bool_], score: npt.NDArray[np.float32]) -> float:
    """Probability that a defective item scores higher than a good one, ties counting half, [0, 1].

    `defective` bool and `score` float32, finite, same shape. The negatives are sorted once and
    every positive adds 1 - its mid-rank false positive rate: the same number as scikit-learn's
    roc_auc_score, in an eighth of the time and without its copies on eight million pixels.

    >>> auroc(np.array([False, True, True]), np.array([1, 1, 2], np.float32))
    0.75
    """
    negative = np.sort(score[~defective], axis=None)
    positive = np.sort(score[defective], axis=None)  # sorted needles keep the search in cache
    assert negative.size > 0, "AUROC needs good items"
    assert positive.size > 0, "AUROC needs defective items"
    below = np.searchsorted(negative, positive, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(negative, positive, side="right").sum(dtype=np.int64)
    return float(below + not_above) / 2 / positive.size / negative.size


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (ddof 1) over seeds; the latter None for a single seed."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


SHARE_DECADES = 3  # heat maps tell apart the upper 100 %, 10 %, 1 % and 0.1 % of all pixels


def share_thresholds(maps: npt.NDArray[np.float32], levels: int = 4096) -> npt.NDArray[np.float32]:
    """The score that a share of 10^(-`SHARE_DECADES` i / (levels - 1)) of all pixels reaches.

    `maps` float32, any shape, finite. Returns float32 [levels], ascending.
    """
    shares = 10.0 ** (-SHARE_DECADES * np.arange(levels) / (levels - 1))
    ordered = np.sort(maps, axis=None)
    rank = np.ceil((1 - shares) * ordered.size).astype(np.int64)
    return ordered[np.clip(rank, 0, ordered.size - 1)]


def rarity(
    maps: npt.NDArray[np.float32], thresholds: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """How rare so high a score is: uint8, 0 = every pixel reaches it, 255 = at most 0.1 % do.

    -log10 of the share of pixels that reach the score, times 255 / `SHARE_DECADES`.
    """
    last = len(thresholds) - 1
    place = np.minimum(np.searchsorted(thresholds, maps, side="left"), last)
    return np.round(place * (255 / last)).astype(np.uint8)
