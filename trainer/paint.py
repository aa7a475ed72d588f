"""Paints the images of a parameter-only dataset on the device: f_ano as the builder rounds it."""

from __future__ import annotations

import torch

from trainer.render import CHUNK_VALUES, log_densities, pixel_coordinates, split_theta


@torch.no_grad()
def paint(normals: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """I_ano uint8 [n, H, W, C] from normal images of the same kind and theta float32 [n, L].

    Both on one device; the temporaries stay within CHUNK_VALUES. With g = I_norm in grey levels
    and v' = 127.5 (v + 1): floor(g + s / P (sum_k p_k v'_k - p g) + 1/2), P the largest p of the
    grid, as builder/SHARDS.md states it. At most one grey level from the builder's image.
    """
    count, height, width, channels = normals.shape
    painted = torch.empty_like(normals)
    grid = pixel_coordinates(width, width).to(normals.device)
    components = (theta.shape[1] - 1) // (channels + 6)
    values = CHUNK_VALUES.get(normals.device.type, 2**27)
    piece = max(1, values // (components * height * width))
    for start in range(0, count, piece):
        part = slice(start, start + piece)
        painted[part] = _paint(normals[part], theta[part], grid)
    return painted


def _paint(normals: torch.Tensor, theta: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    part = split_theta(theta, normals.shape[3])
    density = log_densities(part, grid).flatten(2)  # [n, K, HW]
    # Relative to the largest of one component: p / P is never 0 / 0, however far the tails.
    density.sub_(density.amax(dim=(1, 2), keepdim=True)).exp_()
    levels = 127.5 * (part.color + 1)  # [n, K, C]
    weights = torch.cat((levels, torch.ones_like(levels[:, :, :1])), dim=2)  # [n, K, C+1]
    mixed = density.transpose(1, 2) @ weights  # [n, HW, C+1]: sum_k p_k v'_k, and p
    mixed *= (part.scale / mixed[..., -1].amax(dim=1))[:, None, None]
    mixed = mixed.unflatten(1, normals.shape[1:3])
    grey = normals.to(theta.dtype)
    value = grey + (mixed[..., :-1] - mixed[..., -1:] * grey) + 0.5
    return value.clamp_(0, 255).to(torch.uint8)  # towards zero: floor, as none is negative
