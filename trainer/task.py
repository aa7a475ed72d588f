"""One batch on its way: uint8 from the loader, to the network's input, to theta^, to the losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from trainer.choices import Components, Matching
from trainer.dataset import Dataset
from trainer.errors import TrainerError
from trainer.losses import (
    cross_entropy_losses,
    direct_losses,
    heads,
    indirect_losses,
    sum_losses,
)
from trainer.paint import paint
from trainer.ranks import Ranks
from trainer.render import pixel_coordinates
from trainer.run import Config
from trainer.samples import Batch

TERMS = {
    "direct": ("components", "scale"),
    "indirect": ("unpainted",),
    "sum": ("direct", "indirect", "unpainted"),
    "cross_entropy": ("accuracy",),
}

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Task:
    """What the step needs beside the model; the tables of normals are uint8 [N, edge, edge, C].

    `normals` at `size_px` is what L_indirect renders on; `sources` at the dataset's size is what
    the images of a parameter-only set are painted on. None where they are not needed.
    """

    loss: str
    channels: int
    size_px: int
    device: torch.device
    bf16: bool
    coordinates: torch.Tensor
    normals: torch.Tensor | None
    sources: torch.Tensor | None
    matching: Matching = "nearest"
    counted: Components = "all"


def needs_normals(loss: str, dataset: Dataset) -> bool:
    """Whether the table of normal images has to be read."""
    return loss in ("indirect", "sum") or dataset.contents == "parameters"


def make_task(
    config: Config, dataset: Dataset, device: torch.device, normals: torch.Tensor | None
) -> Task:
    """The task of a run; the table of normals is resized once and kept on the device as uint8."""
    sources = None
    if normals is not None:
        if dataset.contents == "parameters":
            sources = normals.to(device)
        size = (config.size_px, config.size_px)
        if normals.shape[1:3] == size:
            normals = normals.to(device) if sources is None else sources
        else:
            normals = torch.cat([resized(piece, config.size_px) for piece in normals.split(64)])
            normals = normals.to(device)
    return Task(
        loss=config.loss,
        matching=config.matching,
        counted=config.components,
        channels=dataset.image.channels,
        size_px=config.size_px,
        device=device,
        bf16=config.precision == "bf16",
        coordinates=pixel_coordinates(config.size_px, dataset.image.size_px).to(device),
        normals=normals,
        sources=sources,
    )


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, C] to float32 [B, C, H, W] in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1)


def resized(images: torch.Tensor, size_px: int) -> torch.Tensor:
    """uint8 [B, H, W, C] at another size: bilinear, antialiased when it shrinks, rounded."""
    if images.shape[1] == size_px:
        return images
    planes = images.permute(0, 3, 1, 2)  # channels last in memory
    if planes.is_cuda:
        planes = planes.float()  # no uint8 kernel there; on a CPU it is 7 times faster
    size = (size_px, size_px)
    planes = F.interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
    if planes.is_cuda:
        planes = planes.round()
    return planes.to(torch.uint8).permute(0, 2, 3, 1)


def outputs_of(task: Task, model: torch.nn.Module, anomaly: torch.Tensor) -> torch.Tensor:
    """The network's raw outputs float32 [B, outputs] for [B, C, size_px, size_px] in [-1, 1]."""
    rgb = anomaly.expand(-1, 3, -1, -1)  # grey images three times; no copy for RGB
    with torch.autocast(task.device.type, dtype=torch.bfloat16, enabled=task.bf16):
        outputs = model(rgb)
    return outputs.float()


def estimate(task: Task, model: torch.nn.Module, anomaly: torch.Tensor) -> torch.Tensor:
    """theta^ float32 [B, K(C+6)+1] for I_ano float32 [B, C, size_px, size_px] in [-1, 1]."""
    return heads(outputs_of(task, model, anomaly), task.channels)


def on_device(task: Task, batch: Batch) -> Batch:
    """A batch on the device, its images there and uint8 [n, size_px, size_px, C]."""
    images, theta, normal = (
        part.to(task.device, non_blocking=True)
        for part in (batch.images, batch.theta, batch.normal)
    )
    if task.sources is not None:
        images = paint(task.sources[normal], theta)
    images = resized(images, task.size_px)
    return Batch(images, theta, normal, batch.index, batch.seconds)


def losses_of(task: Task, model: torch.nn.Module, batch: Batch) -> Losses:
    """The loss of each sample of a batch `on_device`, and its terms: float32 [n] each."""
    anomaly = to_signed(batch.images)  # [n, C, size_px, size_px]
    if task.loss == "cross_entropy":
        return cross_entropy_losses(outputs_of(task, model, anomaly), batch.normal)
    theta_estimate = estimate(task, model, anomaly)
    if task.loss == "indirect":
        return _indirect(task, theta_estimate, batch, anomaly)
    direct = direct_losses(
        theta_estimate,
        batch.theta,
        task.channels,
        task.matching,
        task.counted,
        task.coordinates,
    )
    if task.loss == "direct":
        return direct
    indirect, terms = _indirect(task, theta_estimate, batch, anomaly)
    return sum_losses(direct[0], indirect, terms["unpainted"])


def _indirect(task: Task, estimate: torch.Tensor, batch: Batch, anomaly: torch.Tensor) -> Losses:
    assert task.normals is not None
    normal = to_signed(task.normals[batch.normal])
    return indirect_losses(estimate, normal, anomaly, task.coordinates)


def wants_cuda(name: str) -> bool:
    """Whether --device names CUDA, or `auto` finds it; not where there is none."""
    return name.startswith(("auto", "cuda")) and torch.cuda.is_available()


def pick_device(name: str, ranks: Ranks) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; of many processes each has its own GPU.

    Raises TrainerError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainerError(f"--device {name}: not a device; use auto, cpu or cuda[:N]") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainerError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cpu":
        return device
    if ranks.world > 1:
        if device.index is not None:
            raise TrainerError(f"--device {name}: torchrun gives each process a GPU; use cuda")
        device = torch.device("cuda", ranks.local_rank)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise TrainerError(f"--device {name}: this machine has {count} CUDA device(s)")
    return device


def pick_precision(device: torch.device) -> str:
    """What `--precision auto` is: bf16 on CUDA, and on a CPU with bf16 instructions; else fp32.

    Measured, ResNet-18 at 128 px, batch 64, two Zen 4 cores with avx512_bf16: 100 images/s in
    bf16, 52 in fp32 (88 and 43 without channels_last). Emulated bf16 is slower than fp32.
    """
    if device.type == "cuda":
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
