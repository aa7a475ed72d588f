"""What a checkpoint holds of model, optimizer and generators, as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trainer.errors import TrainerError
from trainer.run import Config

Tensors = Mapping[str, torch.Tensor]


def training_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Tensors | None = None
) -> dict[str, torch.Tensor]:
    """Everything that the next step depends on, on the CPU; `ema` holds the averaged weights.

    Names: `model/NAME` as in the state dict, `optimizer/NAME/step`, `/exp_avg`, `/exp_avg_sq` of
    each parameter, `ema/NAME`, `rng/cpu`, and `rng/cuda` where CUDA is there.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors |= {f"ema/{name}": tensor for name, tensor in (ema or {}).items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_training_state(
    tensors: Tensors,
    config: Config,
    where: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Tensors | None = None,
) -> None:
    """Bring model, optimizer, averaged weights and generators to a checkpoint, in place.

    Raises TrainerError naming `where` when a tensor is missing or of another shape or type.
    """
    load_model(model, tensors, config, where)
    for group in optimizer.param_groups:
        # A fused or capturable Adam counts its steps on the device, the plain one on the CPU.
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            optimizer.state[parameter] = {"on_device": on_device}
    for name, parameter in model.named_parameters():
        state = under(f"optimizer/{name}/", tensors)
        expected = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        _check(state, expected, config, where, f"optimizer/{name}/")
        on_device = optimizer.state[parameter]["on_device"]
        # Moments take the parameter's memory layout again: another one may run through other
        # vector code, and the last bit of a resumed run would depend on it.
        optimizer.state[parameter] = {
            "step": state["step"].to(parameter.device) if on_device else state["step"].clone(),
            "exp_avg": torch.empty_like(parameter).copy_(state["exp_avg"]).detach(),
            "exp_avg_sq": torch.empty_like(parameter).copy_(state["exp_avg_sq"]).detach(),
        }
    averaged = under("ema/", tensors)
    _check(averaged, ema or {}, config, where, "ema/")
    for name, tensor in (ema or {}).items():
        tensor.copy_(averaged[name])
    _load_generators(under("rng/", tensors), config, where)


def load_model(model: torch.nn.Module, tensors: Tensors, config: Config, where: Path) -> None:
    """Copy the weights of a checkpoint into the model; TrainerError when they are of another."""
    weights = under("model/", tensors)
    _check(weights, model.state_dict(), config, where, "model/")
    model.load_state_dict(weights)


def under(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _load_generators(states: dict[str, torch.Tensor], config: Config, where: Path) -> None:
    cuda = states.pop("cuda", None)  # only where the run was on one
    _check(states, {"cpu": torch.get_rng_state()}, config, where, "rng/")
    torch.set_rng_state(states["cpu"])
    if cuda is not None and torch.cuda.is_available():
        _check({"cuda": cuda}, {"cuda": torch.cuda.get_rng_state()}, config, where, "rng/")
        torch.cuda.set_rng_state(cuda)


def _check(tensors: Tensors, like: Tensors, config: Config, where: Path, prefix: str) -> None:
    """TrainerError unless the names, shapes and dtypes are those of `like`."""
    found, expected = _kinds(tensors), _kinds(like)
    if found != expected:
        name = min(
            key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)
        )
        raise TrainerError(
            f"{where}: checkpoint of another architecture than {config.arch}, or altered: "
            f"{prefix}{name} is {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'no such tensor')}"
        )


def _kinds(tensors: Tensors) -> dict[str, str]:
    return {name: f"{t.dtype} {tuple(t.shape)}" for name, t in tensors.items()}
