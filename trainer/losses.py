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


def direct_losses(
    estimate: torch.Tensor, theta: torch.Tensor, channels: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_direct (9) of each sample [B], and its two terms [B], which add up to it.

    `estimate` and `theta` are [B, K(C+6)+1]. For each true component the nearest estimated one
    counts; several true components may share one, and an estimate nobody is near to costs nothing.
    """
    truth, guess = components_of(theta, channels), components_of(estimate, channels)  # [B, K, C+6]
    distance = (truth[:, :, None] - guess[:, None]).square().mean(dim=3)  # [B, K true, K estimated]
    share = 1 / (truth.shape[1] + 1)
    components = share * distance.amin(dim=2).sum(dim=1)
    scale = share * (theta[:, -1] - estimate[:, -1]).square()
    return components + scale, {"components": components.detach(), "scale": scale.detach()}


def indirect_losses(
    estimate: torch.Tensor, normal: torch.Tensor, anomaly: torch.Tensor, coordinates: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_indirect (10, 11) of each sample [B]: mean squared error of f_ano(I_norm, theta^).

    `normal` and `anomaly` are [B, C, H, W] in [-1, 1], `estimate` is [B, K(C+6)+1]; the mean runs
    over channels and pixels, so it does not change with the image size. Beside it stands
    `unpainted` [B], what I_norm itself would cost: a network that learnt no more than s = 0 has
    that.
    """
    losses = squared_errors(render(normal, estimate, coordinates), anomaly)
    return losses, {"unpainted": squared_errors(normal, anomaly)}


def squared_errors(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each image [B] of [B, C, H, W]."""
    return (image - target).square().flatten(1).mean(dim=1)


def cross_entropy_losses(
    outputs: torch.Tensor, label: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The cross-entropy of each sample [B] for logits [B, classes] and labels int64 [B].

    Beside it stands `accuracy` [B], 1 where the largest logit is the label's, else 0.
    """
    right = (outputs.detach().argmax(dim=1) == label).to(outputs.dtype)
    return F.cross_entropy(outputs, label, reduction="none"), {"accuracy": right}
