"""Pixels in the order of their scores: regions, ranks of positive pixels, counts above thresholds.

Every pixel is sorted once: the negative ones within their image, the positive ones together. Two
sorted lists are merged for every image, which gives the counts per pair of images on the way and
takes less time and memory than one sort of all pixels with their labels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from evaluator import _kernel
from evaluator.errors import EvaluatorError

GRID = 160  # thresholds for bootstrapped AUPRO, a factor of 1.1 apart in false positives
GRID_DECADES = 6  # of false positive rate below 1
LEVEL_DECADES = 4  # heat maps tell apart false positive rates from 1 down to 1e-4
MAX_PIXELS = 2**32 - 1  # counts are uint32

Counts = npt.NDArray[np.uint32]


def label_regions(
    masks: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Number the 8-connected regions of all masks of a category, as the official MVTec evaluation.

    masks: bool [T, S, S]. Returns int32 [T, S, S], 0 = none, 1 .. R; and the image of each region,
    int64 [R].
    """
    regions = np.zeros(masks.shape, np.int32)
    images: list[int] = []
    for index, mask in enumerate(masks):
        if not mask.any():
            continue
        found = ndimage.label(mask, np.ones((3, 3), np.int8), output=regions[index])
        regions[index][mask] += len(images)
        images += [index] * int(found)
    return regions, np.array(images, np.int64)


@dataclass(frozen=True, eq=False)
class Ranked:
    """Where the positive pixels stand among the negative ones; see `Statistics` for the arrays."""

    above: Counts
    tied: Counts
    same_score: npt.NDArray[np.bool_]
    region: npt.NDArray[np.unsignedinteger]
    region_image: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    negatives_of: npt.NDArray[np.int64]
    grid_negatives: Counts
    grid_region: Counts


def rank_pixels(
    maps: npt.NDArray[np.float32],
    regions: npt.NDArray[np.int32],
    defective: npt.NDArray[np.bool_],
) -> Ranked:
    """Sort the pixels of all test images and count.

    maps: float32 [T, S, S], finite; regions: int32 [T, S, S], 0 = none; defective: bool [T]. Peak
    memory beside the arguments: 4 bytes per pixel and 80 per positive pixel. Raises EvaluatorError
    without positive or negative pixels, and for a good image with positive ones.
    """
    negatives, starts = _sorted_negatives(maps, regions)
    place = np.flatnonzero(regions)
    _check_pixels(place, starts, regions, defective)
    score = maps.ravel()[place]
    order = np.argsort(score)
    score, place = score[order], place[order]
    region = regions.ravel()[place] - 1
    image = place // regions[0].size
    region_image = np.full(int(region.max()) + 1, -1, np.int64)
    region_image[region] = image
    assert region_image.min() >= 0, "regions are numbered without gaps"

    row = (np.cumsum(defective) - 1).astype(np.int32)[image]
    below, tied = np.zeros((2, len(score)), np.uint32)
    pairs = np.zeros((int(defective.sum()), len(maps)), np.int64)
    _kernel.rank_positives(score, row, negatives, starts, below, tied, pairs)

    above = (np.uint32(starts[-1]) - below - tied)[::-1].copy()
    tied, region = tied[::-1].copy(), region[::-1]
    same_score = np.zeros(len(score), np.bool_)
    same_score[1:] = score[:0:-1] == score[-2::-1]
    thresholds = _grid_thresholds(negatives, starts)
    return Ranked(
        above,
        tied,
        same_score,
        _in_order(above, tied, region).astype(np.min_scalar_type(len(region_image) - 1)),
        region_image,
        pairs,
        np.diff(starts),
        _negatives_reaching(negatives, starts, thresholds),
        _region_pixels_reaching(score, region, len(region_image), thresholds),
    )


def _sorted_negatives(
    maps: npt.NDArray[np.float32], regions: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The scores of negative pixels, ascending within each image, and where each image starts."""
    counts = [mask.size - int(np.count_nonzero(mask)) for mask in regions]
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    negatives = np.empty(starts[-1], np.float32)
    for index, (one, mask) in enumerate(zip(maps, regions, strict=True)):
        part = negatives[starts[index] : starts[index + 1]]
        part[:] = one.ravel() if len(part) == one.size else one[mask == 0]
        part.sort()
    return negatives, starts


def _check_pixels(
    place: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    regions: npt.NDArray[np.int32],
    defective: npt.NDArray[np.bool_],
) -> None:
    if regions.size > MAX_PIXELS:
        raise EvaluatorError(f"{regions.size} test pixels, at most {MAX_PIXELS} can be ranked")
    if len(place) == 0:
        raise EvaluatorError("no defective pixel in any mask; pixel metrics are undefined")
    if starts[-1] == 0:
        raise EvaluatorError("no good pixel in any test image; pixel metrics are undefined")
    marked = np.diff(starts) < regions[0].size
    wrong = np.flatnonzero(marked & ~defective)
    if len(wrong):
        raise EvaluatorError(f"test image {wrong[0]} is good, yet its mask has defective pixels")


def _in_order(
    above: Counts, tied: Counts, region: npt.NDArray[np.int32]
) -> npt.NDArray[np.unsignedinteger]:
    """The regions in ascending order wherever no metric sees the order: smaller files, one form."""
    key = above.astype(np.uint64) * np.uint64(2) + (tied > 0)
    key = (key << np.uint64(31)) | region.astype(np.uint64)
    key.sort()
    ordered: npt.NDArray[np.unsignedinteger] = key & np.uint64(2**31 - 1)
    return ordered


def _grid_thresholds(
    negatives: npt.NDArray[np.float32], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Descending scores reached by about 1, 1.1, 1.21, ... of a million negatives; last -inf.

    The ranks are estimated from some negatives of each image; what reaches a threshold is counted
    exactly later.
    """
    scores, weights = [], []
    for first, end in itertools.pairwise(starts.tolist()):
        if first == end:
            continue
        ranks = np.unique(np.geomspace(1, end - first, 2 * GRID).astype(np.int64)) - 1
        scores.append(negatives[end - 1 - ranks])
        weights.append(np.diff(ranks, append=end - first))
    score, weight = np.concatenate(scores), np.concatenate(weights)
    order = np.argsort(-score, kind="stable")
    reached = np.cumsum(weight[order])
    total = int(starts[-1])
    wanted = np.geomspace(max(1.0, total / 10**GRID_DECADES), total, GRID)[:-1]
    place = np.minimum(np.searchsorted(reached, wanted), len(score) - 1)
    chosen = np.unique(score[order][place])[::-1]
    return np.append(chosen, np.float32(-np.inf)).astype(np.float32)


def _negatives_reaching(
    negatives: npt.NDArray[np.float32],
    starts: npt.NDArray[np.int64],
    thresholds: npt.NDArray[np.float32],
) -> Counts:
    """uint32 [T, G]: negatives of each image with at least each threshold's score."""
    rows = []
    for first, end in itertools.pairwise(starts.tolist()):
        rows.append(end - first - np.searchsorted(negatives[first:end], thresholds, side="left"))
    return np.array(rows, np.uint32)


def _region_pixels_reaching(
    score: npt.NDArray[np.float32],
    region: npt.NDArray[np.int32],
    count: int,
    thresholds: npt.NDArray[np.float32],
) -> Counts:
    """uint32 [R, G]: pixels of each region that reach each threshold.

    score: ascending; region: in the opposite order.
    """
    ends = len(score) - np.searchsorted(score, thresholds, side="left")
    column = np.searchsorted(ends, np.arange(len(score)), side="right")
    cells = np.bincount(region * len(thresholds) + column, minlength=count * len(thresholds))
    return np.cumsum(cells.reshape(count, -1), axis=1).astype(np.uint32)


def good_false_positive_levels(
    maps: npt.NDArray[np.float32], good_maps: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """How rare so high a score is on good test images: uint8 in the shape of `maps`.

    round(255 min(4, -log10 s) / 4), s the share of the pixels of `good_maps` (float32, any shape,
    finite) that score at least as high; 1 % is level 127.5, 0 is what all of them reach. Raises
    EvaluatorError without good pixels.
    """
    ordered = np.sort(good_maps, axis=None)
    if len(ordered) == 0:
        raise EvaluatorError("no good test image; the scale of the heat maps needs them")
    half_steps = np.arange(1, 256) - 0.5
    most = np.floor(len(ordered) * 10 ** (-LEVEL_DECADES * half_steps / 255)).astype(np.int64)
    # At most `most` good pixels reach a score that lies above the next lower one.
    bounds = ordered[len(ordered) - 1 - most]
    levels = np.empty(maps.shape, np.uint8)
    _kernel.fill_levels(np.ascontiguousarray(maps).ravel(), bounds, levels.ravel())
    return levels
