"""Whether to train with torch.compile: measured on a real batch, and its numbers compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.run import Config
from trainer.samples import Batch
from trainer.task import Task, losses_of

LEAST_GAIN = 1.05  # compiled only where it is 5 % faster: it costs a minute at each start
RUNS = 5
# Compiled gradients may be as far from those of float32 as eager ones twice over, and in float32
# itself this far: fused sums round otherwise.
TOLERANCE = 1e-3


class Finding(NamedTuple):
    """What a trial of the compiled step came to."""

    error: float  # relative, of all gradients as one vector
    allowed: float
    eager_s: float
    compiled_s: float

    @property
    def right(self) -> bool:
        """Whether the gradients are the network's; not for nan."""
        return self.error <= self.allowed


def wanted(option: str, device: torch.device) -> bool:
    """Whether to measure: on CUDA unless told not to, elsewhere only when told to."""
    return option == "measure" or (option == "auto" and device.type == "cuda")


def try_compiled(task: Task, model: nn.Module, compiled: nn.Module, part: Batch) -> Finding:
    """Compare forward and backward of a part, eager and compiled, and time both.

    `part` is on the device. Weights, buffers and gradients of the model are as before.
    """
    with untouched(model):
        eager = gradients(task, model, part)
        exact = eager
        if task.bf16:
            exact = gradients(Task(**{**vars(task), "bf16": False}), model, part)
        found = gradients(task, compiled, part)
        size = exact.norm().clamp_min(1e-30)
        error = float((found - exact).norm() / size)
        allowed = 2 * float((eager - exact).norm() / size) + TOLERANCE
        del eager, exact, found
        seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(RUNS):  # in turn, so that a machine's moods meet both
            for name, network in (("eager", model), ("compiled", compiled)):
                seconds[name].append(timed(task, network, part))
    return Finding(
        error,
        allowed,
        statistics.median(seconds["eager"]),
        statistics.median(seconds["compiled"]),
    )


def warm_up(task: Task, model: nn.Module, compiled: nn.Module, part: Batch) -> None:
    """Compile now, where a signal ends the process at once, and not in the first step."""
    with untouched(model):
        gradients(task, compiled, part)


def gradients(task: Task, network: nn.Module, part: Batch) -> Tensor:
    """All gradients of the mean loss of a part, as one float32 vector."""
    parameters = list(network.parameters())
    losses, _ = losses_of(task, network, part)
    found = torch.autograd.grad(losses.mean(), parameters)
    return torch.cat([gradient.flatten().float() for gradient in found])


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
        return False, f"torch.compile: its gradients are wrong ({measured}): not taken."
    if gain < LEAST_GAIN:
        return False, f"torch.compile: {measured}: not taken."
    return True, f"torch.compile: {measured}: taken."
