"""Resampling from counts against resampled maps; intervals, p-values and Holm by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluator.bootstrap import (
    holm,
    image_weights,
    interval,
    p_value,
    resampler,
    t_test_p,
    weight_chunks,
    without_each,
)
from evaluator.metrics import LIMITS, METRICS, measure
from evaluator.statistics import Statistics, statistics
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


def weights_of(defective, draws, seed):
    return image_weights(defective, draws, np.random.Philox(key=seed))


def bootstrap(s, weights, metric):
    function = resampler(s, metric)
    return None if function is None else function(weights)


def test_weights_keep_the_number_of_good_and_defective_images():
    defective = np.arange(11) % 3 == 0
    weights = weights_of(defective, 200, seed=1)
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
    assert weights_of(defective, 2, seed=7).tolist() == expected
    assert weights_of(defective, 9, seed=7)[:2].tolist() == expected
    assert weights_of(defective, 2, seed=8).tolist() != expected


@pytest.mark.parametrize("rows", [1, 3, 7, 20, 50])
def test_weights_do_not_depend_on_the_size_of_the_chunks(rows):
    defective = np.arange(7) % 3 == 0
    chunks = list(weight_chunks(defective, 20, seed=5, rows=rows))
    assert max(map(len, chunks)) == min(rows, 20)
    np.testing.assert_array_equal(np.concatenate(chunks), weights_of(defective, 20, seed=5))


def test_each_image_is_left_out_once():
    chunks = [chunk.tolist() for chunk in without_each(3, 2)]
    assert chunks == [[[0, 1, 1], [1, 0, 1]], [[1, 1, 0]]]


def test_exact_draws_equal_metrics_of_resampled_maps():
    maps, masks, defective = tied_category(seed=1, images=9)
    s = count(maps, masks, defective)
    weights = weights_of(defective, 12, seed=0)
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
    weights = weights_of(s.image_defective, 15, seed=0)
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
    weights = weights_of(defective, 3, seed=0)
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


def test_difference_of_the_last_bit_is_no_difference():
    assert p_value(np.full(100, 1e-14)) == 1
    assert p_value(np.full(100, -1e-14)) == 1
    assert t_test_p(1e-14, [np.array([1.0, 2.0, 3.0])]) == 1


def test_t_test_p_of_one_kind_is_student_s():
    # The jackknife of a mean is its own standard error: leaving x out moves it by -x / (n - 1).
    values = np.array([2.0, 5.0, 3.0, 6.0, 1.0, 4.0, 9.0])
    without = (values.sum() - values) / 6
    expected = stats.ttest_1samp(values, 0).pvalue
    assert t_test_p(float(values.mean()), [without]) == pytest.approx(max(expected, 2 / 2**7))


def test_t_test_p_of_two_kinds_is_welch_s():
    one, two = np.array([2.0, 5.0, 3.0, 6.0]), np.array([2.0, 4.5, 3.0, 0.5, 1.0])
    without = [(one.sum() - one) / 3, -(two.sum() - two) / 4]
    expected = stats.ttest_ind(one, two, equal_var=False).pvalue
    assert t_test_p(float(one.mean() - two.mean()), without) == pytest.approx(expected)


def test_t_test_p_is_bounded_by_the_number_of_images():
    alike = np.full(3, 5.0)
    assert t_test_p(5.0, [alike, alike]) == 2 / 2**6
    assert t_test_p(5.0, [alike, alike[:1]]) == 1
    assert t_test_p(5.0, [alike, np.array([np.nan, 1.0, 1.0])]) == 1


@pytest.mark.parametrize(("good", "bad"), [(2, 3), (5, 5), (10, 10)])
def test_equally_good_backbones_are_rarely_told_apart(good, bad):
    """Pixel AUROC of two detectors that differ by chance alone; the bootstrap's p alone is below
    0.05 in about 22, 15 and 10 % of cases."""
    rng = np.random.default_rng(0)
    defective = np.arange(good + bad) >= good
    below = 0
    for case in range(200):
        pair = [two_levels(rng, good, bad) for _ in range(2)]
        functions = [resampler(s, "pixel_auroc") for s in pair]
        draws, without, value = (
            100 * (functions[0](weights) - functions[1](weights))
            for weights in (
                weights_of(defective, 200, case),
                next(without_each(good + bad, 100)),
                np.ones((1, good + bad), np.uint16),
            )
        )
        t_test = t_test_p(float(value[0]), [without[defective], without[~defective]])
        below += max(p_value(draws), t_test) < 0.05
    assert below <= 16  # 8 %: two standard deviations above 5 %


def two_levels(rng: np.random.Generator, good: int, bad: int) -> Statistics:
    """Images of 4 x 4 pixels, each with its own level, defects a level of their own above it."""
    maps = rng.normal(size=(good + bad, 4, 4)) + rng.normal(0, 0.3, (good + bad, 1, 1))
    regions = np.zeros(maps.shape, np.int32)
    for image in range(good, good + bad):
        regions[image, :2, :2] = image - good + 1
        maps[image, :2, :2] += rng.normal(2, 0.7)
    return statistics(maps.astype(np.float32), regions, np.arange(good + bad) >= good)


def test_holm_by_hand():
    # In order: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []
