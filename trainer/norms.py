"""Running statistics of batch norms over all parts of all processes, brought on once a step.

Batch norm works on a part of the batch, and left to itself it would move its running statistics
with every part, and apart in every process. Here each part leaves its own statistics in the
buffers, and a step moves the kept ones once, towards the parts' weighted mean: the same numbers
for any number of processes, and a plain run's where the batch is one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Norms:
    """The buffers of all batch norms, flat storage for what is kept, and for the parts' sum."""

    running: list[Tensor]  # running_mean and running_var of each batch norm
    counts: list[Tensor]  # num_batches_tracked
    momenta: Tensor  # float32 [values of all buffers]
    kept: Tensor  # float32 [values]: the running statistics after the last step
    sums: Tensor  # float32 [values + 1]: the parts' statistics times samples, and the samples

    def begin(self) -> None:
        """Before the parts of a step."""
        if self.running:
            torch._foreach_copy_(self._views(self.kept), self.running)
        self.sums.zero_()

    def add(self, samples: int) -> None:
        """After forward and backward of a part: take in its statistics."""
        if self.running:
            torch._foreach_add_(self._views(self.sums), self.running, alpha=float(samples))
        self.sums[-1] += samples

    def end(self, total: Callable[[Tensor], Tensor], parts: int) -> None:
        """After the `parts` of a step; `total` sums a tensor over all processes in place."""
        if not self.running:
            return
        sums = total(self.sums)
        mean = sums[:-1] / sums[-1].clamp_min(1)
        self.kept.lerp_(mean, self.momenta * (sums[-1] > 0))  # no sample came: nothing moves
        torch._foreach_copy_(self.running, self._views(self.kept))
        torch._foreach_add_(self.counts, 1 - parts)  # a step is one batch, whoever made its parts

    def _views(self, flat: Tensor) -> list[Tensor]:
        return list(flat[: len(self.kept)].split([len(buffer) for buffer in self.running]))


def norms_of(model: nn.Module) -> Norms:
    """Take over the batch norms of a model: from now on a forward leaves the part's statistics."""
    running: list[Tensor] = []
    counts: list[Tensor] = []
    momenta: list[Tensor] = []
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            mean, var, count = module.running_mean, module.running_var, module.num_batches_tracked
            assert mean is not None
            assert var is not None
            assert count is not None
            assert module.momentum is not None
            running += [mean, var]
            counts.append(count)
            momenta.append(torch.full((2 * len(mean),), module.momentum, device=device))
            module.momentum = 1.0
    values = sum(len(buffer) for buffer in running)
    return Norms(
        running=running,
        counts=counts,
        momenta=torch.cat(momenta) if momenta else torch.empty(0, device=device),
        kept=torch.zeros(values, device=device),
        sums=torch.zeros(values + 1, device=device),
    )
