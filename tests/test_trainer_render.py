"""The differentiable generator: against the float64 oracle, gradcheck, and at its limits."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests import naive
from tests.shards_by_hand import draw_theta
from trainer import render as module
from trainer.render import pixel_coordinates, render, split_theta


def tensors(thetas: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(thetas))


def signed(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_render_agrees_with_the_oracle(channels: int) -> None:
    rng = np.random.default_rng(1)
    normals = [rng.integers(0, 256, (24, 24, channels)).astype(np.uint8) for _ in range(4)]
    thetas = [draw_theta(rng, 30, channels) for _ in range(4)]
    images = render(signed(normals).float(), tensors(thetas), pixel_coordinates(24, 24))
    for image, normal, theta in zip(images, normals, thetas, strict=True):
        exact = naive.render_exact(normal, theta).transpose(2, 0, 1)
        np.testing.assert_allclose(image.numpy(), exact, atol=2e-5)


def test_render_in_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    theta = tensors([draw_theta(rng, 3, 3) for _ in range(5)])
    normal = torch.zeros(5, 3, 8, 8)
    results = []
    for values in (1, 10**9):
        monkeypatch.setitem(module.CHUNK_VALUES, "cpu", values)
        leaf = theta.clone().requires_grad_()
        image = render(normal, leaf, pixel_coordinates(8, 8))
        image.square().sum().backward()
        results.append((image.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_render_passes_gradcheck() -> None:
    rng = np.random.default_rng(3)
    theta = tensors([draw_theta(rng, 3, 3) for _ in range(2)]).double().requires_grad_()
    normal = torch.from_numpy(rng.uniform(-1, 1, (2, 3, 7, 7))).requires_grad_()
    grid = pixel_coordinates(7, 7)
    assert torch.autograd.gradcheck(lambda n, t: render(n, t, grid), (normal, theta))


def test_render_of_scale_zero_is_the_normal_image() -> None:
    theta = tensors([draw_theta(np.random.default_rng(4), 3, 3)])
    theta[:, -1] = 0
    normal = torch.rand(1, 3, 9, 9) * 2 - 1
    torch.testing.assert_close(render(normal, theta, pixel_coordinates(9, 9)), normal)


def test_render_at_the_peak_is_the_color_where_scale_is_one() -> None:
    # One component at the middle pixel: M is 1 there, so v alone is seen.
    theta = torch.tensor([[0.25, -0.5, 1.0, 0.0, 0.0, 0.01, 0.01, 0.0, 1.0, 1.0]])
    image = render(torch.zeros(1, 3, 5, 5), theta, pixel_coordinates(5, 5))
    assert image[0, :, 2, 2].tolist() == [0.25, -0.5, 1.0]
    assert image[0, :, 0, 0].tolist() == [0.0, 0.0, 0.0]


LIMITS = {
    "mean": st.sampled_from([-1.0, -0.37, 0.0, 0.0131, 1.0]),
    "sigma": st.sampled_from([0.0, 1e-30, 1e-3, 0.002, 0.3, 10.0]),
    "rho": st.sampled_from([-1.0, -0.9999999, -0.5, 0.0, 0.99, 1.0]),
    "pi": st.sampled_from([0.0, 1e-38, 0.5, 1.0]),
    "scale": st.sampled_from([0.0, 1e-38, 0.5, 1.0]),
}
LIMIT = st.fixed_dictionaries(LIMITS)


@settings(max_examples=150)
@given(st.lists(LIMIT, min_size=1, max_size=3), LIMITS["mean"], LIMITS["sigma"])
def test_render_is_finite_at_the_limits(parts: list[dict], mean_y: float, sigma_y: float) -> None:
    rows = [
        [1.0, -1.0, 0.3, p["mean"], mean_y, p["sigma"], sigma_y, p["rho"], p["pi"]] for p in parts
    ]
    values = [value for row in rows for value in row]
    theta = torch.tensor([[*values, parts[0]["scale"]]]).requires_grad_()
    normal = torch.full((1, 3, 6, 6), -0.5)
    image = render(normal, theta, pixel_coordinates(6, 6))
    loss = (image - 1).square().mean()
    loss.backward()
    assert image.isfinite().all()
    assert image.abs().max() <= 1 + 1e-5
    assert theta.grad is not None
    assert theta.grad.isfinite().all()


def test_split_theta_names_the_papers_order() -> None:
    part = split_theta(torch.arange(19.0)[None], channels=3)
    assert part.color.tolist() == [[[0, 1, 2], [9, 10, 11]]]
    assert part.mean.tolist() == [[[3, 4], [12, 13]]]
    assert part.sigma.tolist() == [[[5, 6], [14, 15]]]
    assert part.rho.tolist() == [[7, 16]]
    assert part.pi.tolist() == [[8, 17]]
    assert part.scale.tolist() == [18]


def test_render_small_falls_on_the_large_image_resized() -> None:
    theta = torch.tensor([[1.0, 0.2, -0.4, 0.2, -0.3, 0.4, 0.5, 0.3, 1.0, 0.9]])
    large = render(torch.zeros(1, 3, 64, 64), theta, pixel_coordinates(64, 64))
    shrunk = torch.nn.functional.interpolate(large, (16, 16), mode="bilinear", antialias=True)

    def error(coordinates: torch.Tensor) -> float:
        return float((render(torch.zeros(1, 3, 16, 16), theta, coordinates) - shrunk).abs().max())

    assert error(pixel_coordinates(16, 64)) < 0.02
    assert error(pixel_coordinates(16, 16)) > 0.04  # the small image's own frame is another one
