"""The product of a run: the backbone's weights under torchvision's names, and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors.torch import save

from trainer import __version__
from trainer.artifacts import Model, Sha256, atomic_file, sha256_of, verify_file, write_json
from trainer.choices import Arch, Components, Loss, Matching, Schedule
from trainer.models import ARCHITECTURES
from trainer.run import Run

BACKBONE_FILE = "backbone.json"
WEIGHTS_FILE = "backbone.safetensors"


class Weights(Model):
    """The safetensors file beside backbone.json."""

    file: Literal["backbone.safetensors"]
    bytes: int = Field(ge=1)
    sha256: Sha256


class TrainedOn(Model):
    """The dataset, by name and hash."""

    name: str
    content_sha256: Sha256
    recipe_sha256: Sha256 | None
    samples: int = Field(ge=1)


Triple = Annotated[list[float], Field(min_length=3, max_length=3)]


class Input(Model):
    """What the network expects: pixels in [0, 1], then (x - mean) / std per channel."""

    size_px: int = Field(ge=1)
    channels: Literal[3]
    mean: Triple
    std: Triple


class Padim(Model):
    """The feature layers for PaDiM by torchvision's names, and how many dimensions it draws."""

    layers: list[str] = Field(min_length=1)
    dims: int = Field(ge=1)


class Training(Model):
    """How far the run came, and with which knobs."""

    steps: int = Field(ge=1)
    epochs: float = Field(gt=0)
    samples_seen: int = Field(ge=1)
    quarantined: int = Field(ge=0, description="shards left out under --max-bad-ratio")
    processes: int = Field(ge=1, description="at the end of the run")
    batch_size: int = Field(ge=1)
    micro_batches: int = Field(ge=1)
    lr: float = Field(gt=0)
    schedule: Schedule
    ema: float | None
    seed: int = Field(ge=0)
    matching: Matching = "nearest"
    components: Components = "all"
    init_sha256: Sha256 | None = Field(default=None, description="of the weights begun with")
    restated_images: int | None = Field(
        default=None, ge=1, description="normals that batch norm statistics were taken anew from"
    )
    restated_size_px: int | None = Field(default=None, ge=1)
    restated_dataset_sha256: Sha256 | None = Field(default=None, description="of those normals")


class Metrics(Model):
    """Mean training loss of the last 100 steps, and the held-out loss at the end."""

    train_loss: float
    holdout_loss: float | None


class Backbone(Model):
    """`backbone.json`: written after the weights."""

    format: Literal["semiformula-backbone"]
    format_version: Literal[2]
    trainer_version: str
    arch: Arch
    weights: Weights
    loss: Loss
    dataset: TrainedOn
    input: Input
    padim: Padim
    training: Training
    metrics: Metrics


def export_backbone(
    out: Path,
    run: Run,
    state: Mapping[str, torch.Tensor],
    *,
    steps: int,
    samples_seen: int,
    train_samples: int,
    processes: int = 1,
    quarantined: int = 0,
    train_loss: float,
    holdout_loss: float | None,
) -> Backbone:
    """Write RUN/backbone.safetensors (float32, without the classifier), then RUN/backbone.json.

    `state` is the network's state dict, or that of its averaged weights. TrainerError when the
    disk holds other bytes than were written.
    """
    config = run.config
    architecture = ARCHITECTURES[config.arch]
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if not name.startswith(architecture.classifier)
    }
    # One metadata entry: safetensors orders several at random, and equal runs are equal files.
    data = save(tensors, {"format": "semiformula-backbone"})
    backbone = Backbone(
        format="semiformula-backbone",
        format_version=2,
        trainer_version=__version__,
        arch=config.arch,
        weights=Weights(file=WEIGHTS_FILE, bytes=len(data), sha256=sha256_of(data)),
        loss=config.loss,
        dataset=TrainedOn(
            name=run.dataset.name,
            content_sha256=run.dataset.content_sha256,
            recipe_sha256=run.dataset.recipe_sha256,
            samples=run.dataset.samples,
        ),
        input=Input(size_px=config.size_px, channels=3, mean=[0.5] * 3, std=[0.5] * 3),
        padim=Padim(layers=list(architecture.layers), dims=architecture.dims),
        training=Training(
            steps=steps,
            epochs=samples_seen / train_samples,
            samples_seen=samples_seen,
            quarantined=quarantined,
            processes=processes,
            batch_size=config.batch_size,
            micro_batches=config.micro_batches,
            lr=config.lr,
            schedule=config.schedule,
            ema=config.ema,
            seed=config.seed,
            matching=config.matching,
            components=config.components,
            init_sha256=config.init_sha256,
        ),
        metrics=Metrics(train_loss=train_loss, holdout_loss=holdout_loss),
    )
    write_backbone(out, backbone, data)
    return backbone


def write_backbone(out: Path, backbone: Backbone, data: bytes) -> None:
    """Write the weights `data`, read them back, then write backbone.json.

    TrainerError when the disk holds other bytes than were written.
    """
    # A reader compares hashes, so a kill between the two files shows as a mismatch, and the same
    # command repairs it.
    with atomic_file(out / WEIGHTS_FILE) as file:
        file.write(data)
    verify_file(out / WEIGHTS_FILE, backbone.weights.bytes, backbone.weights.sha256)
    write_json(out / BACKBONE_FILE, backbone)
