"""The rendering kernel per image and core, against NumPy float64 and Numba with exp per pixel.

Tried, slower or no faster (fine / paper, ms an image on one Zen 4 core; the kernel takes 0.20 /
0.37, of which 0.01 are the components' constants, 0.05 the mixing and the rest the sums):
* lanes over the columns of one row, one component at a time, ratios 16 columns apart, restarted
  every row, 32 exps each time: 0.88 / 1.54.
* the same tiles as two-dimensional arrays, one row and four components a pass: 1.06 / 1.09; the
  compiler then vectorises no sum. Flat rows in which each index is a constant plus the counter, and
  error_model="numpy" (a division that may raise stops the vectoriser), are what made it do so.
* tiles of 32 columns 0.25 / 0.56, 64: 0.22 / 0.46, 80: 0.21 / 0.43, 128: 0.31 / 0.69 (its rows
  share cache sets); 12 rows instead of 16: 0.20 / 0.40, 8 rows: 0.23 / 0.50.
* the recurrence for 30 components on all pixels, alone: one row and four components a pass 0.20,
  two rows 0.18, four rows 0.19, eight rows 0.30; four rows and two components 0.19, four rows and
  one component 0.44. The same in C with intrinsics, state or sums in registers: 0.13 to 0.18.
* fused multiply-add, in that C: 0.13 either way, as this CPU adds beside it multiplies; it would
  be a slow library call on CPUs without it. So plain products and sums.
* normal images split into planes before the mixing: 0.046 instead of 0.043.
"""

import math
import time

import numba
import numpy as np
from numba import njit, prange

from builder.prior import draw
from builder.recipe import load_recipe
from builder.render import render
from tests import naive
from tests.benchmarks.timing import seconds, table

IMAGES = 64
DRAWS = 1000
BAR_MS = {"fine": 0.5, "paper": 0.7}


@njit(parallel=True, fastmath=True)
def plain_exp(normals, normal_index, theta, out):
    """What one writes first: float32, one exp for each pixel and component, prange, fastmath."""
    height, width, channels = out.shape[1:]
    fields = channels + 6
    components = (theta.shape[1] - 1) // fields
    for n in prange(theta.shape[0]):
        planes = np.zeros((channels + 1, height, width), np.float32)
        for k in range(components):
            t = theta[n, k * fields : (k + 1) * fields]
            rest = 1 - t[channels + 4] ** 2
            weight = t[channels + 5] / (t[channels + 2] * t[channels + 3] * math.sqrt(rest))
            for i in range(height):
                zy = np.float32((2 * i / (height - 1) - 1 - t[channels + 1]) / t[channels + 3])
                for j in range(width):
                    x = np.float32(j) * np.float32(2 / (width - 1)) - np.float32(1)
                    zx = (x - t[channels]) / t[channels + 2]
                    q = (zx * zx - 2 * t[channels + 4] * zx * zy + zy * zy) / rest
                    p = np.float32(weight) * math.exp(np.float32(-0.5 * q))
                    planes[channels, i, j] += p
                    for c in range(channels):
                        planes[c, i, j] += p * t[c]
        largest = planes[channels].max()
        scale = theta[n, -1] / largest
        for i in range(height):
            for j in range(width):
                mask = scale * planes[channels, i, j]
                for c in range(channels):
                    g = np.float32(normals[normal_index[n], i, j, c]) / np.float32(127.5) - 1
                    value = g * (1 - mask) + scale * planes[c, i, j]
                    out[n, i, j, c] = np.uint8(min(max((value + 1) * 127.5 + 0.5, 0), 255))


def main() -> None:
    """Print milliseconds an image and microseconds a draw on one core, for two priors."""
    numba.set_num_threads(1)
    normals = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3)).astype(np.uint8)
    for name in ("fine", "paper"):
        one_prior(name, normals)


def one_prior(name: str, normals: np.ndarray) -> None:
    """The compiled kernel, the plain compiled one, and NumPy on fewer images; then the draw."""
    few = 8
    recipe = load_recipe(name)
    normal_index, theta = draw(recipe, 0, IMAGES, len(normals))
    out = np.empty((IMAGES, 224, 224, 3), np.uint8)

    def in_numpy() -> np.ndarray:
        return np.stack([naive.render(normals[normal_index[i]], theta[i]) for i in range(few)])

    clock = time.process_time
    slow = seconds(in_numpy, 3, clock) / few * 1e3
    plain = seconds(lambda: plain_exp(normals, normal_index, theta, out), 3, clock) / IMAGES * 1e3
    fast = seconds(lambda: render(normals, normal_index, theta, out), 20, clock) / IMAGES * 1e3
    difference = np.abs(out[:few].astype(int) - in_numpy())
    off = f"max {difference.max()} grey level, in {(difference > 0).mean():.1e} of the values"
    table(
        f"kernel, 224 x 224 x 3, 30 components, recipe {name!r}, one core",
        "ms/image",
        [
            ("builder", fast, f"bar {BAR_MS[name]} ms; {off}"),
            ("Numba, exp per pixel, fastmath, prange", plain, "bar x10"),
            ("NumPy float64", slow, "bar x45"),
        ],
    )
    drawn = seconds(lambda: draw(recipe, 0, DRAWS, len(normals)), 10, clock) / DRAWS * 1e6
    table(f"draw, recipe {name!r}, one core", "us/sample", [("builder", drawn, "bar 8 us")])


if __name__ == "__main__":
    main()
