"""Heads and losses of section 3.2."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import naive
from tests.shards_by_hand import draw_theta
from trainer.losses import cross_entropy_losses, direct_losses, heads, indirect_losses
from trainer.render import pixel_coordinates, split_theta


@pytest.mark.parametrize("channels", [1, 3])
def test_direct_loss_agrees_with_plain_loops(channels: int) -> None:
    rng = np.random.default_rng(0)
    truth = np.stack([draw_theta(rng, 5, channels) for _ in range(3)])
    guess = np.stack([draw_theta(rng, 5, channels) for _ in range(3)])
    losses, terms = direct_losses(torch.from_numpy(guess), torch.from_numpy(truth), channels)
    pairs = zip(guess, truth, strict=True)
    expected = [naive.direct_loss(g, t, channels) for g, t in pairs]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert sum(terms.values()).tolist() == pytest.approx(expected, rel=1e-6)


def test_direct_loss_typed_by_hand() -> None:
    # C = 1, K = 2, 7 values each. Both true components are nearest to the first estimate (at
    # squared distances 1 and 4 of 7), the second estimate is nobody's; s differs by 0.5.
    truth = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0.5]])
    guess = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 1.0]])
    losses, _ = direct_losses(guess, truth, channels=1)
    assert losses.item() == pytest.approx((0.25 + 1 / 7 + 4 / 7) / 3)


def test_direct_loss_ignores_the_order_of_estimates() -> None:
    rng = np.random.default_rng(1)
    truth = torch.from_numpy(draw_theta(rng, 4, 3))[None]
    shuffled = torch.cat(
        (truth[:, :-1].view(1, 4, 9)[:, [2, 0, 3, 1]].flatten(1), truth[:, -1:]), 1
    )
    assert direct_losses(shuffled, truth, 3)[0].item() == 0


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_heads_keep_every_parameter_in_its_range(size: float) -> None:
    outputs = torch.randn(8, 271, generator=torch.Generator().manual_seed(0)) * size
    part = split_theta(heads(outputs, channels=3), channels=3)
    assert part.color.abs().max() <= 1
    assert part.mean.abs().max() <= 1
    assert part.sigma.min() >= 1e-3
    assert part.rho.abs().max() <= 1
    torch.testing.assert_close(part.pi.sum(dim=1), torch.ones(8))
    assert part.scale.min() >= 0
    assert part.scale.max() <= 1


def test_heads_typed_by_hand() -> None:
    theta = heads(torch.tensor([[1.0, 0, -1, 0, 0, 1, 2, 3]]), channels=1)
    expected = [0.7615942, 0, -0.7615942, 0.6941472, 0.6941472, 0.7615942, 1.0, 0.9525741]
    assert theta[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_indirect_loss_gradient_is_finite(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = (torch.randn(4, 271, generator=generator) * size).requires_grad_()
    normal, anomaly = torch.rand(2, 4, 3, 16, 16, generator=generator) * 2 - 1
    losses, _ = indirect_losses(heads(outputs, 3), normal, anomaly, pixel_coordinates(16, 16))
    losses.mean().backward()
    assert losses.isfinite().all()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


def test_indirect_loss_is_zero_for_the_true_theta() -> None:
    theta = draw_theta(np.random.default_rng(2), 3, 3)
    pixels = np.full((8, 8, 3), 100, np.uint8)
    anomaly = torch.from_numpy(naive.render_exact(pixels, theta)).permute(2, 0, 1)[None].float()
    normal = torch.full((1, 3, 8, 8), 100 / 127.5 - 1)
    losses, terms = indirect_losses(
        torch.from_numpy(theta)[None], normal, anomaly, pixel_coordinates(8, 8)
    )
    assert losses.item() < 1e-11  # float32's rounding, squared
    assert terms["unpainted"] > 1e-3


def test_cross_entropy_typed_by_hand() -> None:
    # Two classes: logits (0, ln 3) give probabilities 1/4 and 3/4.
    outputs = torch.tensor([[0.0, 1.0986123]]).expand(2, 2)
    losses, terms = cross_entropy_losses(outputs, torch.tensor([1, 0]))
    assert losses.tolist() == pytest.approx([0.2876821, 1.3862944], abs=1e-6)
    assert terms["accuracy"].tolist() == [1, 0]
