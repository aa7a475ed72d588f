"""From (recipe seed, sample index) to theta and the choice of a normal image: every random draw.

Sample i reads the raw 64-bit words of NumPy's Philox4x64-10 with key (seed, 0) and counter
(block, i, 0, 0), block counting from 1, from the first word on: word 0 chooses the normal image,
word 1 draws the scale s, then come C+6 words a component in theta's order, and under a mixture
one that chooses the law of sigma. So a sample depends
on nothing but the recipe's seed and prior, its index, and the number of normal images.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from builder import _kernel, _philox
from builder.recipe import LogUniform, Mixture, Recipe, SoftplusNormal


def draw(
    recipe: Recipe, start: int, stop: int, normal_count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Draw the samples `start` to `stop` - 1.

    Returns the index of each one's normal image, int64 [N] in [0, normal_count), and theta,
    float32 [N, K(C+6)+1] in the order and ranges of equations 1 and 2.
    """
    prior, sigma = recipe.prior, recipe.prior.sigma
    words = 1 + recipe.theta_length + isinstance(sigma, Mixture)
    bits = np.empty((stop - start, -(-words // 4) * 4), np.uint64)
    _philox.fill(np.uint64(recipe.seed), np.uint64(start), bits)
    normal_index = (_unit(bits[:, 0]) * normal_count).astype(np.int64)
    theta = np.empty((stop - start, recipe.theta_length), np.float32)
    for law, rows in _laws(sigma, bits[:, words - 1]):
        log_uniform = isinstance(law, LogUniform)
        first, second = (law.low, law.high) if isinstance(law, LogUniform) else (law.offset, 0)
        ranges = np.array(
            [
                prior.color.low,
                prior.color.high,
                prior.mean.low,
                prior.mean.high,
                first,
                second,
                prior.max_abs_rho,
                prior.scale.low,
                prior.scale.high,
            ],
            np.float64,
        )
        drawn = np.empty((np.count_nonzero(rows), recipe.theta_length), np.float32)
        _kernel.draw_theta(
            bits[rows, 1:], recipe.channels, ranges, log_uniform, prior.pi == "peak", drawn
        )
        theta[rows] = drawn
    return normal_index, theta


def _unit(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Uniform in [0, 1) from 53 bits; times a count, the bias is below count / 2^53."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _laws(
    sigma: LogUniform | SoftplusNormal | Mixture, words: npt.NDArray[np.uint64]
) -> list[tuple[LogUniform | SoftplusNormal, npt.NDArray[np.bool_]]]:
    """The laws of sigma, and which rows follow each; `words` are a mixture's."""
    if not isinstance(sigma, Mixture):
        return [(sigma, np.ones(len(words), np.bool_))]
    narrow = _unit(words) < sigma.share
    return [
        (LogUniform(kind="log_uniform", low=sigma.low, high=sigma.high), narrow),
        (SoftplusNormal(kind="softplus_normal", offset=sigma.offset), ~narrow),
    ]
