"""The rendering kernel per image and core, against NumPy float64 and Numba with exp per pixel."""

import math

import numba
import numpy as np
from numba import njit, prange

from builder import _kernel
from builder.prior import draw
from builder.recipe import load_recipe
from tests import naive
from tests.benchmarks.timing import seconds, table

IMAGES = 64


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
    """Print milliseconds an image on one core, for the fine and the paper prior."""
    numba.set_num_threads(1)
    normals = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3)).astype(np.uint8)
    for name in ("fine", "paper"):
        one_prior(name, normals)


def one_prior(name: str, normals: np.ndarray) -> None:
    """One table: the compiled kernel, the plain compiled one, and NumPy on fewer images."""
    few = 8
    normal_index, theta = draw(load_recipe(name), 0, IMAGES, len(normals))
    out = np.empty((IMAGES, 224, 224, 3), np.uint8)
    arguments = (normals, normal_index, theta, out)

    def in_numpy() -> np.ndarray:
        return np.stack([naive.render(normals[normal_index[i]], theta[i]) for i in range(few)])

    slow = seconds(in_numpy, 2)
    plain = seconds(lambda: plain_exp(*arguments), 3)
    fast = seconds(lambda: _kernel.render(*arguments))
    off = np.abs(out[:few].astype(int) - in_numpy())
    table(
        f"kernel, 224 x 224 x 3, 30 components, prior {name!r}, one core",
        "ms/image",
        [
            ("builder", fast / IMAGES * 1e3, f"max {off.max()} grey, {(off > 0).mean():.1e}"),
            ("Numba, exp per pixel, fastmath", plain / IMAGES * 1e3, ""),
            ("NumPy float64", slow / few * 1e3, ""),
        ],
    )


if __name__ == "__main__":
    main()
