"""The draws against the declared prior (Kolmogorov-Smirnov), and how visible the defects are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from builder.artifacts import Model
from builder.publish.subsample import SEED, Painted, Subsample
from builder.recipe import LogUniform, Mixture, Recipe, SoftplusNormal

Array = npt.NDArray[np.float64]
Law = Callable[[Array], Array]

MAX_POOLED = 100_000
INVISIBLE_LEVELS = 2
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class KindTest(Model):
    """One kind of parameter against its declared law; a constant has no test (null)."""

    kind: str
    law: str
    values: int
    statistic: float | None
    p_value: float | None


class Visibility(Model):
    """Largest change of a sample from its normal image, in grey levels, over random samples."""

    samples: int
    below_levels: int
    below_count: int
    below_share: float
    below_share_95_percent: tuple[float, float]
    quantiles: dict[str, float]


class Statistics(Model):
    """`statistics.json`: what was measured on the finished dataset."""

    format: Literal["semiformula-statistics"] = "semiformula-statistics"
    format_version: Literal[1] = 1
    content_sha256: str
    seed: int = SEED
    samples_tested: int
    kinds: list[KindTest]
    parameters_tested: int
    smallest_p_value: float | None
    smallest_p_value_of: str | None
    smallest_p_value_corrected: float | None = Field(description="times parameters_tested")
    visibility: Visibility


def measure(
    recipe: Recipe, content_sha256: str, subsample: Subsample, painted: Painted
) -> Statistics:
    """Test every kind of parameter, and each parameter by itself, and measure visibility."""
    laws = _laws(recipe)
    columns = _columns(recipe)
    rng = np.random.default_rng(SEED)
    kinds = []
    for kind, (text, law) in laws.items():
        values = subsample.theta[:, columns[kind]].astype(np.float64)
        # What depends on one another within a sample is tested by one value of each.
        if kind == "pi" or (kind == "sigma" and isinstance(recipe.prior.sigma, Mixture)):
            values = values[np.arange(len(values)), rng.integers(values.shape[1], size=len(values))]
        pooled = values.reshape(-1)
        if len(pooled) > MAX_POOLED:
            pooled = pooled[rng.choice(len(pooled), MAX_POOLED, replace=False)]
        d, p = ks_test(pooled, law) if law else (None, None)
        kinds.append(KindTest(kind=kind, law=text, values=len(pooled), statistic=d, p_value=p))
    each = [
        (ks_test(subsample.theta[:, column].astype(np.float64), law)[1], column)
        for kind, (_, law) in laws.items()
        if law
        for column in columns[kind]
    ]
    least, column = min(each, default=(None, None))
    return Statistics(
        content_sha256=content_sha256,
        samples_tested=len(subsample.theta),
        kinds=kinds,
        parameters_tested=len(each),
        smallest_p_value=least,
        smallest_p_value_of=None if column is None else parameter_names(recipe)[column],
        smallest_p_value_corrected=None if least is None else min(1.0, least * len(each)),
        visibility=_visibility(painted.largest_change),
    )


def parameter_names(recipe: Recipe) -> list[str]:
    """The names of theta's values in order: `v_1[0]`, ..., `pi[29]`, `s`."""
    one = [f"v_{c + 1}" for c in range(recipe.channels)]
    one += ["mu_x", "mu_y", "sigma_x", "sigma_y", "rho", "pi"]
    return [f"{name}[{k}]" for k in range(recipe.components) for name in one] + ["s"]


def _columns(recipe: Recipe) -> dict[str, list[int]]:
    columns: dict[str, list[int]] = {kind: [] for kind in ("v", "mu", "sigma", "rho", "pi", "s")}
    for column, name in enumerate(parameter_names(recipe)):
        columns[name.split("[")[0].split("_")[0]].append(column)
    return columns


def _laws(recipe: Recipe) -> dict[str, tuple[str, Law | None]]:
    """Each kind's declared law: in words, and as a distribution function (None for a constant)."""
    prior, sigma = recipe.prior, recipe.prior.sigma
    rho = prior.max_abs_rho
    laws = {
        "v": _uniform(prior.color.low, prior.color.high),
        "mu": _uniform(prior.mean.low, prior.mean.high),
    }
    laws["sigma"] = _sigma(sigma)
    laws["rho"] = _uniform(-rho, rho)
    laws["pi"] = _softmax(recipe.components) if prior.pi == "mass" else _peaks(recipe)
    laws["s"] = _uniform(prior.scale.low, prior.scale.high)
    return laws


def _uniform(low: float, high: float) -> tuple[str, Law | None]:
    if low == high:
        return f"constant {low:g}", None
    return f"uniform in [{low:g}, {high:g}]", lambda x: np.clip((x - low) / (high - low), 0, 1)


def _sigma(sigma: LogUniform | SoftplusNormal | Mixture) -> tuple[str, Law | None]:
    if isinstance(sigma, LogUniform):
        return _log_uniform(sigma.low, sigma.high)
    offset = sigma.offset
    words = f"softplus of a standard normal + {offset:g}"

    def softplus(x: Array) -> Array:
        return normal_cdf(_log(np.expm1(np.maximum(x - offset, 0))))

    if isinstance(sigma, SoftplusNormal):
        return words, softplus
    share, (narrow, law) = sigma.share, _log_uniform(sigma.low, sigma.high)
    assert law is not None  # low < high

    def mixed(x: Array) -> Array:
        return share * law(x) + (1 - share) * softplus(x)

    return f"in {100 * share:g} % of the images {narrow}, else {words}", mixed


def _log_uniform(low: float, high: float) -> tuple[str, Law | None]:
    if low == high:
        return f"constant {low:g}", None
    width = math.log(high / low)
    return (
        f"log-uniform in [{low:g}, {high:g}]",
        lambda x: np.clip(np.log(np.maximum(x, 1e-300) / low) / width, 0, 1),
    )


def _softmax(components: int) -> tuple[str, Law | None]:
    """The law of one of K shares e^z_k / sum e^z_j with K standard normals.

    P(share <= p) = E Phi(logit p + log S), S the sum of the K-1 others: S is simulated once with a
    fixed seed, and Phi is exact, which leaves an error of about 0.0005.
    """
    if components == 1:
        return "constant 1", None
    rng = np.random.default_rng(SEED)
    draws = max(20_000, 6_000_000 // components)
    total = np.zeros(draws)
    for _ in range(components - 1):
        total += np.exp(rng.standard_normal(draws))
    # 1,000 equally likely values stand for the simulated ones.
    rest = np.sort(np.log(total))[: draws // 1000 * 1000].reshape(1000, -1).mean(1)
    logit = np.linspace(-rest.max() - 6, -rest.min() + 6, 1001)
    law = normal_cdf(logit[:, None] + rest).mean(1)

    def cdf(x: Array) -> Array:
        inside = np.clip(x, 1e-300, 1 - 1e-16)
        return np.interp(np.log(inside) - np.log1p(-inside), logit, law)

    return f"softmax of {components} standard normals", cdf


def _peaks(recipe: Recipe) -> tuple[str, Law | None]:
    """The law of pi where the softmax is of the heights, simulated once with a fixed seed."""
    if recipe.components == 1:
        return "constant 1", None
    rng = np.random.default_rng(SEED)
    size = (max(2_000, 600_000 // recipe.components), recipe.components)
    prior, sigma = recipe.prior, recipe.prior.sigma
    log_width = np.zeros(size)
    narrow = np.full(len(log_width), isinstance(sigma, LogUniform))
    if isinstance(sigma, Mixture):
        narrow = rng.random(len(log_width)) < sigma.share
    for _ in range(2):
        if not isinstance(sigma, LogUniform):
            wide = np.log(np.logaddexp(0, rng.standard_normal(size)) + sigma.offset)
            log_width[~narrow] += wide[~narrow]
        if not isinstance(sigma, SoftplusNormal):
            small = rng.uniform(math.log(sigma.low), math.log(sigma.high), size)
            log_width[narrow] += small[narrow]
    rho = prior.max_abs_rho * rng.uniform(-1, 1, size)
    mass = np.exp(log_width + rng.standard_normal(size)) * np.sqrt(1 - rho**2)
    shares = np.sort((mass / mass.sum(axis=1, keepdims=True)).ravel())
    ranks = (np.arange(len(shares)) + 0.5) / len(shares)
    return (
        f"height by the softmax of {recipe.components} standard normals",
        lambda x: np.interp(x, shares, ranks, left=0.0, right=1.0),
    )


def _log(x: Array) -> Array:
    return np.log(np.maximum(x, 1e-300))


_GRID = np.linspace(-8, 8, 8001)
_PHI = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in _GRID])


def normal_cdf(z: Array) -> Array:
    """Phi(z) to 2e-7, by a table."""
    return np.interp(z, _GRID, _PHI)


def ks_test(values: Array, law: Law) -> tuple[float, float]:
    """The Kolmogorov-Smirnov statistic of values [n] and its asymptotic p-value.

    Stephens' correction for finite n (Journal of the Royal Statistical Society B 32, 1970).
    """
    n = len(values)
    expected = law(np.sort(values))
    steps = np.arange(n + 1) / n
    d = float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()))
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * d
    if x < 0.2:  # the series converges badly, and the p-value is 1 to 12 digits
        return d, 1.0
    terms = (2 * (-1) ** (j - 1) * math.exp(-2 * (j * x) ** 2) for j in range(1, 101))
    return d, min(1.0, max(0.0, math.fsum(terms)))


def _visibility(change: npt.NDArray[np.int64]) -> Visibility:
    n, below = len(change), int((change < INVISIBLE_LEVELS).sum())
    return Visibility(
        samples=n,
        below_levels=INVISIBLE_LEVELS,
        below_count=below,
        below_share=below / n,
        below_share_95_percent=wilson(below, n),
        quantiles={f"{q:g}": float(np.quantile(change, q)) for q in QUANTILES},
    )


def wilson(count: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `count` of `n` were seen (Wilson 1927)."""
    z, share = 1.959964, count / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)
