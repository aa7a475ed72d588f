"""Intervals and comparisons: paired draws, groups, Holm's families."""

import numpy as np
import pytest

from evaluator.compare import (
    Resampled,
    add_to_groups,
    comparisons,
    complete,
    distinct_groups,
    pairs_of,
    resample,
    undecidable,
)
from evaluator.report import Bootstrap, Comparison
from evaluator.statistics import Statistics, statistics

SETTINGS = Bootstrap(draws=500, seed=0, level=0.95)


def statistics_of(quality: float, seed: int = 0, images: int = 8) -> Statistics:
    """As many good and defective images of 8 x 8 pixels; the defects score `quality` higher."""
    maps = np.random.default_rng(seed).normal(size=(2 * images, 8, 8)).astype(np.float32)
    regions = np.zeros((2 * images, 8, 8), np.int32)
    for image in range(images, 2 * images):
        regions[image, 2:5, 2:5] = image - images + 1
    maps[regions > 0] += quality
    return statistics(maps, regions, np.arange(2 * images) >= images)


def found_of(images: int = 8, **quality: float):
    seeds = {name: [statistics_of(q, images=images)] for name, q in quality.items()}
    found = resample("bolt", seeds, SETTINGS)
    return {key: one for key, one in found.items() if key[1] == "pixel_auroc"}


def compared(found) -> Comparison:
    (pair,) = comparisons(pairs_of("own", "bolt", found, 0.95), 0.95)
    return pair


def test_better_backbone_is_told_apart():
    found = found_of(good=3.0, bad=0.2)
    pair = compared(found)
    assert (pair.a, pair.b) == ("good", "bad")
    expected = found["good", "pixel_auroc"].value - found["bad", "pixel_auroc"].value
    assert pair.difference == pytest.approx(expected, abs=1e-4)
    assert 0 < pair.low < pair.high
    assert pair.p == pytest.approx(2 / 501)
    assert pair.distinct


def test_two_images_of_a_kind_are_too_few_to_tell_apart():
    pair = compared(found_of(images=2, good=6.0, bad=-6.0))
    assert pair.low > 50
    assert pair.p >= 2 / 2**4
    assert not pair.distinct


def test_equal_backbones_are_not_told_apart():
    pair = compared(found_of(a=1.0, b=1.0))
    assert (pair.difference, pair.low, pair.high, pair.p) == (0.0, 0.0, 0.0, 1.0)
    assert not pair.distinct


def test_order_of_the_seeds_makes_no_difference():
    three = [statistics_of(1.0, seed) for seed in (0, 1, 2)]
    found = resample("bolt", {"a": three, "b": three[::-1]}, SETTINGS)
    for pair in pairs_of("own", "bolt", found, 0.95):
        assert pair.p == 1


def test_difference_is_of_the_same_draws():
    # The same maps but for a shift: single values scatter, their difference hardly.
    found = found_of(a=1.0, b=1.05)
    pair = compared(found)
    low, high = np.quantile(found["a", "pixel_auroc"].draws, [0.025, 0.975])
    assert pair.high - pair.low < (high - low) / 4


def test_numbers_of_a_cell_are_the_mean_over_its_seeds():
    seeds = [statistics_of(1.0, seed) for seed in (0, 1)]
    both = resample("bolt", {"a": seeds}, SETTINGS)["a", "aupro_30"]
    parts = [resample("bolt", {"a": [s]}, SETTINGS)["a", "aupro_30"] for s in seeds]
    assert both.value == pytest.approx((parts[0].value + parts[1].value) / 2)
    np.testing.assert_allclose(both.draws, (parts[0].draws + parts[1].draws) / 2)
    for kind in (0, 1):
        mean = (parts[0].without[kind] + parts[1].without[kind]) / 2
        np.testing.assert_allclose(both.without[kind], mean)


def test_draws_do_not_depend_on_the_size_of_the_chunks():
    one = statistics_of(1.0)
    row_bytes = 8 * (one.grid_negatives.shape[1] + 1)
    whole = resample("bolt", {"a": [one]}, SETTINGS, chunk_bytes=500 * row_bytes)
    pieces = resample("bolt", {"a": [one]}, SETTINGS, chunk_bytes=70 * row_bytes)
    for key, one in whole.items():
        np.testing.assert_allclose(pieces[key].draws, one.draws, rtol=0, atol=1e-11)
        np.testing.assert_allclose(pieces[key].without[0], one.without[0], rtol=0, atol=1e-11)


def test_draws_of_categories_are_independent():
    same = {"a": [statistics_of(1.0)]}
    bolt = resample("bolt", same, SETTINGS)["a", "pixel_auroc"].draws
    nut = resample("nut", same, SETTINGS)["a", "pixel_auroc"].draws
    assert abs(np.corrcoef(bolt, nut)[0, 1]) < 0.15


def test_group_is_the_mean_of_its_categories_and_lacks_what_one_lacks():
    members = {"own": ["bolt", "nut"], "all": ["bolt", "nut", "screw"]}
    bolt = Resampled(85.0, np.array([80.0, 90.0]), (np.array([1.0]), np.array([2.0, 4.0])))
    nut = Resampled(55.0, np.array([60.0, 50.0]), (np.array([6.0]), np.array([8.0])))
    sums = {}
    both = {("a", "pixel_auroc"): bolt, ("a", "image_auroc"): bolt}
    add_to_groups(sums, members, "bolt", both)
    add_to_groups(sums, members, "nut", {("a", "pixel_auroc"): nut})
    found = complete(sums["own"], members["own"])
    assert list(found) == [("a", "pixel_auroc")]
    mean = found["a", "pixel_auroc"]
    assert (mean.value, mean.draws.tolist()) == (70.0, [70.0, 70.0])
    assert [kind.tolist() for kind in mean.without] == [[0.5], [1.0, 2.0], [3.0], [4.0]]
    assert complete(sums["all"], members["all"]) == {}


def test_groups_that_repeat_another_or_a_category_are_left_out():
    assert distinct_groups({"own": ["bolt", "nut"], "all": ["bolt", "nut"]}) == ["own"]
    assert distinct_groups({"low": ["pill"], "own": ["nut"], "all": ["pill", "nut"]}) == ["all"]
    assert distinct_groups({"own": ["bolt"], "all": ["bolt"]}) == []


def test_no_draws_give_no_intervals():
    none = Bootstrap(draws=0, seed=0, level=0.95)
    assert resample("bolt", {"a": [statistics_of(1.0)]}, none) == {}


def test_means_of_groups_are_a_family_of_their_own():
    found = found_of(a=3.0, b=0.2)
    pairs = [
        *pairs_of("own", "bolt", found, 0.95),
        *pairs_of("own", "nut", found, 0.95),
        *pairs_of("all", "mean", found, 0.95),
    ]
    result = [(p.category, p.p_holm) for p in comparisons(pairs, 0.95)]
    p = 2 / 501
    assert result == [("bolt", 2 * p), ("nut", 2 * p), ("mean", p)]


def test_draws_too_few_for_so_many_comparisons_are_told():
    pair = compared(found_of(a=3.0, b=0.2))
    many = [pair.model_copy(update={"category": f"part {i}"}) for i in range(315)]
    assert undecidable(many, 10_000, 0.95) == (
        "10000 draws cannot tell anything apart among 315 comparisons of a metric; "
        "use --bootstrap 30000"
    )
    assert undecidable(many, 12_600, 0.95) is None  # 315 x 2 / 12601 is just below 0.05
    assert undecidable(many, 12_598, 0.95) is not None
    assert undecidable(many[:249], 10_000, 0.95) is None
    assert undecidable([], 10, 0.95) is None
    assert undecidable(many, 0, 0.95) is None
    assert undecidable(many, 10_000, 1.0) is None
    assert undecidable(many * 20, 10_000, 0.95) == (
        "10000 draws cannot tell anything apart among 6300 comparisons of a metric; "
        "compare fewer backbones or categories"
    )
