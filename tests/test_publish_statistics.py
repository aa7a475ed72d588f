"""The tests against the prior, with scipy as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from builder.prior import draw
from builder.publish.statistics import (
    _laws,
    ks_test,
    measure,
    normal_cdf,
    parameter_names,
    wilson,
)
from builder.publish.subsample import Painted, Subsample
from builder.recipe import load_recipe


def subsample_of(recipe, count):
    normal, theta = draw(recipe.model_copy(update={"seed": 1}), 0, count, 3)
    return Subsample(np.arange(count), normal, theta, np.arange(min(count, 50)))


def painted(changes):
    return Painted(np.arange(len(changes)), {}, np.array(changes))


@pytest.mark.parametrize("n", [5, 100, 5000])
@pytest.mark.parametrize("shift", [0, 0.02, 0.1])
def test_ks_statistic_and_p_value_are_scipy_s(n, shift):
    values = np.random.default_rng(n).random(n) * (1 - shift)
    ours = ks_test(values, lambda x: np.clip(x, 0, 1))
    theirs = stats.kstest(values, "uniform")
    assert ours[0] == pytest.approx(theirs.statistic, abs=1e-12)
    assert ours[1] == pytest.approx(theirs.pvalue, abs=0.02 if n == 5 else 0.005)


def test_normal_cdf_is_scipy_s():
    z = np.linspace(-9, 9, 1001)
    np.testing.assert_allclose(normal_cdf(z), stats.norm.cdf(z), atol=2e-7)


@pytest.mark.parametrize("name", ["paper", "fine"])
def test_true_draws_pass_and_every_kind_is_tested(name):
    recipe = load_recipe(name)
    found = measure(recipe, "0" * 64, subsample_of(recipe, 3000), painted([0, 1, 2, 3]))
    assert [test.kind for test in found.kinds] == ["v", "mu", "sigma", "rho", "pi", "s"]
    assert all(test.p_value > 0.01 for test in found.kinds)
    assert found.parameters_tested == 271
    assert found.smallest_p_value_corrected > 0.01


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"max_abs_rho": 0.9}, "rho"),
        ({"scale": {"low": 0.0, "high": 0.95}}, "s"),
        ({"sigma": {"kind": "softplus_normal", "offset": 0.03}}, "sigma"),
        ({"color": {"low": -1.0, "high": 0.97}}, "v"),
    ],
)
def test_draws_of_another_prior_fail_their_kind(change, kind):
    recipe = load_recipe("paper")
    prior = recipe.prior.model_validate({**recipe.prior.model_dump(), **change})
    drawn = subsample_of(recipe.model_copy(update={"prior": prior}), 3000)
    found = {test.kind: test for test in measure(recipe, "", drawn, painted([5])).kinds}
    assert found[kind].p_value < 1e-4
    assert all(test.p_value > 0.005 for name, test in found.items() if name != kind)


@pytest.mark.parametrize("components", [2, 5, 30])
def test_law_of_pi_is_that_of_simulated_shares(components):
    recipe = load_recipe("paper").model_copy(update={"components": components})
    _, law = _laws(recipe)["pi"]
    normals = np.random.default_rng(1).standard_normal((200_000, components))
    shares = np.exp(normals[:, 0]) / np.exp(normals).sum(1)
    grid = np.quantile(shares, np.linspace(0.01, 0.99, 50))
    empirical = np.searchsorted(np.sort(shares), grid) / len(shares)
    np.testing.assert_allclose(law(grid), empirical, atol=0.004)


def test_law_of_two_shares_is_that_of_a_logistic_normal():
    recipe = load_recipe("paper").model_copy(update={"components": 2})
    _, law = _laws(recipe)["pi"]
    p = np.linspace(0.01, 0.99, 99)
    exact = stats.norm.cdf(np.log(p / (1 - p)) / np.sqrt(2))
    np.testing.assert_allclose(law(p), exact, atol=0.002)


MIXTURE = {"kind": "mixture", "share": 0.3, "low": 0.02, "high": 0.3}


@pytest.mark.parametrize("change", [{"sigma": MIXTURE}, {"pi": "peak"}])
def test_draws_of_a_mixture_and_of_peaks_follow_their_law(change):
    recipe = load_recipe("paper")
    prior = recipe.prior.model_validate({**recipe.prior.model_dump(), **change})
    recipe = recipe.model_copy(update={"prior": prior})
    found = measure(recipe, "", subsample_of(recipe, 3000), painted([5]))
    kinds = {test.kind: test for test in found.kinds}
    assert all(test.p_value > 0.005 for test in kinds.values())
    assert found.smallest_p_value_corrected > 0.01


@pytest.mark.parametrize("kind", ["log_uniform", "mixture"])
def test_law_of_peaks_is_that_of_simulated_shares(kind):
    recipe = load_recipe("paper")
    sigma = MIXTURE | {"kind": kind}
    if kind == "log_uniform":
        del sigma["share"]
    prior = recipe.prior.model_validate({**recipe.prior.model_dump(), "sigma": sigma, "pi": "peak"})
    recipe = recipe.model_copy(update={"prior": prior})
    words, law = _laws(recipe)["pi"]
    assert words == "height by the softmax of 30 standard normals"
    _, theta = draw(recipe, 0, 20_000, 1)
    shares = np.sort(theta[:, 8:-1:9].ravel().astype(float))
    grid = np.quantile(shares, np.linspace(0.01, 0.99, 50))
    empirical = np.searchsorted(shares, grid) / len(shares)
    np.testing.assert_allclose(law(grid), empirical, atol=0.01)


def test_law_of_a_mixture_is_that_of_its_parts():
    recipe = load_recipe("paper")
    prior = recipe.prior.model_validate({**recipe.prior.model_dump(), "sigma": MIXTURE})
    words, law = _laws(recipe.model_copy(update={"prior": prior}))["sigma"]
    assert words.startswith("in 30 % of the images log-uniform in [0.02, 0.3], else softplus")
    # Half of the log-uniform law lies below sqrt(0.02 * 0.3); of the softplus 2.5e-2 or less.
    wide = stats.norm.cdf(np.log(np.expm1(np.sqrt(0.006) - 0.01)))
    assert law(np.array([np.sqrt(0.006)])) == pytest.approx(0.3 * 0.5 + 0.7 * wide)


def test_constant_parameters_have_no_test():
    recipe = load_recipe("paper")
    fixed = recipe.prior.model_validate(
        {
            **recipe.prior.model_dump(),
            "scale": {"low": 0.5, "high": 0.5},
            "sigma": {"kind": "log_uniform", "low": 0.1, "high": 0.1},
            "max_abs_rho": 0.0,
        }
    )
    recipe = recipe.model_copy(update={"prior": fixed, "components": 1})
    found = measure(recipe, "", subsample_of(recipe, 200), painted([5]))
    assert {test.kind for test in found.kinds if test.statistic is None} == {
        "sigma",
        "rho",
        "pi",
        "s",
    }
    assert found.parameters_tested == 5


def test_parameter_names_follow_equation_1():
    recipe = load_recipe("paper").model_copy(update={"components": 2, "channels": 1})
    assert parameter_names(recipe) == [
        *("v_1[0]", "mu_x[0]", "mu_y[0]", "sigma_x[0]", "sigma_y[0]", "rho[0]", "pi[0]"),
        *("v_1[1]", "mu_x[1]", "mu_y[1]", "sigma_x[1]", "sigma_y[1]", "rho[1]", "pi[1]"),
        "s",
    ]


def test_visibility_counts_changes_below_two_levels():
    recipe = load_recipe("paper")
    seen = measure(recipe, "", subsample_of(recipe, 50), painted([0, 1, 2, 9])).visibility
    assert (seen.samples, seen.below_count, seen.below_share) == (4, 2, 0.5)
    assert seen.quantiles["0.5"] == 1.5


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (11, 600), (10, 10)])
def test_interval_is_scipy_s(count, n):
    exact = stats.binomtest(count, n).proportion_ci(0.95, "wilson")
    assert wilson(count, n) == pytest.approx((exact.low, exact.high), abs=1e-6)
