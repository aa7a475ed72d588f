"""From (recipe seed, sample index) to theta and the choice of a normal image: every random draw.

Sample i reads the raw 64-bit words of NumPy's Philox4x64-10 with key (seed, 0) and counter
(block, i, 0, 0), block counting from 1, from the first word on: word 0 chooses the normal image,
word 1 draws the scale s, then come C+6 words a component in theta's order. So a sample depends
on nothing but the recipe's seed and prior, its index, and the number of normal images.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from builder import _kernel
from builder.recipe import LogUniform, Recipe


def draw(
    recipe: Recipe, start: int, stop: int, normal_count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Draw the samples `start` to `stop` - 1.

    Returns the index of each one's normal image, int64 [N] in [0, normal_count), and theta,
    float32 [N, K(C+6)+1] in the order and ranges of equations 1 and 2.
    """
    prior, sigma = recipe.prior, recipe.prior.sigma
    log_uniform = isinstance(sigma, LogUniform)
    first, second = (sigma.low, sigma.high) if isinstance(sigma, LogUniform) else (sigma.offset, 0)
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
    normal_index = np.empty(stop - start, np.int64)
    theta = np.empty((stop - start, recipe.theta_length), np.float32)
    _kernel.draw_theta(
        np.uint64(recipe.seed), start, normal_count, recipe.channels, ranges, log_uniform,
        normal_index, theta,
    )  # fmt: skip
    return normal_index, theta
