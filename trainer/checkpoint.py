"""Checkpoints: everything a run needs to go on as if it had not stopped, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save

from trainer import __version__
from trainer.artifacts import (
    Model,
    Sha256,
    atomic_file,
    read_json,
    read_verified,
    sha256_of,
    write_json,
)
from trainer.errors import TrainerError
from trainer.run import Config

CHECKPOINT_FILE = "checkpoint.json"
KEEP = 2


class CheckpointRecord(Model):
    """One checkpoint file, and where in the run it was taken."""

    file: str = Field(pattern=r"^checkpoint-\d{8,}\.safetensors$")
    bytes: int = Field(ge=1)
    sha256: Sha256
    step: int = Field(ge=1, description="optimizer steps taken")
    samples_seen: int = Field(ge=1, description="the cursor: step times batch size")
    seconds: float = Field(ge=0, description="training time so far, over all resumes")
    metrics_bytes: int = Field(ge=0, description="length of metrics.jsonl at this step")


class Checkpoints(Model):
    """`checkpoint.json`: written last; names the newest checkpoint first, then the one before."""

    format: Literal["semiformula-checkpoint"]
    format_version: Literal[1]
    trainer_version: str
    arch: str
    loss: str
    checkpoints: list[CheckpointRecord] = Field(min_length=1, max_length=KEEP)


def newest_checkpoint(out: Path, config: Config) -> CheckpointRecord | None:
    """The checkpoint to go on from, None for a fresh run.

    Raises TrainerError when the checkpoint is of another architecture or loss than the run.
    """
    if not (out / CHECKPOINT_FILE).exists():
        return None
    known = read_json(Checkpoints, out / CHECKPOINT_FILE)
    for name in ("arch", "loss"):
        found, expected = getattr(known, name), getattr(config, name)
        if found != expected:
            raise TrainerError(
                f"{out / CHECKPOINT_FILE}: checkpoint of {name} {found}, run.json says {expected}; "
                "the files are of two runs"
            )
    present = [record for record in known.checkpoints if (out / record.file).exists()]
    if not present:
        raise TrainerError(f"{out / known.checkpoints[0].file}: no such file; start another --out")
    return present[0]


def save_checkpoint(
    out: Path,
    config: Config,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    metrics_bytes: int,
) -> CheckpointRecord:
    """Write checkpoint-STEP.safetensors, then checkpoint.json; older files but one go."""
    # One metadata entry: safetensors orders several at random, and equal runs are equal files.
    data = save(_tensors(model, optimizer), {"format": "semiformula-checkpoint"})
    record = CheckpointRecord(
        file=f"checkpoint-{step:08d}.safetensors",
        bytes=len(data),
        sha256=sha256_of(data),
        step=step,
        samples_seen=step * config.batch_size,
        seconds=seconds,
        metrics_bytes=metrics_bytes,
    )
    before = []
    if (out / CHECKPOINT_FILE).exists():
        known = read_json(Checkpoints, out / CHECKPOINT_FILE).checkpoints
        before = [old for old in known if old.step < step and (out / old.file).exists()]
    with atomic_file(out / record.file) as file:
        file.write(data)
    index = Checkpoints(
        format="semiformula-checkpoint",
        format_version=1,
        trainer_version=__version__,
        arch=config.arch,
        loss=config.loss,
        checkpoints=[record, *before][:KEEP],
    )
    write_json(out / CHECKPOINT_FILE, index)
    _remove_others(out, {kept.file for kept in index.checkpoints})
    return record


def load_tensors(out: Path, record: CheckpointRecord) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, verified by length and SHA-256; TrainerError otherwise."""
    path = out / record.file
    try:
        data = read_verified(path, record.bytes, record.sha256)
        return load(data)
    except TrainerError as error:
        raise TrainerError(
            f"{error.message}; delete it to go on from the checkpoint before"
        ) from None
    except SafetensorError as error:
        raise TrainerError(f"{path}: not readable as safetensors ({error})") from None


def load_model(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], config: Config, where: Path
) -> None:
    """Copy the weights of a checkpoint into the model; TrainerError when they are of another."""
    weights = _under("model/", tensors)
    _check(weights, model.state_dict(), config, where)
    model.load_state_dict(weights)


def restore(
    out: Path,
    config: Config,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> CheckpointRecord | None:
    """Bring model, optimizer and generators to the newest checkpoint; None if there is none."""
    record = newest_checkpoint(out, config)
    if record is None:
        return None
    tensors, where = load_tensors(out, record), out / record.file
    load_model(model, tensors, config, where)
    for name, parameter in model.named_parameters():
        state = _under(f"optimizer/{name}/", tensors)
        step = torch.zeros(())  # as Adam has it: float32 and on the CPU, wherever the model is
        expected = {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}
        _check(state, expected, config, where, f"optimizer/{name}/")
        # Moments take the parameter's memory layout again: another one may run through other
        # vector code, and the last bit of a resumed run would depend on it.
        optimizer.state[parameter] = {
            "step": state["step"],
            "exp_avg": torch.empty_like(parameter).copy_(state["exp_avg"]).detach(),
            "exp_avg_sq": torch.empty_like(parameter).copy_(state["exp_avg_sq"]).detach(),
        }
    random = _under("rng/", tensors)
    cuda = random.pop("cuda", None)  # only where the run was on one
    _check(random, {"cpu": torch.get_rng_state()}, config, where, "rng/")
    torch.set_rng_state(random["cpu"])
    if cuda is not None and torch.cuda.is_available():
        _check({"cuda": cuda}, {"cuda": torch.cuda.get_rng_state()}, config, where, "rng/")
        torch.cuda.set_rng_state(cuda)
    return record


def _check(
    tensors: dict[str, torch.Tensor],
    like: Mapping[str, torch.Tensor],
    config: Config,
    where: Path,
    prefix: str = "",
) -> None:
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


def _kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} {tuple(t.shape)}" for name, t in tensors.items()}


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _remove_others(out: Path, keep: set[str]) -> None:
    for path in out.glob("checkpoint-*.safetensors"):
        if path.name not in keep:
            path.unlink(missing_ok=True)
