"""The anomaly generator f_ano (equations 3 to 7) in torch: differentiable, safe at its limits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

# Below these the Gaussian is narrower than any pixel pitch in use (2/223 at 224 px); shards hold
# sigma >= 0.002 and 1 - rho^2 >= 0.002, so no stored image is affected.
SIGMA_FLOOR = 1e-3
ONE_MINUS_RHO2_FLOOR = 1e-4
PI_FLOOR = 1e-30  # log(0) is -inf, and its gradient nan; 1e-30 is as invisible as 0

# Values of one [b, K, H, W] temporary; a batch is rendered in pieces of at most this many. On a
# CPU pieces that stay in the cache are faster, on a GPU this is 512 MB a temporary.
CHUNK_VALUES = {"cpu": 2**21, "cuda": 2**27}


class Theta(NamedTuple):
    """theta by name: color [B, K, C], mean and sigma [B, K, 2], rho and pi [B, K], scale [B]."""

    color: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor
    rho: torch.Tensor
    pi: torch.Tensor
    scale: torch.Tensor


def components_of(theta: torch.Tensor, channels: int) -> torch.Tensor:
    """The components of theta [B, K(C+6)+1], without the scale: a view [B, K, C+6]."""
    return theta[:, :-1].unflatten(1, (-1, channels + 6))


def split_theta(theta: torch.Tensor, channels: int) -> Theta:
    """Name the parts of theta [B, K(C+6)+1], laid out as in equations 1 and 2; views, no copies."""
    parts = components_of(theta, channels)
    color, mean, sigma, rho, pi = parts.split((channels, 2, 2, 1, 1), dim=2)
    return Theta(color, mean, sigma, rho.squeeze(2), pi.squeeze(2), theta[:, -1])


def pixel_coordinates(size_px: int, source_px: int) -> torch.Tensor:
    """Where the pixels of an image resized from source_px to size_px lie: float64 [size_px].

    In the frame of the source, whose first and last pixel centres are -1 and 1; so an image
    rendered small falls on the large one resized (half-pixel centres, as `interpolate` takes them).

    >>> pixel_coordinates(3, 3).tolist()
    [-1.0, 0.0, 1.0]
    >>> pixel_coordinates(2, 4).tolist()  # between pixels 0 and 1, and between 2 and 3
    [-0.6666666666666667, 0.6666666666666665]
    """
    columns = (torch.arange(size_px, dtype=torch.float64) + 0.5) * (source_px / size_px) - 0.5
    return 2 * columns / (source_px - 1) - 1


def render(normal: torch.Tensor, theta: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """I_ano of (7) [B, C, H, W] from I_norm [B, C, H, W] in [-1, 1] and theta [B, K(C+6)+1].

    `coordinates` [W] (equal to H) is the place of each column and row in [-1, 1]. Works in theta's
    dtype, float32 or float64. Finite with finite gradients for every theta within its ranges,
    also where all densities underflow, s = 0, sigma = 0 or |rho| = 1 (see the floors above).
    """
    components = (theta.shape[1] - 1) // (normal.shape[1] + 6)
    values = components * normal.shape[2] * normal.shape[3]
    piece = max(1, CHUNK_VALUES.get(theta.device.type, 2**27) // values)
    if piece >= len(theta):
        return _render(normal, theta, coordinates)
    # Backward renders each piece again: memory for one piece at a time instead of the batch.
    return torch.cat(
        [
            checkpoint(_render, *pair, coordinates, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(normal.split(piece), theta.split(piece), strict=True)
        ]
    )


def _render(normal: torch.Tensor, theta: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    part = split_theta(theta, normal.shape[1])
    relative = log_densities(part, coordinates).flatten(2)  # [B, K, HW]
    # The largest value becomes exp(0) = 1, so p / max p is never 0 / 0. The shift cancels in the
    # ratio; detached, because its gradient would cancel too.
    shift = relative.detach().amax(dim=(1, 2), keepdim=True)
    density = (relative - shift).exp()  # [B, K, HW], in [0, 1]
    weights = torch.cat((part.color, torch.ones_like(part.color[:, :, :1])), dim=2)  # [B, K, C+1]
    mixed = weights.transpose(1, 2) @ density  # [B, C+1, HW]: sum_k p_k v_k, and p (4)
    peak = mixed[:, -1].amax(dim=1)  # max p over the grid, >= 1
    share = (part.scale / peak)[:, None, None, None]
    mixed = mixed.unflatten(2, normal.shape[2:])
    mask = share * mixed[:, -1:]  # M of (5), [B, 1, H, W], in [0, s]
    return normal * (1 - mask) + share * mixed[:, :-1]  # (6), (7)


def log_densities(part: Theta, coordinates: torch.Tensor) -> torch.Tensor:
    """log p_k + log 2 pi on the pixel grid (3): [B, K, H, W].

    The exponent is written u^2 + zy^2 with u = (zx - rho zy) / sqrt(1 - rho^2): a sum of squares,
    where the textbook form loses all its digits near |rho| = 1.
    """
    sigma = part.sigma.clamp_min(SIGMA_FLOOR)
    root = ((1 - part.rho) * (1 + part.rho)).clamp_min(ONE_MINUS_RHO2_FLOOR).sqrt()  # [B, K]
    grid = coordinates.to(part.mean.dtype)
    z = (grid - part.mean[..., None]) / sigma[..., None]  # [B, K, 2, W]
    zx, zy = z.unbind(dim=2)  # along columns, along rows
    constant = part.pi.clamp_min(PI_FLOOR).log() - sigma.log().sum(2) - root.log()
    u = (zx / root[..., None])[:, :, None, :] - ((part.rho / root)[..., None] * zy)[..., None]
    rows = constant[..., None] - 0.5 * zy.square()  # [B, K, H]
    return torch.addcmul(rows[..., None], u, u, value=-0.5)
