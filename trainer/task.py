"""One batch on its way: uint8 from the loader, to the network's input, to theta^, to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from trainer.dataset import Dataset
from trainer.errors import TrainerError
from trainer.losses import direct_loss, heads, indirect_loss
from trainer.render import pixel_coordinates
from trainer.run import Config
from trainer.shards import Batch


@dataclass(frozen=True)
class Task:
    """What the step needs beside the model; `normals` is uint8 [N, size_px, size_px, C] or None."""

    loss: str
    channels: int
    size_px: int
    device: torch.device
    bf16: bool
    coordinates: torch.Tensor
    normals: torch.Tensor | None


def make_task(
    config: Config, dataset: Dataset, device: torch.device, normals: torch.Tensor | None
) -> Task:
    """The task of a run; the table of normals is resized once and kept on the device as uint8."""
    if normals is not None:
        size = (config.size_px, config.size_px)
        if normals.shape[1:3] != size:
            normals = torch.cat([resized(piece, config.size_px) for piece in normals.split(64)])
        normals = normals.to(device)
    return Task(
        loss=config.loss,
        channels=dataset.image.channels,
        size_px=config.size_px,
        device=device,
        bf16=config.precision == "bf16",
        coordinates=pixel_coordinates(config.size_px, dataset.image.size_px).to(device),
        normals=normals,
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


def estimate(task: Task, model: torch.nn.Module, anomaly: torch.Tensor) -> torch.Tensor:
    """theta^ float32 [B, K(C+6)+1] for I_ano float32 [B, C, size_px, size_px] in [-1, 1]."""
    rgb = anomaly.expand(-1, 3, -1, -1)  # grey images three times; no copy for RGB
    with torch.autocast(task.device.type, dtype=torch.bfloat16, enabled=task.bf16):
        outputs = model(rgb)
    return heads(outputs.float(), task.channels)


def loss_of(
    task: Task, model: torch.nn.Module, batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch as it came from the loader, and its terms; float32 scalars."""
    images, theta, normal = (part.to(task.device, non_blocking=True) for part in batch)
    anomaly = to_signed(resized(images, task.size_px))  # [B, C, size_px, size_px]
    theta_estimate = estimate(task, model, anomaly)
    if task.loss == "direct":
        return direct_loss(theta_estimate, theta, task.channels)
    assert task.normals is not None
    return indirect_loss(theta_estimate, to_signed(task.normals[normal]), anomaly, task.coordinates)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; TrainerError for a device not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainerError(f"--device {name}: not a device; use auto, cpu or cuda[:N]") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainerError(f"--device {name}: only cpu and cuda are supported")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
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
