"""Heads and losses of section 3.2: pure functions of float32 tensors, outside any autocast."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from trainer.render import SIGMA_FLOOR, components_of, render, split_theta


def heads(outputs: torch.Tensor, channels: int) -> torch.Tensor:
    """theta^ [B, K(C+6)+1] from the network's raw outputs of the same shape and layout (8).

    v Tanh, mu Tanh, sigma Softplus, rho Tanh, pi Softmax over the K components, s Sigmoid; sigma
    gets SIGMA_FLOOR on top, so that it never reaches 0 and always has a gradient.
    """
    raw = split_theta(outputs, channels)
    theta = torch.cat(
        (
            raw.color.tanh(),
            raw.mean.tanh(),
            F.softplus(raw.sigma) + SIGMA_FLOOR,
            raw.rho.tanh()[:, :, None],
            raw.pi.softmax(dim=1)[:, :, None],
        ),
        dim=2,
    )  # [B, K, C+6]
    return torch.cat((theta.flatten(1), raw.scale.sigmoid()[:, None]), dim=1)


def direct_loss(
    estimate: torch.Tensor, theta: torch.Tensor, channels: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_direct (9), mean over the batch, and its two terms, which add up to it.

    `estimate` and `theta` are [B, K(C+6)+1]. For each true component the nearest estimated one
    counts; several true components may share one, and an estimate nobody is near to costs nothing.
    """
    truth, guess = components_of(theta, channels), components_of(estimate, channels)  # [B, K, C+6]
    distance = (truth[:, :, None] - guess[:, None]).square().mean(dim=3)  # [B, K true, K estimated]
    share = 1 / (truth.shape[1] + 1)
    components = share * distance.amin(dim=2).sum(dim=1).mean()
    scale = share * (theta[:, -1] - estimate[:, -1]).square().mean()
    return components + scale, {"components": components.detach(), "scale": scale.detach()}


def indirect_loss(
    estimate: torch.Tensor, normal: torch.Tensor, anomaly: torch.Tensor, coordinates: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_indirect (10, 11): mean squared error between I_ano and f_ano(I_norm, theta^).

    `normal` and `anomaly` are [B, C, H, W] in [-1, 1], `estimate` is [B, K(C+6)+1]; the mean runs
    over batch, channels and pixels, so it does not change with the image size. Beside it stands
    `unpainted`, what I_norm itself would cost: a network that learnt no more than s = 0 has that.
    """
    loss = F.mse_loss(render(normal, estimate, coordinates), anomaly)
    return loss, {"unpainted": F.mse_loss(normal, anomaly)}
