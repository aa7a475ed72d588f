"""The preflight of torch.compile: right, fast, and without a trace."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from tests.test_trainer_schedule import config
from trainer.preflight import (
    Finding,
    eager_where_odd,
    step_of,
    try_compiled,
    verdict,
    wanted,
)
from trainer.samples import Batch
from trainer.task import Task, losses_of

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """A network with a batch norm, and 9 outputs: K = 1, C = 2 ... as [n, 3, 16, 16] comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


def task(bf16: bool = False) -> Task:
    return Task("direct", 3, 16, CPU, bf16, torch.empty(0), None, None)


def part() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 16, 16, 3), generator=generator, dtype=torch.uint8)
    theta = torch.rand(4, 10, generator=generator)
    zero = torch.zeros(4, dtype=torch.int64)
    return Batch(images, theta, zero, zero, torch.zeros(3, dtype=torch.float64))


class Wrong(nn.Module):
    """Shares the parameters, but halves what it computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images) * 0.9


@pytest.mark.parametrize("bf16", [False, True])
def test_same_network_is_right_and_leaves_no_trace(bf16: bool) -> None:
    torch.manual_seed(0)
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    found = try_compiled(task(bf16), model, model, part())
    assert found.right
    assert found.eager_s > 0
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_wrong_gradients_are_found(bf16: bool) -> None:
    torch.manual_seed(0)
    model = Tiny()
    assert not try_compiled(task(bf16), model, Wrong(model), part()).right


def test_nan_is_not_right() -> None:
    assert not Finding(float("nan"), 0.5, 1.0, 1.0).right
    assert not Finding(0.5, float("nan"), 1.0, 1.0).right
    assert Finding(1.0, 1.0, 1.0, 1.0).right


def test_step_gives_all_gradients_of_the_mean_loss() -> None:
    torch.manual_seed(0)
    model = Tiny()
    losses, gradients = step_of(task(), model, part())
    losses_of(task(), model, part())[0].mean().backward()
    assert losses.shape == (4,)
    expected = [parameter.grad.flatten() for parameter in model.parameters()]  # type: ignore[union-attr]
    torch.testing.assert_close(gradients, torch.cat(expected))


@pytest.mark.parametrize(
    ("option", "device", "expected"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("measure", "cpu", True),
        ("off", "cuda", False),
        ("off", "cpu", False),
    ],
)
def test_when_to_measure(option: str, device: str, expected: bool) -> None:
    assert wanted(option, torch.device(device)) is expected


def test_verdict_needs_right_numbers_and_five_percent() -> None:
    assert verdict(True, 0.106, 0.1)[0]
    assert not verdict(True, 0.104, 0.1)[0]
    taken, line = verdict(False, 0.3, 0.1)
    assert not taken
    assert line == (
        "torch.compile: its numbers are wrong (3.00 times as fast as eager (100.0 against "
        "300.0 ms)): not taken."
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # torch's compiler leaves a file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_compiled_network_is_right_and_odd_parts_stay_eager() -> None:
    torch.manual_seed(0)
    model = Tiny()
    compiled = torch.compile(model, dynamic=False)
    found = try_compiled(task(), model, compiled, part())
    assert found.right, found
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    with eager_where_odd(True, config(), rows=3):  # a batch of 4 in one part
        compiled(torch.zeros(3, 3, 16, 16))
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames
