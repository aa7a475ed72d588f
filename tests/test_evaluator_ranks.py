"""Regions, ranks of positive pixels and counts per pair of images, against plain counting."""

import numpy as np
import pytest

from evaluator import _kernel
from evaluator.errors import EvaluatorError
from evaluator.ranks import good_false_positive_levels, label_regions, rank_pixels
from tests import naive
from tests.evaluator_scores import tied_category


def test_regions_touching_at_a_corner_are_one():
    masks = np.zeros((3, 4, 4), np.bool_)
    masks[1, 0, 0] = masks[1, 1, 1] = masks[1, 3, 3] = True
    masks[2, 2, 2] = True
    regions, image = label_regions(masks)
    assert image.tolist() == [1, 1, 2]
    assert regions[1].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]]
    assert regions[0].max() == 0
    assert regions[2, 2, 2] == 3


def test_pairs_equal_plain_counting():
    maps, masks, defective = tied_category()
    found = rank_pixels(maps, label_regions(masks)[0], defective).pairs
    expected = [[naive.pair_counts(maps, masks, i, j) for j in range(6)] for i in range(2, 6)]
    assert found.tolist() == expected


def test_negatives_above_and_tied_equal_plain_counting():
    maps, masks, defective = tied_category(seed=1)
    found = rank_pixels(maps, label_regions(masks)[0], defective)
    positive, negative = np.sort(maps[masks])[::-1], maps[~masks]
    assert found.above.tolist() == [(negative > value).sum() for value in positive]
    assert found.tied.tolist() == [(negative == value).sum() for value in positive]
    assert found.same_score.tolist() == [False, *(positive[1:] == positive[:-1]).tolist()]


def test_both_zeros_are_one_score():
    maps = np.array([[[0.0]], [[-0.0]], [[0.0]]], np.float32)
    masks = np.array([False, True, True]).reshape(3, 1, 1)
    found = rank_pixels(maps, label_regions(masks)[0], masks.any(axis=(1, 2)))
    assert found.tied.tolist() == [1, 1]
    assert found.same_score.tolist() == [False, True]


def test_order_of_images_in_a_run_without_negatives_does_not_show():
    # Both positive pixels are above all negatives; which of them is higher is no metric's matter.
    masks = np.array([False, True, True]).reshape(3, 1, 1)
    regions, _ = label_regions(masks)
    one, other = (
        rank_pixels(np.array(scores, np.float32).reshape(3, 1, 1), regions, masks[:, 0, 0])
        for scores in ([1, 3, 2], [1, 2, 3])
    )
    assert one.region.tolist() == other.region.tolist() == [0, 1]


def test_grid_ends_with_everything_and_counts_exactly():
    maps, masks, defective = tied_category(seed=2)
    regions, region_image = label_regions(masks)
    found = rank_pixels(maps, regions, defective)
    assert found.grid_negatives[:, -1].tolist() == (~masks).sum(axis=(1, 2)).tolist()
    assert found.grid_region[:, -1].tolist() == np.bincount(regions.ravel())[1:].tolist()
    assert found.region_image.tolist() == region_image.tolist()
    # Each column belongs to one threshold, a score of some negative pixel.
    columns = {
        tuple(((maps >= score) & ~masks).sum(axis=(1, 2)).tolist())
        for score in np.unique(maps[~masks])
    }
    assert {tuple(column) for column in found.grid_negatives.T[:-1].tolist()} <= columns


def test_compiled_and_plain_kernels_agree():
    score = np.array([0, 1, 1, 4], np.float32)
    negatives = np.array([1, 1, 2, 0, 5], np.float32)  # two images: 1 1 2, and 0 5
    starts = np.array([0, 3, 5])
    for function in (_kernel.rank_positives, _kernel.rank_positives.py_func):
        below, tied = np.zeros((2, 4), np.uint32)
        pairs = np.zeros((2, 2), np.int64)
        function(score, np.array([0, 0, 1, 1], np.int32), negatives, starts, below, tied, pairs)
        assert below.tolist() == [0, 1, 1, 4]
        assert tied.tolist() == [1, 2, 2, 0]
        assert pairs.tolist() == [[2, 3], [8, 4]]


def test_positive_pixel_on_a_good_image_is_refused():
    maps, masks, defective = tied_category()
    masks[1, 0, 0] = True
    with pytest.raises(EvaluatorError) as error:
        rank_pixels(maps, label_regions(masks)[0], defective)
    assert error.value.message == "test image 1 is good, yet its mask has defective pixels"


def test_levels_follow_the_formula():
    rng = np.random.default_rng(0)
    good = rng.gamma(2, 1, (2, 40, 40)).astype(np.float32).round(2)
    maps = rng.gamma(4, 1, (3, 9, 9)).astype(np.float32).round(2)
    share = (good.ravel() >= maps[..., None]).mean(axis=-1)
    with np.errstate(divide="ignore"):
        expected = np.round(255 * np.minimum(4, -np.log10(share)) / 4)
    np.testing.assert_array_equal(good_false_positive_levels(maps, good), expected)


def test_levels_of_known_shares():
    good = np.arange(100_000, dtype=np.float32)
    score = np.array([-1, 0, 90_000, 99_000, 99_900, 99_990, 100_000], np.float32)
    levels = good_false_positive_levels(score, good)
    # 255 / 4 levels a decade; 1 % is 127.5, rounded to even
    np.testing.assert_array_equal(levels, [0, 0, 64, 128, 191, 255, 255])


def test_levels_without_good_images_are_refused():
    with pytest.raises(EvaluatorError, match="no good test image"):
        good_false_positive_levels(np.ones((1, 2, 2), np.float32), np.empty((0, 2, 2), np.float32))
