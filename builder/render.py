"""The checked front of the rendering kernel: equations 3 to 7 on whole batches."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from builder import _kernel
from builder.errors import BuilderError


def render(
    normals: npt.NDArray[np.uint8],
    normal_index: npt.NDArray[np.int64],
    theta: npt.NDArray[np.float32],
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Paint each parameter vector on its normal image.

    normals: uint8 [M, H, W, C], C 1 or 3, H and W at least 2; normal_index: int64 [N] in [0, M);
    theta: float32 [N, K(C+6)+1], in range (see `check_theta`). Returns uint8 [N, H, W, C],
    written to `out` where given (contiguous), at most one grey level from equations 3 to 7 in
    float64. Raises BuilderError on other input.

    >>> import numpy as np
    >>> grey = np.full((1, 5, 5, 1), 255, np.uint8)
    >>> black_dot = np.array([[-1, 0, 0, 0.2, 0.2, 0, 1, 1]], np.float32)
    >>> render(grey, np.array([0]), black_dot)[0, 2, :, 0].tolist()
    [255, 244, 0, 244, 255]
    """
    if normals.ndim != 4 or normals.dtype != np.uint8 or normals.shape[3] not in (1, 3):
        raise BuilderError(
            "normal images: expected uint8 [M, H, W, 1 or 3], "
            f"found {normals.dtype} {list(normals.shape)}"
        )
    if min(normals.shape[1:3]) < 2:
        raise BuilderError(f"normal images: at least 2 x 2 pixels, found {normals.shape[1:3]}")
    check_theta(theta, normals.shape[3])
    if normal_index.shape != (len(theta),) or normal_index.dtype != np.int64:
        raise BuilderError(
            f"normal index: expected int64 [{len(theta)}], "
            f"found {normal_index.dtype} {list(normal_index.shape)}"
        )
    if len(theta) and not 0 <= normal_index.min() <= normal_index.max() < len(normals):
        raise BuilderError(f"normal index: outside the {len(normals)} normal images")
    shape = (len(theta), *normals.shape[1:])
    if out is None:
        out = np.empty(shape, np.uint8)
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise BuilderError(
            f"output: expected contiguous uint8 {list(shape)}, found {out.dtype} {list(out.shape)}"
        )
    normals, theta = np.ascontiguousarray(normals), np.ascontiguousarray(theta)
    # Asking for the number of threads launches them; a worker has one.
    alone = numba.config.NUMBA_NUM_THREADS == 1
    threads = 1 if alone else min(numba.get_num_threads(), len(theta))
    if threads > 1:
        _kernel.render(normals, normal_index, theta, out, threads)
    else:  # as in a worker: starts no pool of threads
        _kernel.render_every(normals, normal_index, theta, out, 0, 1)
    return out


def check_theta(theta: npt.NDArray[np.float32], channels: int) -> None:
    """Raise BuilderError unless theta is float32 [N, K(C+6)+1] within the ranges of equation 2."""
    width = channels + 6
    if (
        theta.dtype != np.float32
        or theta.ndim != 2
        or theta.shape[1] % width != 1
        or theta.shape[1] == 1
    ):
        raise BuilderError(
            f"theta: expected float32 [N, K*{width}+1], found {theta.dtype} {list(theta.shape)}"
        )
    if not len(theta):
        return
    parts = theta[:, :-1].reshape(len(theta), -1, width)
    sigma, rho = parts[..., channels + 2 : channels + 4], parts[..., channels + 4]
    pi, scale = parts[..., channels + 5], theta[:, -1]
    rules = {
        "v and mu in [-1, 1]": np.abs(parts[..., : channels + 2]) <= 1,
        "sigma > 0 and finite": (sigma > 0) & np.isfinite(sigma),
        "|rho| < 1": np.abs(rho) < 1,
        "pi >= 0 with sum 1": (pi >= 0).all(1) & (np.abs(pi.sum(1) - 1) < 1e-5),
        "s in [0, 1]": (scale >= 0) & (scale <= 1),
    }
    for rule, holds in rules.items():  # NaN fails every comparison
        faulty = np.flatnonzero(~holds.reshape(len(theta), -1).all(1))
        if len(faulty):
            raise BuilderError(f"theta: row {faulty[0]} breaks {rule}")
