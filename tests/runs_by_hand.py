"""A small run for tests of what is written: its description, a network of a few weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from trainer.checkpoint import CheckpointRecord, EpochLedger, save_checkpoint
from trainer.run import Config, DatasetRef, Duration, Run
from trainer.state import training_state


def config_by_hand(**changes: object) -> Config:
    """ResNet-18, L_direct, 32 px, batches of 4 in 2 parts."""
    values: dict[str, object] = {
        "loss": "direct", "arch": "resnet18", "size_px": 32, "batch_size": 4, "micro_batches": 2,
        "window_shards": 16, "lr": 0.001, "schedule": "constant", "warmup_steps": 0,
        "total_steps": None, "ema": None, "seed": 0, "holdout": 1, "precision": "fp32",
    }  # fmt: skip
    return Config(**{**values, **changes})  # type: ignore[arg-type]


def run_by_hand(**changes: object) -> Run:
    """A run on 9 samples, one of them held out, that ends after 6 steps."""
    return Run(
        format="semiformula-run", format_version=2, trainer_version="0.1.0",
        config=config_by_hand(**changes),
        dataset=DatasetRef(
            name="by-hand", contents="images", content_sha256="1" * 64, recipe_sha256="2" * 64,
            samples=9, size_px=32, channels=3, components=2, classes=None,
        ),
        data="data",
        duration=Duration(steps=6),
        compiled=None,
        versions={},
    )  # fmt: skip


class Trained:
    """A network of two layers, its optimizer, and averaged weights if wanted."""

    def __init__(self, seed: int = 0, ema: bool = False, **adam: bool) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01, **adam)
        self.ema: dict[str, torch.Tensor] | None = None
        if ema:
            self.ema = {k: v.clone() for k, v in self.model.state_dict().items()}

    def step(self) -> None:
        """One step on numbers from torch's generator."""
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(2, 3, 8, 8)).square().mean() * torch.rand(())
        loss.backward()
        self.optimizer.step()
        for name, tensor in (self.ema or {}).items():
            if tensor.is_floating_point():
                tensor.lerp_(self.model.state_dict()[name], 0.1)

    def state(self) -> dict[str, torch.Tensor]:
        return training_state(self.model, self.optimizer, self.ema)


def save_by_hand(
    out: Path, trained: Trained, step: int, keep: int = 2, metrics_bytes: int = 0
) -> CheckpointRecord:
    """A checkpoint of a step, with all that goes into its record."""
    return save_checkpoint(
        out,
        config_by_hand(),
        trained.state(),
        step=step,
        samples_seen=4 * step,
        seconds=step / 2,
        metrics_bytes=metrics_bytes,
        ledger=[EpochLedger(epoch=0, samples=4 * step, limbs=[1, 2, 3, 2**64 - 1])],
        quarantined=["data/train-00003-of-00004.tar"],
        keep=keep,
    )
