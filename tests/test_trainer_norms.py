"""Running statistics of batch norms: the weighted mean over parts, moved once a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from trainer.norms import norms_of


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Conv2d(4, 2, 1))


def alone(tensor: Tensor) -> Tensor:
    return tensor


def step(model: nn.Module, norms: object, parts: list[Tensor], total: object = alone) -> None:
    norms.begin()  # type: ignore[attr-defined]
    for part in parts:
        model(part).sum().backward()
        norms.add(len(part))  # type: ignore[attr-defined]
    norms.end(total, len(parts))  # type: ignore[attr-defined]


def images(seed: int, count: int) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_one_part_is_a_plain_run() -> None:
    model, plain = network(), network()
    norms = norms_of(model)
    for number in range(3):
        step(model, norms, [images(number, 5)])
        plain(images(number, 5))
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-6, atol=1e-6)


def test_parts_move_the_statistics_once_to_their_weighted_mean() -> None:
    model = network()
    norms = norms_of(model)
    parts = [images(0, 2), images(1, 6)]
    outputs = [model[0](part) for part in parts]  # type: ignore[index]
    step(model, norms, parts)
    mean = sum(len(o) / 8 * o.mean(dim=(0, 2, 3)) for o in outputs)
    var = sum(len(o) / 8 * o.transpose(0, 1).flatten(1).var(dim=1) for o in outputs)
    norm = model[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, 0.3 * mean)
    torch.testing.assert_close(norm.running_var, 0.7 + 0.3 * var)
    assert norm.num_batches_tracked.item() == 1


def test_two_processes_agree_with_one() -> None:
    one = network()
    parts = [images(number, 3) for number in range(3)]
    step(one, norms_of(one), parts)

    sums: list[Tensor] = []
    for own in (parts[:1], parts[1:]):  # what each would hand to the all-reduce
        model = network()
        step(model, norms_of(model), own, lambda tensor: sums.append(tensor.clone()) or tensor)
    model = network()
    step(model, norms_of(model), parts[:1], lambda tensor: sums[0] + sums[1])
    for name, expected in one.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected)


def test_step_without_a_sample_moves_nothing() -> None:
    model = network()
    norms = norms_of(model)
    step(model, norms, [images(0, 4)])
    before = copy.deepcopy(model.state_dict())
    norms.begin()
    model(torch.zeros(2, 3, 6, 6))
    norms.add(0)
    norms.end(alone, 1)
    assert torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
    assert torch.equal(model.state_dict()["1.running_var"], before["1.running_var"])


@pytest.mark.parametrize("parts", [1, 2])
def test_evaluation_uses_the_kept_statistics(parts: int) -> None:
    model = network()
    norms = norms_of(model)
    step(model, norms, [images(n, 4) for n in range(parts)])
    kept = norms.kept[:4].clone()
    model.eval()
    model(images(9, 4))
    assert torch.equal(model[1].running_mean, kept)  # type: ignore[index]


def test_network_without_batch_norm_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    norms = norms_of(model)
    norms.begin()
    norms.add(2)
    norms.end(alone, 1)
    assert norms.running == []
