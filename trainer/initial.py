"""Weights to begin with in place of random ones, and batch norms that fit them to new images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.errors import TrainerError
from trainer.models import ARCHITECTURES
from trainer.task import Task, resized, to_signed

MAX_WEIGHTS_BYTES = 8 * 2**30
RECENTRE_IMAGES = 256  # at most; each channel has statistics over all of their positions


def begin_with(model: nn.Module, arch: str, path: Path) -> None:
    """Load a safetensors file of torchvision's key names, all but the last layer, in place.

    Raises TrainerError for a file that is damaged or too large, a missing or unknown key, another
    shape, and a value that is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.stat().st_size > MAX_WEIGHTS_BYTES:
            raise TrainerError(f"{path}: larger than {MAX_WEIGHTS_BYTES} bytes, refused")
        found = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainerError(
            f"{path}: not readable as safetensors ({str(error).splitlines()[0]:.200})"
        ) from None
    head = ARCHITECTURES[arch].classifier
    state = {key: value for key, value in found.items() if not key.startswith(head)}
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(head)}
    for key, value in expected.items():
        if key not in state:
            if key.endswith("num_batches_tracked"):
                continue
            raise TrainerError(f"{path}: key {key!r} is missing; is it a {arch}?")
        if value.ndim == 0 and state[key].numel() == 1:  # a count that was stored as a list
            state[key] = state[key].reshape(())
        if state[key].shape != value.shape:
            raise TrainerError(
                f"{path}: {key!r} has shape {list(state[key].shape)}, {arch} expects "
                f"{list(value.shape)}"
            )
        if not bool(torch.isfinite(state[key].float()).all()):
            raise TrainerError(f"{path}: {key!r} holds values that are not finite")
        if key.endswith("running_var") and bool((state[key] < 0).any()):
            raise TrainerError(f"{path}: {key!r} holds variances below 0")
    unknown = sorted(state.keys() - expected.keys())
    if unknown:
        raise TrainerError(f"{path}: unknown key {unknown[0]!r}; is it a {arch}?")
    model.load_state_dict(state, strict=False)


def some_of(table: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    """At most `count` rows, evenly spaced."""
    if len(table) <= count:
        return table
    return table[np.arange(count) * len(table) // count]


@torch.no_grad()
def recentre(task: Task, model: nn.Module, normals: torch.Tensor) -> None:
    """Give batch norms the statistics of `normals` without changing what the network computes.

    normals: uint8 [n, edge, edge, C], at any size. Weight and bias take up the difference, so the
    network in evaluation is the same function, and one in training begins near it, also where the
    file's batch norms were folded into its convolutions.
    """
    assert len(normals)
    images = to_signed(resized(normals.to(task.device), task.size_px)).expand(-1, 3, -1, -1)

    def take(norm: _BatchNorm, inputs: tuple[torch.Tensor, ...]) -> None:
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        new_var, new_mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3), correction=0)
        gain = norm.weight / (var + norm.eps).sqrt()
        norm.bias.add_(gain * (new_mean - mean))
        norm.weight.copy_(gain * (new_var + norm.eps).sqrt())
        mean.copy_(new_mean)
        var.copy_(new_var)

    training = model.training
    model.eval()
    hooks = [
        module.register_forward_pre_hook(take)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        model(images.contiguous(memory_format=torch.channels_last))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
