"""Differences of arms: bootstrap, variance between training seeds, Holm."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from evaluator.evidence.differences import (
    Noise,
    difference,
    differences,
    group_score,
    half_interval,
    noise_of,
    pooled_noise,
)
from evaluator.evidence.gathered import Scored


def result_of(name: str, seeds: list[float], draws: list[float], train: bool = True, **more):
    experiment = SimpleNamespace(
        train=[] if train else None,
        backbone=more.get("backbone"),
        baseline=more.get("baseline"),
        runs=more.get("runs"),
        seeds=list(range(len(seeds))),
    )
    without = (np.array(more.get("good", [0, 1.0])), np.array(more.get("bad", [0, 1.0])))
    score = Scored(np.array(seeds), np.zeros(len(seeds)), np.array(draws), without)
    return SimpleNamespace(
        arm=SimpleNamespace(name=name, experiment=experiment),
        arch=more.get("arch", "resnet18"),
        scores={("a", "pixel_auroc"): score},
    )


def test_noise_between_seeds_is_pooled_over_trained_arms() -> None:
    results = [
        result_of("x", [90, 92], [0, 0]),  # squares 1 + 1, one degree of freedom
        result_of("y", [80, 83, 86], [0, 0]),  # 9 + 0 + 9, two
        result_of("random", [10, 70], [0, 0], train=False),  # not trained: left out
    ]
    results.append(result_of("m", [90, 94], [0, 0], arch="mobilenet_v2"))
    assert pooled_noise(results, ["a"], "pixel_auroc") == {
        "resnet18": Noise(20 / 3, 3),
        "mobilenet_v2": Noise(8, 1),
    }


def test_an_arm_that_hardly_converges_widens_its_own_interval_alone() -> None:
    calm = [result_of(f"c{n}", [90, 90 + n % 3], [0, 0]) for n in range(12)]
    wild = result_of("w", [40, 90], [0, 0])
    pooled = pooled_noise([*calm, wild], ["a"], "pixel_auroc")
    assert pooled == {"resnet18": Noise(pytest.approx((4 * 0.5 + 4 * 2) / 12), 12)}
    assert noise_of(wild, wild.scores["a", "pixel_auroc"], pooled) == Noise(1250, 1)
    assert noise_of(calm[0], calm[0].scores["a", "pixel_auroc"], pooled) == pooled["resnet18"]
    assert noise_of(calm[2], calm[2].scores["a", "pixel_auroc"], pooled) == pooled["resnet18"]


def test_interval_typed_by_hand() -> None:
    # Images: the differences 1 and 3 of the draws have variance 2. Without one of three good, or
    # of three defective images the differences are 0, 1, 2 (jackknife variance 4 / 3) and 0, 0, 0:
    # all of it is the good ones', so 2 degrees of freedom. Training: 1.5 / 2 a side, 3 degrees of
    # freedom each. Satterthwaite: 3.5^2 / (2^2 / 2 + 2 * 0.75^2 / 3) = 5.1579.
    x = result_of("x", [92, 94], [91, 93], good=[0, 1, 2], bad=[0, 0, 0])
    y = result_of("y", [90, 92], [90, 90], good=[0, 0, 0], bad=[0, 0, 0])
    one = difference(x, y, "chosen", ["a"], "pixel_auroc", {"resnet18": Noise(1.5, 3)})
    t = 2.5471  # of Student's distribution with 5.1579 degrees of freedom, 97.5 %
    assert one.difference == 2
    assert one.high - one.difference == pytest.approx(t * 3.5**0.5, rel=1e-3)
    assert one.low + one.high == pytest.approx(4)


def test_half_interval_of_a_score_typed_by_hand() -> None:
    # Draws 91 and 93: variance 2; good images alone vary, 2 degrees of freedom. Training: 1.5 / 2
    # with 3. Satterthwaite: 2.75^2 / (2^2 / 2 + 0.75^2 / 3) = 3.4571.
    x = result_of("x", [92, 94], [91, 93], good=[0, 1, 2], bad=[0, 0, 0])
    half = half_interval(x, ["a"], "pixel_auroc", {"resnet18": Noise(1.5, 3)})
    assert half == pytest.approx(2.9561 * 2.75**0.5, rel=1e-3)
    assert np.isnan(half_interval(x, ["a"], "pixel_auroc", {}))
    assert np.isnan(half_interval(x, ["b"], "pixel_auroc", {"resnet18": Noise(1.5, 3)}))


def test_noise_of_a_side_is_its_kinds() -> None:
    pooled = {"resnet18": Noise(1.5, 3)}
    file = result_of("f", [92.0], [0, 0], train=False, backbone="w.safetensors")
    calm = result_of("r", [90, 90], [0, 0], train=False, backbone="random:resnet18:{seed}")
    wild = result_of("r", [90, 94], [0, 0], train=False, backbone="random:resnet18:{seed}")
    other = result_of("o", [90, 94], [0, 0], arch="mobilenet_v2")
    for result, noise in ((file, Noise(0, 1)), (calm, Noise(1.5, 3)), (wild, Noise(8, 1))):
        assert noise_of(result, result.scores["a", "pixel_auroc"], pooled) == noise
    assert noise_of(other, other.scores["a", "pixel_auroc"], pooled) is None


def test_arms_that_share_their_runs_are_paired_by_seed() -> None:
    base = result_of("base", [80, 90], [90, 90])  # the runs are far apart
    x = result_of("x", [82, 94], [91, 93], train=False, runs="base", baseline="base")
    other = result_of("z", [10, 90], [91, 93], baseline="base")  # runs of its own
    pooled = {"resnet18": Noise(900, 3)}
    wide = difference(other, base, "c", ["a"], "pixel_auroc", pooled)
    one = difference(x, base, "c", ["a"], "pixel_auroc", pooled)
    assert one.difference == 3
    # Variance 2 of the images with 1 degree of freedom; differences 2 and 4 of the seeds: 2 / 2, 1.
    freedom = 3**2 / (2**2 / 1 + 1**2 / 1)
    assert freedom == 1.8
    t = 4.7949  # of Student's distribution with 1.8 degrees of freedom, 97.5 %
    assert one.high - one.difference == pytest.approx(t * 3**0.5, rel=2e-3)
    assert one.high - one.low < (wide.high - wide.low) / 3


def test_difference_without_any_second_run_has_no_interval() -> None:
    x, y = result_of("x", [92], [91, 93]), result_of("y", [90], [90, 90])
    one = difference(x, y, "chosen", ["a"], "pixel_auroc", {})
    assert one.difference == 2
    assert np.isnan(one.low)
    assert one.p == 1
    assert not one.distinct


def test_differences_are_corrected_over_all_arms_of_a_group() -> None:
    results = [
        result_of("base", [90, 90], [90, 91, 89]),
        result_of("x", [99, 99], [99, 98, 99.5], baseline="base", good=[0] * 9, bad=[0] * 9),
        result_of("y", [91, 91], [91, 90, 92], baseline="base", good=[0] * 9, bad=[0] * 9),
    ]
    results[0] = result_of("base", [89.9, 90.1], [90, 91, 89], good=range(9), bad=range(9))
    x, y = differences(results, {"chosen": ["a"]})
    assert (x.arm, y.arm) == ("x", "y")
    assert x.p_holm == pytest.approx(min(1, 2 * x.p))
    assert y.p_holm == pytest.approx(max(y.p, x.p_holm))
    assert x.distinct
    assert not y.distinct


def test_mean_of_categories_is_that_of_those_with_masks() -> None:
    x = result_of("x", [92, 94], [91, 93])
    plain = x.scores["a", "pixel_auroc"]
    other = Scored(plain.seeds - 10, plain.sds, plain.draws - 2, plain.without)
    x.scores["b", "pixel_auroc"] = other
    assert list(group_score(x, ["a", "b"], "pixel_auroc").seeds) == [87, 89]
    assert list(group_score(x, ["a", "b"], "pixel_auroc").draws) == [90, 92]
    assert list(group_score(x, ["a", "b", "no masks"], "pixel_auroc").seeds) == [87, 89]
    assert group_score(x, ["no masks"], "pixel_auroc") is None
