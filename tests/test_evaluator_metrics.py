"""AUROC against pair counting and scikit-learn; the scale of the heat maps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from evaluator.metrics import auroc, mean_and_sd, rarity, share_thresholds
from tests import naive


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_auroc_equals_pair_counting_with_ties(items):
    defective = [is_bad for is_bad, _ in items]
    if all(defective) or not any(defective):
        return
    score = [float(value) for _, value in items]
    found = auroc(np.array(defective), np.array(score, np.float32))
    assert found == pytest.approx(naive.auroc(defective, score), abs=1e-12)


def test_auroc_equals_scikit_learn_on_maps():
    rng = np.random.default_rng(0)
    masks = rng.random((5, 40, 40)) < 0.03
    maps = (rng.random((5, 40, 40)) + masks * 0.4).round(2).astype(np.float32)
    expected = roc_auc_score(masks.ravel(), maps.ravel())
    assert auroc(masks, maps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("score", "expected"), [([0, 1, 2, 3], 1.0), ([3, 2, 1, 0], 0.0), ([1, 1, 1, 1], 0.5)]
)
def test_auroc_of_known_orders(score, expected):
    assert auroc(np.array([0, 0, 1, 1], bool), np.array(score, np.float32)) == expected


def test_mean_and_sd_of_three():
    mean, sd = mean_and_sd([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert sd == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2


def test_sd_of_one_seed_is_none():
    assert mean_and_sd([0.9]) == (0.9, None)


def test_rarity_is_the_logarithm_of_the_share():
    scores = np.arange(1_000_000, dtype=np.float32)
    shades = rarity(scores[[0, 900_000, 990_000, 999_000, 999_999]], share_thresholds(scores))
    np.testing.assert_allclose(shades, [0, 85, 170, 255, 255], atol=1)


def test_rarity_does_not_depend_on_units():
    maps = np.random.default_rng(0).random((3, 16, 16), dtype=np.float32)
    other = (maps * 100 + 7).astype(np.float32)
    expected = rarity(maps, share_thresholds(maps)).astype(int)
    np.testing.assert_allclose(rarity(other, share_thresholds(other)), expected, atol=1)


def test_rarity_of_equal_scores_is_lowest():
    maps = np.ones((2, 4, 4), np.float32)
    assert rarity(maps, share_thresholds(maps)).max() == 0
