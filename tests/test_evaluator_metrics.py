"""Metrics against scikit-learn, a plain AU-PRO and values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from evaluator.errors import EvaluatorError
from evaluator.metrics import (
    CURVE_FPR,
    LIMITS,
    METRICS,
    aupro,
    curves,
    image_pixel_auroc,
    mean_and_sd,
    measure,
    region_scores,
)
from evaluator.statistics import statistics
from tests import naive
from tests.evaluator_scores import count, tied_category

NOT_FINITE = (
    "the anomaly map of test image 4 has a score that is not finite; "
    "are the weights of the backbone damaged?"
)


def f1_max(truth, score):
    precision, recall, _ = precision_recall_curve(truth, score)
    both = precision + recall
    return np.max(2 * precision * recall / np.where(both > 0, both, 1))


def expected(maps, masks, defective):
    pixel, score = masks.ravel(), maps.ravel()
    highest = maps.max(axis=(1, 2))
    return {
        "pixel_auroc": roc_auc_score(pixel, score),
        **{name: naive.au_pro(maps, masks, limit) for name, limit in LIMITS.items()},
        "pixel_ap": average_precision_score(pixel, score),
        "pixel_f1_max": f1_max(pixel, score),
        "image_auroc": roc_auc_score(defective, highest),
        "image_ap": average_precision_score(defective, highest),
        "image_f1_max": f1_max(defective, highest),
    }


@pytest.mark.parametrize("decimals", [0, 1, 2, 7])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_scikit_learn_and_plain_au_pro(seed, decimals):
    maps, masks, defective = tied_category(seed, images=9, size=24)
    maps = (maps + np.random.default_rng(seed).normal(size=maps.shape)).astype(np.float32)
    maps = maps.round(decimals)
    found = measure(count(maps, masks, defective))
    assert found == pytest.approx(expected(maps, masks, defective), abs=1e-12)
    assert tuple(found) == METRICS


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_metrics_of_few_different_scores(seed, values):
    rng = np.random.default_rng(seed)
    masks = rng.random((5, 4, 4)) < 0.3
    masks[:2] = False
    masks[4] = True  # no negative pixel on this image
    maps = rng.integers(0, values, masks.shape).astype(np.float32)
    defective = np.arange(5) >= 2
    found = measure(count(maps, masks, defective))
    assert found == pytest.approx(expected(maps, masks, defective), abs=1e-12)


def test_perfect_maps_have_perfect_metrics():
    _, masks, _ = tied_category()
    found = measure(count(masks.astype(np.float32), masks))
    assert set(found.values()) == {1.0}


def test_equal_scores_everywhere():
    masks = np.zeros((4, 5, 5), np.bool_)
    masks[2:, 0] = True
    found = measure(count(np.ones(masks.shape, np.float32), masks))
    # The curve is the diagonal; precision is the share of positives: 10 of 100, and 2 of 4.
    assert found == pytest.approx(
        {
            "pixel_auroc": 0.5,
            "aupro_30": 0.15,
            "aupro_05": 0.025,
            "aupro_01": 0.005,
            "pixel_ap": 0.1,
            "pixel_f1_max": 2 / 11,
            "image_auroc": 0.5,
            "image_ap": 0.5,
            "image_f1_max": 2 / 3,
        },
        abs=1e-15,
    )


def by_hand():
    """12 negatives: 0 .. 9, 8, 9; region 0 scores 10 and 7.5, region 1 7 and 0, both tied."""
    maps = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[10, 7.5], [8, 9]], [[7, 0], [-1, -1]]])
    masks = np.zeros((4, 2, 2), np.bool_)
    masks[2, 0] = masks[3, 0] = True
    maps[3, 1] = 8, 9
    return count(maps.astype(np.float32), masks)


def test_region_scores_by_hand():
    # False positive rates: 10 at 0, 7.5 at 4/12, 7 from 4/12 to 5/12, 0 from 11/12 to 1. Up to a
    # limit of 1 each pixel adds 1 - its middle rate; the mean over a region's two pixels counts.
    s = by_hand()
    assert region_scores(s, 1.0) == pytest.approx([(12 + 8) / 24, (7.5 + 0.5) / 24], abs=1e-15)
    # Up to 4.5/12 the tied group is cut: (0.5/12)^2 / (2/12) = 0.125/12.
    assert region_scores(s, 4.5 / 12) == pytest.approx([5 / 9, 0.125 / 9], abs=1e-15)
    assert region_scores(s, 0.3) == pytest.approx([0.5, 0], abs=1e-15)


def test_mean_of_region_scores_is_aupro():
    maps, masks, defective = tied_category(seed=3)
    s = count(maps, masks, defective)
    for limit in (0.01, 0.07, 0.3, 1.0):
        assert aupro(s, limit) == pytest.approx(naive.au_pro(maps, masks, limit), abs=1e-12)


def test_curves_pass_through_the_official_points():
    maps, masks, defective = tied_category(seed=4)
    s = count(maps, masks, defective)
    fpr, pro = naive.pro_curve(maps, masks)
    found_tpr, found_pro = curves(s, fpr)
    upper = [pro[fpr == rate].max() for rate in fpr]  # the upper end of each jump
    assert found_pro == pytest.approx(upper, abs=1e-12)
    recall = [(maps[masks] >= t).mean() for t in np.unique(maps)[::-1]]
    upper = [np.append(0, recall)[fpr == rate].max() for rate in fpr]
    assert found_tpr == pytest.approx(upper, abs=1e-12)


def test_curves_between_the_points_are_straight():
    maps, masks, defective = tied_category(seed=5)
    fpr, pro = naive.pro_curve(maps, masks)
    middle = (fpr[1:] + fpr[:-1])[np.diff(fpr) > 0] / 2
    _, found = curves(count(maps, masks, defective), middle)
    assert found == pytest.approx(np.interp(middle, fpr, pro), abs=1e-12)


def test_curves_end_at_one_and_never_fall():
    s = count(*tied_category(seed=6))
    for curve in curves(s, CURVE_FPR):
        assert curve[-1] == 1
        assert (np.diff(curve) >= 0).all()
    assert CURVE_FPR[0] == 0
    assert {0.01, 0.05, 0.3, 1.0} <= set(CURVE_FPR)
    assert sorted(set(CURVE_FPR)) == list(CURVE_FPR)


def test_pixel_auroc_of_an_image_is_against_all_negatives():
    maps, masks, defective = tied_category(seed=7)
    found = image_pixel_auroc(count(maps, masks, defective))
    assert np.isnan(found[:3]).all()  # two good ones, and an empty mask
    for index in (3, 4, 5):
        score = np.concatenate([maps[~masks], maps[index][masks[index]]])
        truth = np.arange(len(score)) >= (~masks).sum()
        assert found[index] == pytest.approx(roc_auc_score(truth, score), abs=1e-12)


def test_empty_mask_counts_for_images_and_as_negative_pixels():
    maps, masks, defective = tied_category()
    s = count(maps, masks, defective)
    assert s.negatives == (~masks).sum()
    assert s.positives_of[:3].tolist() == [0, 0, 0]
    assert s.pairs.shape == (4, 6)
    assert s.pairs[0].tolist() == [0] * 6


def test_without_masks_there_are_image_metrics_only():
    maps, _, defective = tied_category()
    s = statistics(maps, None, defective)
    found = measure(s)
    assert {name for name, value in found.items() if value is None} == {
        name for name in METRICS if not name.startswith("image")
    }
    highest = maps.max(axis=(1, 2))
    assert found["image_auroc"] == pytest.approx(roc_auc_score(defective, highest), abs=1e-15)
    assert np.isnan(image_pixel_auroc(s)).all()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"score": np.nan}, NOT_FINITE),
        ({"score": -np.inf}, NOT_FINITE),
        ({"defective": False}, "no defective test image; every metric needs good and defective"),
        ({"defective": True}, "no good test image; every metric needs good and defective"),
        ({"mask": False}, "no defective pixel in any mask; pixel metrics are undefined"),
        ({"mask": True}, "no good pixel in any test image; pixel metrics are undefined"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, line):
    maps, masks, defective = tied_category()
    if "score" in change:
        maps[4, 3, 2] = change["score"]
    if "defective" in change:
        defective[:] = change["defective"]
    if "mask" in change:
        masks[:] = change["mask"]
    with pytest.raises(EvaluatorError) as error:
        count(maps, masks, defective)
    assert error.value.message == line


def test_mean_and_sd_of_three():
    mean, sd = mean_and_sd([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert sd == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2


def test_sd_of_one_seed_is_none():
    assert mean_and_sd([0.9]) == (0.9, None)
