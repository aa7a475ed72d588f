"""Resampling from counts against resampled maps; intervals, p-values and Holm by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluator.bootstrap import bootstrap, holm, image_weights, interval, p_value
from evaluator.metrics import LIMITS, METRICS, measure
from evaluator.statistics import statistics
from tests import naive
from tests.evaluator_scores import count, tied_category


def smooth_category(images: int = 30, size: int = 48):
    """Maps of noise in blocks, with one or two regions on the images after the tenth."""
    rng = np.random.default_rng(0)
    masks = np.zeros((images, size, size), np.bool_)
    for index, mask in enumerate(masks[10:]):
        top, left = rng.integers(0, size - 16, 2)
        mask[top : top + 8, left : left + 14] = True
        mask[2:6, 3 : 5 + index % 9] = index % 2
    noise = rng.gamma(8, 1, (images, size // 4, size // 4)).repeat(4, axis=1).repeat(4, axis=2)
    strength = rng.gamma(4, 1.5, (images, 1, 1))
    return (noise + strength * masks + rng.random(masks.shape)).astype(np.float32), masks


def test_weights_keep_the_number_of_good_and_defective_images():
    defective = np.arange(11) % 3 == 0
    weights = image_weights(defective, 200, seed=1)
    assert weights.dtype == np.uint16
    assert weights.shape == (200, 11)
    assert set(weights[:, defective].sum(axis=1)) == {4}
    assert set(weights[:, ~defective].sum(axis=1)) == {7}
    assert weights.mean(axis=0) == pytest.approx(np.ones(11), abs=0.25)


def test_weights_follow_from_the_seed():
    defective = np.array([False, False, True, True, True])
    words = np.random.Philox(key=7).random_raw(10).tolist()
    expected = []
    for draw in (words[:5], words[5:]):
        upper = [word >> 32 for word in draw]
        chosen = [value * 2 >> 32 for value in upper[:2]]
        chosen += [2 + (value * 3 >> 32) for value in upper[2:]]
        expected.append([chosen.count(image) for image in range(5)])
    assert image_weights(defective, 2, seed=7).tolist() == expected
    assert image_weights(defective, 9, seed=7)[:2].tolist() == expected
    assert image_weights(defective, 2, seed=8).tolist() != expected


def test_exact_draws_equal_metrics_of_resampled_maps():
    maps, masks, defective = tied_category(seed=1, images=9)
    s = count(maps, masks, defective)
    weights = image_weights(defective, 12, seed=0)
    found = {name: bootstrap(s, weights, name) for name in METRICS}
    for draw, weight in enumerate(weights):
        chosen = np.repeat(np.arange(9), weight)
        truth, highest = defective[chosen], maps[chosen].max(axis=(1, 2))
        expected = roc_auc_score(masks[chosen].ravel(), maps[chosen].ravel())
        assert found["pixel_auroc"][draw] == pytest.approx(expected, abs=1e-12)
        expected = roc_auc_score(truth, highest)
        assert found["image_auroc"][draw] == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score(truth, highest)
        assert found["image_ap"][draw] == pytest.approx(expected, abs=1e-12)


def test_aupro_draws_are_near_those_of_resampled_maps():
    maps, masks = smooth_category()
    s = count(maps, masks)
    weights = image_weights(s.image_defective, 15, seed=0)
    for metric, limit in LIMITS.items():
        found = bootstrap(s, weights, metric)
        for draw, weight in enumerate(weights):
            chosen = np.repeat(np.arange(len(maps)), weight)
            expected = naive.au_pro(maps[chosen], masks[chosen], limit)
            assert found[draw] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("metric", ["pixel_auroc", "aupro_30", "aupro_05", "aupro_01",
                                    "image_auroc", "image_ap"])  # fmt: skip
def test_draw_of_every_image_once_is_the_metric(metric):
    s = count(*tied_category(seed=2))
    found = bootstrap(s, np.ones((1, 6), np.uint16), metric)
    assert found[0] == pytest.approx(measure(s)[metric], abs=1e-12)


def test_metrics_that_cannot_be_resampled_are_none():
    maps, masks, defective = tied_category()
    weights = image_weights(defective, 3, seed=0)
    none = [name for name in METRICS if bootstrap(count(maps, masks), weights, name) is None]
    assert none == ["pixel_ap", "pixel_f1_max", "image_f1_max"]
    without = statistics(maps, None, defective)
    some = [name for name in METRICS if bootstrap(without, weights, name) is not None]
    assert some == ["image_auroc", "image_ap"]


def test_draws_without_positive_pixels_are_left_out():
    maps, masks, defective = tied_category()
    weights = np.array([[1, 1, 4, 0, 0, 0], [1, 1, 1, 1, 1, 1]], np.uint16)  # empty masks only
    s = count(maps, masks, defective)
    for metric in ("pixel_auroc", "aupro_30"):
        found = bootstrap(s, weights, metric)
        assert np.isnan(found).tolist() == [True, False]
        assert interval(found) == (found[1], found[1])


def test_interval_by_hand():
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert interval(np.arange(101.0), level=0.5) == pytest.approx((25, 75))


def test_p_value_by_hand():
    positive = np.arange(1, 100.0)  # none of 99 draws at or below 0
    assert p_value(positive) == pytest.approx(2 * 1 / 100)
    assert p_value(-positive) == pytest.approx(2 * 1 / 100)
    assert p_value(np.arange(-3, 96.0)) == pytest.approx(2 * 5 / 100)  # -3 -2 -1 0
    assert p_value(np.zeros(10)) == 1
    assert p_value(np.array([np.nan, *positive])) == pytest.approx(2 * 1 / 100)


def test_holm_by_hand():
    # In order: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []
