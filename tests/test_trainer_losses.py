"""Heads and losses of section 3.2."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import naive
from tests.shards_by_hand import draw_theta
from trainer.losses import (
    assigned,
    cross_entropy_losses,
    direct_losses,
    heads,
    indirect_losses,
    sum_losses,
    visible_components,
)
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


@pytest.mark.parametrize("channels", [1, 3])
def test_one_to_one_loss_is_the_least_of_all_assignments(channels: int) -> None:
    rng = np.random.default_rng(3)
    truth = np.stack([draw_theta(rng, 5, channels) for _ in range(4)])
    guess = np.stack([draw_theta(rng, 5, channels) for _ in range(4)])
    losses, _ = direct_losses(
        torch.from_numpy(guess), torch.from_numpy(truth), channels, matching="one-to-one"
    )
    pairs = zip(guess, truth, strict=True)
    expected = [naive.one_to_one_loss(g, t, channels) for g, t in pairs]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_one_to_one_loss_typed_by_hand() -> None:
    # C = 1, K = 2. Each true component is at 1 of 7 from its own estimate; the first estimate is
    # at 4 of 7 from the second component, the second one farther still.
    truth = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0.5]])
    guess = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0.5]])
    losses, _ = direct_losses(guess, truth, channels=1, matching="one-to-one")
    assert losses.item() == pytest.approx((1 / 7 + 1 / 7) / 3)


def test_assigned_ignores_the_distances_of_components_that_do_not_count() -> None:
    distance = torch.tensor([[[1.0, 2.0], [1.0, 100.0]]])
    counts = torch.tensor([[1.0, 0.0]])  # the second may take the bad one
    assert assigned(distance, counts)[0, 0] == 1


def test_visible_components_are_those_of_a_fine_picture() -> None:
    rng = np.random.default_rng(4)
    thetas = np.stack([draw_theta(rng, 30, 3) for _ in range(6)])
    found = visible_components(torch.from_numpy(thetas), 3, pixel_coordinates(400, 400))
    shares = np.stack([naive.mask_shares(theta, 3) for theta in thetas])
    assert (found.numpy() == (shares >= 1 / 255)).all()
    assert 0 < found.float().mean() < 1


def test_nothing_is_visible_where_the_scale_is_zero() -> None:
    theta = torch.from_numpy(draw_theta(np.random.default_rng(5), 4, 3))[None]
    theta[:, -1] = 0
    guess = torch.from_numpy(draw_theta(np.random.default_rng(6), 4, 3))[None]
    losses, terms = direct_losses(
        guess, theta, 3, counted="visible", coordinates=pixel_coordinates(400, 400)
    )
    assert terms["components"].item() == 0
    assert losses.item() == pytest.approx(guess[0, -1].item() ** 2, rel=1e-6)


def test_loss_over_visible_components_is_equation_9_over_them() -> None:
    rng = np.random.default_rng(7)
    truth, guess = draw_theta(rng, 6, 3), draw_theta(rng, 6, 3)
    truth[8] = 0  # the first has no weight: invisible
    seen = naive.mask_shares(truth, 3) >= 1 / 255
    distances = naive.component_distances(guess, truth, 3)
    total = (truth[-1] - guess[-1]) ** 2
    total += sum(min(row) for row, there in zip(distances, seen, strict=True) if there)
    losses, _ = direct_losses(
        torch.from_numpy(guess)[None],
        torch.from_numpy(truth)[None],
        3,
        counted="visible",
        coordinates=pixel_coordinates(400, 400),
    )
    assert not seen[0]
    assert losses.item() == pytest.approx(total / (sum(seen) + 1), rel=1e-5)


def test_component_between_the_pixels_is_not_seen() -> None:
    # Two components at one place: of 1/250 and of 0.3; no pixel of 64 shows the narrow one.
    narrow, wide = [0.0] * 5 + [0.004, 0.004, 0, 0.5], [0.0] * 5 + [0.3, 0.3, 0, 0.5]
    theta = torch.tensor([[*narrow, *wide, 1.0]])
    assert visible_components(theta, 3, pixel_coordinates(64, 64)).tolist() == [[False, True]]


def test_one_to_one_loss_of_an_estimate_that_is_not_finite_is_not_finite() -> None:
    truth = torch.from_numpy(draw_theta(np.random.default_rng(8), 3, 3))[None]
    losses, _ = direct_losses(torch.full_like(truth, torch.nan), truth, 3, matching="one-to-one")
    assert losses.isnan().all()


def test_sum_of_losses_keeps_its_parts() -> None:
    losses, terms = sum_losses(torch.tensor([0.25]), torch.tensor([0.5]), torch.tensor([2.0]))
    assert losses.tolist() == [0.75]
    assert {name: term.tolist() for name, term in terms.items()} == {
        "direct": [0.25],
        "indirect": [0.5],
        "unpainted": [2.0],
    }


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
