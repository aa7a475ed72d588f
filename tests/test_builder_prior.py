import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import _kernel, _philox
from builder.prior import draw
from builder.recipe import LogUniform, Mixture, Recipe, load_recipe
from builder.render import check_theta

RECIPE = load_recipe("paper")


@given(st.floats(-700, 700))
def test_exp_is_the_exponential(x: float):
    assert _kernel.exp(x) == pytest.approx(math.exp(x), rel=1e-15)


@pytest.mark.parametrize(("x", "power"), [(-708.1, 0.0), (0.0, 1.0), (709.1, math.inf)])
def test_exp_at_the_ends_of_its_range(x: float, power: float):
    assert _kernel.exp(x) == power


def test_exp_in_float32_is_within_its_bound():
    x = np.linspace(-86, 86, 20_001, dtype=np.float32)
    fast = np.array([_kernel._exp_float32(one) for one in x], np.float64)
    assert np.abs(fast / np.exp(x.astype(np.float64)) - 1).max() < 1.2e-7


@given(st.floats(1e-300, 1e300))
def test_log_is_the_logarithm(x: float):
    assert _kernel.log(x) == pytest.approx(math.log(x), rel=1e-15, abs=1e-15)


@given(st.floats(1e-300, 1, exclude_max=True))
def test_normal_quantile_is_the_inverse_of_the_normal_distribution(u: float):
    assert _kernel.normal_quantile(u) == pytest.approx(NormalDist().inv_cdf(u), rel=1e-9, abs=1e-9)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 2))
def test_philox_is_that_of_numpy(seed: int, index: int):
    words = np.empty((2, 12), np.uint64)
    _philox.fill(np.uint64(seed), np.uint64(index), words)
    key = np.array([seed, 0], np.uint64)
    for i in range(2):
        expected = np.random.Philox(key=key, counter=[0, index + i, 0, 0]).random_raw(12)
        assert (words[i] == expected).all()


def naive_theta(recipe: Recipe, index: int) -> list[float]:
    """Sample `index` drawn as prior.py says, one word at a time."""
    words = np.random.Philox(key=[recipe.seed, 0], counter=[0, index, 0, 0]).random_raw(2000)
    stream = iter(int(word) for word in words[1:])

    def uniform(low: float, high: float) -> float:
        return low + (next(stream) >> 11) / 2**53 * (high - low)

    def normal() -> float:
        return NormalDist().inv_cdf(((next(stream) >> 12) + 0.5) / 2**52)

    scale = uniform(0, 1)
    theta, shares = [], []
    sigma = recipe.prior.sigma
    narrow = isinstance(sigma, LogUniform)
    if isinstance(sigma, Mixture):
        narrow = (int(words[1 + recipe.theta_length]) >> 11) / 2**53 < sigma.share
    for _ in range(recipe.components):
        theta += [uniform(-1, 1) for _ in range(recipe.channels + 2)]
        for _ in range(2):
            if narrow:
                theta.append(math.exp(uniform(math.log(sigma.low), math.log(sigma.high))))
            else:
                theta.append(math.log(1 + math.exp(normal())) + sigma.offset)
        theta += [uniform(-0.99, 0.99), 0.0]
        shares.append(math.exp(normal()))
        if recipe.prior.pi == "peak":
            shares[-1] *= theta[-4] * theta[-3] * math.sqrt(1 - theta[-2] ** 2)
    width = recipe.channels + 6
    theta[width - 1 :: width] = [share / sum(shares) for share in shares]
    return [*theta, scale]


def with_prior(**changes: object) -> Recipe:
    fields = RECIPE.model_dump()
    return Recipe.model_validate(fields | {"prior": fields["prior"] | changes})


MIXTURE = {"kind": "mixture", "share": 0.5, "low": 0.02, "high": 0.3}
PRIORS = {
    "paper": {},
    "fine": {"sigma": {"kind": "log_uniform", "low": 0.02, "high": 0.3}},
    "mixture": {"sigma": MIXTURE},
    "peak": {"pi": "peak"},
    "mixed peaks": {"sigma": MIXTURE, "pi": "peak"},
}


@pytest.mark.parametrize("name", PRIORS)
def test_draw_is_what_the_words_say(name: str):
    recipe = with_prior(**PRIORS[name])
    _, theta = draw(recipe, 41, 51, 7)
    for row, index in enumerate(range(41, 51)):
        np.testing.assert_allclose(theta[row], naive_theta(recipe, index), rtol=3e-7)


def test_draw_of_a_mixture_is_narrow_in_as_many_images_as_its_share():
    recipe = with_prior(sigma=MIXTURE | {"share": 0.25})
    _, theta = draw(recipe, 0, 4000, 1)
    widest = theta[:, :-1].reshape(4000, 30, 9)[:, :, 5:7].max(axis=(1, 2))
    assert (widest <= 0.3).mean() == pytest.approx(0.25, abs=0.02)


def test_peaks_make_the_image_of_a_generator_without_the_normalising_constant():
    recipe = with_prior(pi="peak")
    _, [theta] = draw(recipe, 3, 4, 1)
    _, [mass] = draw(RECIPE, 3, 4, 1)  # the same words, so the same softmax
    parts, heights = theta[:-1].reshape(30, 9).astype(np.float64), mass[8:-1:9].astype(np.float64)
    y, x = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 24), indexing="ij")
    p, plain = np.zeros((24, 24)), np.zeros((24, 24))
    for (*_, mx, my, sx, sy, rho, pi), height in zip(parts, heights, strict=True):
        zx, zy = (x - mx) / sx, (y - my) / sy
        bell = np.exp(-(zx**2 - 2 * rho * zx * zy + zy**2) / (2 * (1 - rho**2)))
        p += pi * bell / (2 * math.pi * sx * sy * math.sqrt(1 - rho**2))
        plain += height * bell
    np.testing.assert_allclose(p / p.max(), plain / plain.max(), rtol=1e-5, atol=1e-9)


def test_recipe_without_pi_keeps_its_hash():
    assert "pi" not in RECIPE.model_dump()["prior"]
    assert with_prior(pi="mass").sha256 == RECIPE.sha256
    assert with_prior(pi="peak").sha256 != RECIPE.sha256


def test_draw_does_not_depend_on_where_the_range_starts():
    normal, theta = draw(RECIPE, 100, 120, 50)
    again_normal, again = draw(RECIPE, 113, 114, 50)
    assert normal[13] == again_normal[0]
    assert (theta[13] == again[0]).all()


def test_draw_does_not_depend_on_the_number_of_samples():
    longer = RECIPE.model_copy(update={"samples": 10_000_000, "samples_per_shard": 77})
    assert (draw(RECIPE, 5, 6, 9)[1] == draw(longer, 5, 6, 9)[1]).all()


def test_draw_with_another_seed_is_another_draw():
    other = RECIPE.model_copy(update={"seed": 1})
    assert (draw(RECIPE, 0, 1, 9)[1] != draw(other, 0, 1, 9)[1]).all()


def test_draw_chooses_every_normal_about_equally():
    normal, _ = draw(RECIPE, 0, 4000, 4)
    assert np.bincount(normal).tolist() == pytest.approx([1000] * 4, abs=100)


@pytest.mark.parametrize("name", ["paper", "fine", "demo"])
def test_draw_is_in_range(name: str):
    recipe = load_recipe(name)
    check_theta(draw(recipe, 0, 500, 3)[1], recipe.channels)


def test_draw_of_the_paper_prior_has_its_known_quantiles():
    _, theta = draw(RECIPE, 0, 2000, 3)
    sigma = theta[:, :-1].reshape(-1, 9)[:, 5:7]
    # softplus(N(0, 1)) + 0.01: median log 2 + 0.01, about 1 % below 0.10
    assert np.median(sigma) == pytest.approx(0.703, abs=0.005)
    assert (sigma < 0.10).mean() == pytest.approx(0.01, abs=0.003)


def test_draw_for_grey_has_seven_values_a_component():
    grey = RECIPE.model_copy(update={"channels": 1, "components": 5})
    _, theta = draw(grey, 0, 3, 2)
    assert theta.shape == (3, 36)
    check_theta(theta, 1)
