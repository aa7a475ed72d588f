"""Whether to train with torch.compile: measured on a real batch, and its numbers compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.run import Config
from trainer.samples import Batch
from trainer.task import Task, losses_of

LEAST_GAIN = 1.05  # compiled only where it is 5 % faster: it costs a minute at each start
RUNS = 5
# How far the compiled step may be from eager float32, beside twice what eager itself is off by in
# bf16. Losses change smoothly with rounding; gradients do not where a ReLU changes sides: 0.5 % was
# seen of one in a batch of 8. Wrong code is off by tenths.
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-2


class Finding(NamedTuple):
    """What a trial of the compiled step came to; errors are relative, of all values as one vector.

    Each error is at most 1 where it is allowed.
    """

    loss_error: float
    gradient_error: float
    eager_s: float
    compiled_s: float

    @property
    def right(self) -> bool:
        """Whether losses and gradients are the network's; not for nan."""
        return self.loss_error <= 1 and self.gradient_error <= 1


def wanted(option: str, device: torch.device) -> bool:
    """Whether to measure: on CUDA unless told not to, elsewhere only when told to."""
    return option == "measure" or (option == "auto" and device.type == "cuda")


def try_compiled(task: Task, model: nn.Module, compiled: nn.Module, part: Batch) -> Finding:
    """Compare forward and backward of a part, eager and compiled, and time both.

    `part` is on the device. Weights, buffers and gradients of the model are as before.
    """
    with untouched(model):
        eager = step_of(task, model, part)
        exact = eager
        if task.bf16:
            exact = step_of(replace(task, bf16=False), model, part)
        found = step_of(task, compiled, part)
        loss_error = share_of_allowed(found[0], eager[0], exact[0], LOSS_TOLERANCE)
        gradient_error = share_of_allowed(found[1], eager[1], exact[1], GRADIENT_TOLERANCE)
        del eager, exact, found
        seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(RUNS):  # in turn, so that a machine's moods meet both
            for name, network in (("eager", model), ("compiled", compiled)):
                seconds[name].append(timed(task, network, part))
    eager_s, compiled_s = (statistics.median(each) for each in seconds.values())
    return Finding(loss_error, gradient_error, eager_s, compiled_s)


def share_of_allowed(found: Tensor, eager: Tensor, exact: Tensor, tolerance: float) -> float:
    """The error of `found`, as a share of what it may be."""
    size = exact.norm().clamp_min(1e-30)
    allowed = 2 * (eager - exact).norm() / size + tolerance
    return float((found - exact).norm() / size / allowed)


def warm_up(task: Task, model: nn.Module, compiled: nn.Module, part: Batch) -> None:
    """Compile now, where a signal ends the process at once, and not in the first step."""
    with untouched(model):
        step_of(task, compiled, part)


def step_of(task: Task, network: nn.Module, part: Batch) -> tuple[Tensor, Tensor]:
    """The losses of a part, and all gradients of their mean as one float32 vector."""
    losses, _ = losses_of(task, network, part)
    found = torch.autograd.grad(losses.mean(), list(network.parameters()))
    return losses.detach(), torch.cat([gradient.flatten().float() for gradient in found])


def timed(task: Task, network: nn.Module, part: Batch) -> float:
    """Seconds of one forward and backward."""
    settle(task.device)
    start = time.perf_counter()
    losses_of(task, network, part)[0].mean().backward()
    settle(task.device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the buffers back, and leave no gradient behind."""
    kept = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), kept, strict=True):
                buffer.copy_(before)
        model.zero_grad(set_to_none=True)


def eager_where_odd(compiled: bool, config: Config, rows: int) -> AbstractContextManager[None]:
    """Eager for a part of unusual size, as where the run ends: it is not worth compiling for."""
    usual = config.batch_size / config.micro_batches
    if not compiled or math.floor(usual) <= rows <= math.ceil(usual):
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def verdict(right: bool, eager_s: float, compiled_s: float) -> tuple[bool, str]:
    """Whether to compile, and the line that says why; seconds of the slowest process.

    >>> verdict(True, 0.2, 0.1)
    (True, 'torch.compile: 2.00 times as fast as eager (100.0 against 200.0 ms): taken.')
    >>> verdict(True, 0.1, 0.1)[0], verdict(False, 0.2, 0.1)[0]
    (False, False)
    """
    gain = eager_s / compiled_s
    measured = f"{gain:.2f} times as fast as eager ({1e3 * compiled_s:.1f} against "
    measured += f"{1e3 * eager_s:.1f} ms)"
    if not right:
        return False, f"torch.compile: its numbers are wrong ({measured}): not taken."
    if gain < LEAST_GAIN:
        return False, f"torch.compile: {measured}: not taken."
    return True, f"torch.compile: {measured}: taken."
