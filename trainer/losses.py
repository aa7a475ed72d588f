"""Heads and losses of section 3.2: pure functions of float32 tensors, outside any autocast."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from trainer.choices import Components, Matching
from trainer.render import (
    CHUNK_VALUES,
    SIGMA_FLOOR,
    components_of,
    log_densities,
    render,
    split_theta,
)

VISIBLE_SHARE = 1 / 255  # of the mask: at most a grey level's difference below
FAR = 1e9  # a distance that no assignment would choose


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
    estimate: torch.Tensor,
    theta: torch.Tensor,
    channels: int,
    matching: Matching = "nearest",
    counted: Components = "all",
    coordinates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_direct (9) of each sample [B], and its two terms [B], which add up to it.

    `estimate` and `theta` are [B, K(C+6)+1]. With `matching` "nearest", the paper's, for each true
    component the nearest estimated one counts; several true components may share one, and an
    estimate nobody is near to costs nothing. With "one-to-one" each true component has an estimate
    of its own, those that cost least together. `counted` "visible" leaves out components that
    cannot be seen at the pixels of `coordinates` [W] (see `visible_components`); K is then the
    number of those that can.
    """
    truth, guess = components_of(theta, channels), components_of(estimate, channels)  # [B, K, C+6]
    distance = (truth[:, :, None] - guess[:, None]).square().mean(dim=3)  # [B, K true, K estimated]
    counts = torch.ones_like(theta[:, :1]).expand(-1, truth.shape[1])
    if counted == "visible":
        assert coordinates is not None
        counts = visible_components(theta, channels, coordinates).to(theta.dtype)  # [B, K], 0 or 1
    nearest = distance.amin(dim=2) if matching == "nearest" else assigned(distance, counts)
    share = 1 / (counts.sum(dim=1) + 1)
    components = share * (counts * nearest).sum(dim=1)
    scale = share * (theta[:, -1] - estimate[:, -1]).square()
    return components + scale, {"components": components.detach(), "scale": scale.detach()}


def assigned(distance: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The distance of each true component to an estimate of its own: [B, K] of [B, K, K].

    The assignment has the least sum of distances over the components that count (counts [B, K], 0
    or 1), by the Hungarian method on the CPU: a batch waits for the device here.
    """
    from scipy.optimize import linear_sum_assignment

    costs = (distance * counts[:, :, None]).detach().cpu().numpy()
    # A run that diverges is found out by its loss, which keeps what is not finite.
    costs = np.nan_to_num(costs, nan=FAR, posinf=FAR)
    columns = np.stack([linear_sum_assignment(cost)[1] for cost in costs])
    own = torch.from_numpy(columns).to(distance.device)
    return distance.gather(2, own[:, :, None]).squeeze(2)


@torch.no_grad()
def visible_components(
    theta: torch.Tensor, channels: int, coordinates: torch.Tensor
) -> torch.Tensor:
    """Which components of theta [B, K(C+6)+1] can be seen: bool [B, K].

    Those whose share of the mask (5) reaches VISIBLE_SHARE in some pixel of the image, whose
    columns and rows lie at `coordinates` [W] in [-1, 1].
    """
    values = (theta.shape[1] - 1) // (channels + 6) * len(coordinates) ** 2
    found = []
    for piece in theta.split(max(1, CHUNK_VALUES.get(theta.device.type, 2**27) // values)):
        part = split_theta(piece, channels)
        densities = log_densities(part, coordinates).flatten(2)  # [b, K, HW]
        largest = densities.logsumexp(dim=1).amax(dim=1, keepdim=True)  # [b, 1]
        shares = part.scale[:, None] * (densities.amax(dim=2) - largest).exp()
        found.append(shares >= VISIBLE_SHARE)
    return torch.cat(found)


def sum_losses(
    direct: torch.Tensor, indirect: torch.Tensor, unpainted: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_direct + L_indirect of each sample [B], and what it is made of [B] each."""
    terms = {"direct": direct.detach(), "indirect": indirect.detach(), "unpainted": unpainted}
    return direct + indirect, terms


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
