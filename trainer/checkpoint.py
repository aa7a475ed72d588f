"""Checkpoint files: written whole, read back, the last few kept; a damaged one is passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import click
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer import __version__
from trainer.artifacts import (
    Model,
    Sha256,
    atomic_file,
    read_json,
    verify_file,
    write_json,
)
from trainer.choices import Arch, Loss
from trainer.errors import TrainerError
from trainer.run import Config
from trainer.state import load_training_state
from trainer.tensors import write_tensors

CHECKPOINT_FILE = "checkpoint.json"
DEFAULT_KEEP = 2

Limb = Annotated[int, Field(ge=0, lt=2**64)]


class EpochLedger(Model):
    """The samples of one epoch that were trained on so far: how many, and a hash of which."""

    epoch: int = Field(ge=0)
    samples: int = Field(ge=0)
    limbs: list[Limb] = Field(
        min_length=4, max_length=4, description="sums of the 32-bit limbs of the samples' hashes"
    )


class CheckpointRecord(Model):
    """One checkpoint file, and where in the run it was taken."""

    file: str = Field(pattern=r"^checkpoint-\d{8,}\.safetensors$")
    bytes: int = Field(ge=1)
    sha256: Sha256
    step: int = Field(ge=1, description="optimizer steps taken")
    samples_seen: int = Field(ge=1, description="the cursor: stream positions consumed")
    seconds: float = Field(ge=0, description="training time so far, over all resumes")
    metrics_bytes: int = Field(ge=0, description="length of metrics.jsonl at this step")
    ledger: list[EpochLedger]
    quarantined: list[str] = Field(description="shards left out so far, by name")


class Checkpoints(Model):
    """`checkpoint.json`: written last; names the newest checkpoint first, then those before."""

    format: Literal["semiformula-checkpoint"]
    format_version: Literal[2]
    trainer_version: str
    arch: Arch
    loss: Loss
    checkpoints: list[CheckpointRecord] = Field(min_length=1)


class Restored(NamedTuple):
    """A good checkpoint as it was read."""

    record: CheckpointRecord
    tensors: dict[str, torch.Tensor]
    path: Path


def read_checkpoints(out: Path, config: Config) -> Checkpoints | None:
    """RUN/checkpoint.json, None for a fresh run; TrainerError when it is of another run."""
    path = out / CHECKPOINT_FILE
    if not path.exists():
        return None
    known = read_json(Checkpoints, path)
    for name in ("arch", "loss"):
        found, expected = getattr(known, name), getattr(config, name)
        if found != expected:
            raise TrainerError(
                f"{path}: checkpoint of {name} {found}, run.json says {expected}; "
                "the files are of two runs"
            )
    return known


def newest_good(out: Path, config: Config) -> Restored | None:
    """The newest checkpoint that is whole, None for a fresh run; one line warns of a damaged one.

    Raises TrainerError when there are checkpoints and none is good.
    """
    known = read_checkpoints(out, config)
    if known is None:
        return None
    faults = []
    for record in known.checkpoints:
        path = out / record.file
        try:
            restored = Restored(record, _read_tensors(path, record), path)
        except TrainerError as error:
            faults.append(error.message)
            continue
        if faults:
            click.echo(
                f"Warning: {'; '.join(faults)}: going on from {record.file}, step {record.step}.",
                err=True,
            )
        return restored
    raise TrainerError(f"{'; '.join(faults)}: no checkpoint is good, start another --out")


def restore(
    out: Path,
    config: Config,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, torch.Tensor] | None = None,
) -> CheckpointRecord | None:
    """Bring everything to the newest good checkpoint; None, and nothing done, if there is none."""
    restored = newest_good(out, config)
    if restored is None:
        return None
    load_training_state(restored.tensors, config, restored.path, model, optimizer, ema)
    go_on_from(out, config, restored.record)
    return restored.record


def go_on_from(out: Path, config: Config, record: CheckpointRecord) -> None:
    """Leave newer, damaged checkpoints out of checkpoint.json; the next one removes their files."""
    known = read_checkpoints(out, config)
    assert known is not None
    if known.checkpoints[0] != record:
        first = known.checkpoints.index(record)
        write_json(
            out / CHECKPOINT_FILE,
            known.model_copy(update={"checkpoints": known.checkpoints[first:]}),
        )


def save_checkpoint(
    out: Path,
    config: Config,
    state: Mapping[str, torch.Tensor],
    *,
    step: int,
    samples_seen: int,
    seconds: float,
    metrics_bytes: int,
    ledger: Sequence[EpochLedger] = (),
    quarantined: Sequence[str] = (),
    keep: int = DEFAULT_KEEP,
) -> CheckpointRecord:
    """Write checkpoint-STEP.safetensors, read it back, then checkpoint.json; keep the last `keep`.

    `state` is `training_state`'s. Raises TrainerError when the disk is full, or holds other bytes
    than were written; the checkpoint before then stays the newest.
    """
    known = read_checkpoints(out, config)
    before = [old for old in known.checkpoints if old.step < step] if known else []
    path = out / f"checkpoint-{step:08d}.safetensors"
    try:
        with atomic_file(path) as file:
            size, sha256 = write_tensors(file, state, {"format": "semiformula-checkpoint"})
        verify_file(path, size, sha256)
    except TrainerError as error:
        last = f"of step {before[0].step}" if before else "none"
        raise TrainerError(f"{error.message}; the last good checkpoint is {last}") from None
    record = CheckpointRecord(
        file=path.name,
        bytes=size,
        sha256=sha256,
        step=step,
        samples_seen=samples_seen,
        seconds=seconds,
        metrics_bytes=metrics_bytes,
        ledger=list(ledger),
        quarantined=list(quarantined),
    )
    index = Checkpoints(
        format="semiformula-checkpoint",
        format_version=2,
        trainer_version=__version__,
        arch=config.arch,
        loss=config.loss,
        checkpoints=[record, *(old for old in before if (out / old.file).exists())][:keep],
    )
    write_json(out / CHECKPOINT_FILE, index)
    _remove_others(out, {kept.file for kept in index.checkpoints})
    return record


def _read_tensors(path: Path, record: CheckpointRecord) -> dict[str, torch.Tensor]:
    verify_file(path, record.bytes, record.sha256)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise TrainerError(f"{path}: not readable as safetensors ({error})") from None
    return tensors


def _remove_others(out: Path, keep: set[str]) -> None:
    for path in out.glob("checkpoint-*.safetensors"):
        if path.name not in keep:
            path.unlink(missing_ok=True)
