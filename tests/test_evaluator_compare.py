"""Intervals and comparisons: paired draws, groups, Holm's families."""

import numpy as np
import pytest

from evaluator.compare import cell_draws, comparisons, group_draws, with_intervals
from evaluator.report import Bootstrap, TableRow
from evaluator.statistics import Statistics, statistics

SETTINGS = Bootstrap(draws=500, seed=0, level=0.95)


def statistics_of(quality: float, seed: int = 0) -> Statistics:
    """Eight good and eight defective images of 8 x 8 pixels; the defects score `quality` higher."""
    maps = np.random.default_rng(seed).normal(size=(16, 8, 8)).astype(np.float32)
    regions = np.zeros((16, 8, 8), np.int32)
    for image in range(8, 16):
        regions[image, 2:5, 2:5] = image - 7
    maps[regions > 0] += quality
    return statistics(maps, regions, np.arange(16) >= 8)


def row(backbone: str, mean: float, category: str = "bolt") -> TableRow:
    return TableRow(
        group="all" if category == "mean" else "own",
        category=category,
        backbone=backbone,
        metric="pixel_auroc",
        mean=mean,
        n_seeds=1,
    )


def draws_of(**quality: float):
    return cell_draws("bolt", {name: [statistics_of(q)] for name, q in quality.items()}, SETTINGS)


def test_better_backbone_is_told_apart():
    draws = draws_of(good=3.0, bad=0.2)
    rows = [row("good", 99.0), row("bad", 56.0)]
    (pair,) = comparisons(rows, draws, {}, 0.95)
    assert (pair.a, pair.b, pair.difference) == ("good", "bad", 43.0)
    assert 0 < pair.low < pair.high
    assert pair.p == pytest.approx(2 / 501)
    assert pair.distinct


def test_equal_backbones_are_not_told_apart():
    draws = draws_of(a=1.0, b=1.0)
    (pair,) = comparisons([row("a", 76.0), row("b", 76.0)], draws, {}, 0.95)
    assert (pair.difference, pair.low, pair.high, pair.p) == (0.0, 0.0, 0.0, 1.0)
    assert not pair.distinct


def test_difference_is_of_the_same_draws():
    # The same maps but for a shift: single values scatter, their difference hardly.
    draws = draws_of(a=1.0, b=1.05)
    (pair,) = comparisons([row("a", 76.0), row("b", 77.0)], draws, {}, 0.95)
    (a,) = with_intervals([row("a", 76.0)], draws, {}, 0.95)
    assert a.low is not None
    assert a.high is not None
    assert pair.high - pair.low < (a.high - a.low) / 4


def test_draws_of_a_cell_are_the_mean_over_its_seeds():
    seeds = [statistics_of(1.0, seed) for seed in (0, 1)]
    both = cell_draws("bolt", {"a": seeds}, SETTINGS)["bolt", "a", "aupro_30"]
    parts = [cell_draws("bolt", {"a": [s]}, SETTINGS)["bolt", "a", "aupro_30"] for s in seeds]
    np.testing.assert_allclose(both, (parts[0] + parts[1]) / 2)


def test_draws_of_categories_are_independent():
    same = {"a": [statistics_of(1.0)]}
    bolt = cell_draws("bolt", same, SETTINGS)["bolt", "a", "pixel_auroc"]
    nut = cell_draws("nut", same, SETTINGS)["nut", "a", "pixel_auroc"]
    assert abs(np.corrcoef(bolt, nut)[0, 1]) < 0.15


def test_group_is_the_mean_of_its_categories_and_lacks_what_one_lacks():
    one, two = np.array([80.0, 90.0]), np.array([60.0, 50.0])
    draws = {
        ("bolt", "a", "pixel_auroc"): one,
        ("nut", "a", "pixel_auroc"): two,
        ("bolt", "a", "image_auroc"): one,
    }
    groups = group_draws(draws, {"all": ["bolt", "nut"], "own": ["bolt"]})
    np.testing.assert_array_equal(groups["all", "a", "pixel_auroc"], [70.0, 70.0])
    assert ("all", "a", "image_auroc") not in groups
    assert ("own", "a", "image_auroc") in groups


def test_no_draws_give_no_intervals():
    none = Bootstrap(draws=0, seed=0, level=0.95)
    draws = cell_draws("bolt", {"a": [statistics_of(1.0)]}, none)
    assert draws == {}
    assert with_intervals([row("a", 76.0)], draws, {}, 0.95) == [row("a", 76.0)]
    assert comparisons([row("a", 76.0), row("b", 70.0)], draws, {}, 0.95) == []


def test_means_of_groups_are_a_family_of_their_own():
    draws = draws_of(a=3.0, b=0.2)
    groups = group_draws(draws, {"all": ["bolt"]})
    rows = [row("a", 99.0), row("b", 56.0), row("a", 99.0, "mean"), row("b", 56.0, "mean")]
    found = comparisons(rows, draws, groups, 0.95)
    assert [pair.p_holm for pair in found] == [pair.p for pair in found]  # each alone in its family
