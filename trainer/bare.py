"""The training step without the data path, for `trainer doctor` and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.choices import Arch, Loss
from trainer.dataset import Dataset
from trainer.models import build_model
from trainer.norms import Norms, norms_of
from trainer.ranks import Ranks
from trainer.run import Config
from trainer.samples import Batch
from trainer.setup import outputs_of
from trainer.step import padded, weights_of
from trainer.task import Task, losses_of, make_task, needs_normals, on_device

MOST_NORMALS = 256  # of a synthetic table


@dataclass(frozen=True)
class Bare:
    """What a step works with; `net` is the model, or torch.compile's of it."""

    config: Config
    task: Task
    model: torch.nn.Module
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    norms: Norms


def bare_config(
    dataset: Dataset, *, loss: Loss, arch: Arch, size_px: int, batch_size: int, precision: str
) -> Config:
    """The configuration of a step in one part, at a rate that harms no weights."""
    return Config(
        loss=loss,
        arch=arch,
        size_px=size_px,
        batch_size=batch_size,
        micro_batches=1,
        window_shards=1,
        lr=1e-6,
        schedule="constant",
        warmup_steps=0,
        total_steps=None,
        ema=None,
        seed=0,
        holdout=0,
        precision=precision,
    )


def make_bare(config: Config, dataset: Dataset, device: torch.device, compiled: bool) -> Bare:
    """A fresh model on the device, with random numbers in place of the normal images."""
    normals = None
    if needs_normals(config.loss, dataset):
        size, channels = dataset.image.size_px, dataset.image.channels
        count = min(MOST_NORMALS, dataset.normals.count)
        normals = torch.randint(256, (count, size, size, channels), dtype=torch.uint8)
    model = build_model(config.arch, outputs_of(dataset)).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    net = model
    if compiled:
        net = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return Bare(
        config=config,
        task=make_task(config, dataset, device, normals),
        model=model,
        net=net,
        optimizer=torch.optim.Adam(model.parameters(), lr=config.lr, fused=True),
        norms=norms_of(model),
    )


def known_normals(bare: Bare, batch: Batch) -> Batch:
    """The batch with the numbers of its normals within the synthetic table."""
    table = bare.task.sources if bare.task.normals is None else bare.task.normals
    return batch if table is None else batch._replace(normal=batch.normal % len(table))


def bare_step(bare: Bare, batch: Batch) -> int:
    """One step on a batch, as the loop of train.py makes it of one part; its samples.

    The device may still be at work when it returns.
    """
    bare.optimizer.zero_grad(set_to_none=True)
    bare.norms.begin()
    part = padded(known_normals(bare, batch))
    part = on_device(bare.task, part)
    weights = weights_of(len(part.normal), batch, bare.config.batch_size, bare.task.device)
    losses, _ = losses_of(bare.task, bare.net, part)
    (weights @ losses).backward()
    bare.norms.add(len(batch.index))
    parameters = bare.model.parameters()
    torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    bare.norms.end(Ranks().total, 1)
    bare.optimizer.step()
    return len(batch.index)
