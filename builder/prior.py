"""From (recipe seed, sample index) to theta and the choice of a normal image: every random draw.

Sample i reads the raw 64-bit words of NumPy's Philox4x64-10 with key (seed, 0) and counter
(block, i, 0, 0), block counting from 1, from the first word on: word 0 chooses the normal image,
word 1 draws the scale s, then come C+6 words a component in theta's order. So a sample depends
on nothing but the recipe's seed and prior, its index, and the number of normal images.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from builder import _kernel, _philox
from builder.recipe import LogUniform, Recipe


def draw(
    recipe: Recipe, start: int, stop: int, normal_count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Draw the samples `start` to `stop` - 1.

    Returns the index of each one's normal image, int64 [N] in [0, normal_count), and theta,
    float32 [N, K(C+6)+1] in the order and ranges of equations 1 and 2.
    """
    words = 1 + recipe.theta_length
    bits = np.empty((stop - start, -(-words // 4) * 4), np.uint64)
    _philox.fill(np.uint64(recipe.seed), np.uint64(start), bits)
    # 53 bits times the count, rounded down; the bias is below normal_count / 2^53.
    unit = (bits[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    normal_index = (unit * normal_count).astype(np.int64)

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
    theta = np.empty((stop - start, recipe.theta_length), np.float32)
    _kernel.draw_theta(bits[:, 1:], recipe.channels, ranges, log_uniform, theta)
    return normal_index, theta
