"""The command's options, and the configuration of a run that they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.artifacts import sha256_of_file
from trainer.choices import Arch, Components, Loss, Matching, Schedule
from trainer.dataset import Dataset
from trainer.errors import TrainerError
from trainer.order import DEFAULT_WINDOW_SHARDS, default_holdout
from trainer.run import RUN_FILE, Config, Duration, Run
from trainer.schedule import end_of, last_step
from trainer.task import pick_precision


@dataclass(frozen=True)
class Options:
    """The command's options as given; None where the default depends on dataset or machine."""

    data: str
    out: str
    loss: Loss
    arch: Arch
    duration: Duration
    matching: Matching = "nearest"
    components: Components = "all"
    init: Path | None = None
    size_px: int | None = None
    batch_size: int = 64
    micro_batches: int | None = None
    window_shards: int = DEFAULT_WINDOW_SHARDS
    lr: float = 3e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    ema: float | None = None
    seed: int = 0
    holdout: int | None = None
    precision: str = "auto"
    device: str = "auto"
    compile: str = "auto"
    workers: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    tensorboard: bool = False
    cache: Path | None = None
    cache_bytes: int | None = None
    decoded_bytes: int = 0
    max_bad_ratio: float = 0.0


def config_of(
    options: Options, dataset: Dataset, device: torch.device, world: int, before: Run | None
) -> Config:
    """The options with every default filled in; TrainerError where they do not fit together.

    Where the machine decides, a resumed run keeps what the first machine decided.
    """
    precision = options.precision
    if precision == "auto":
        precision = before.config.precision if before else pick_precision(device)
    holdout = default_holdout(dataset.samples) if options.holdout is None else options.holdout
    if holdout >= dataset.samples:
        raise TrainerError(
            f"--holdout {holdout}: of {dataset.samples} samples none is left to train on"
        )
    refuse_loss(options, dataset)
    refuse_init(options, dataset)
    return Config(
        loss=options.loss,
        matching=options.matching,
        components=options.components,
        arch=options.arch,
        init_sha256=None if options.init is None else sha256_of_file(options.init),
        size_px=options.size_px or dataset.image.size_px,
        batch_size=options.batch_size,
        micro_batches=micro_batches(options, world, before),
        window_shards=options.window_shards,
        lr=options.lr,
        schedule=options.schedule,
        warmup_steps=options.warmup_steps,
        total_steps=total_steps(options, dataset.samples - holdout),
        ema=options.ema,
        seed=options.seed,
        holdout=holdout,
        precision=precision,
    )


def total_steps(options: Options, train_samples: int) -> int | None:
    """Where a cosine ends; None for a constant rate."""
    if options.schedule == "constant":
        return None
    steps = last_step(end_of(options.duration, train_samples), options.batch_size)
    if steps is None:
        raise TrainerError("--schedule cosine: its end must be known; give --epochs or --steps")
    if options.warmup_steps >= steps:
        raise TrainerError(
            f"--warmup-steps {options.warmup_steps}: the cosine ends after {steps} steps; give "
            "fewer, or a longer run"
        )
    return steps


def micro_batches(options: Options, world: int, before: Run | None) -> int:
    """Into how many parts a batch is cut; by default, one a process."""
    parts = options.micro_batches
    if parts is None:
        parts = before.config.micro_batches if before else world
    if parts > options.batch_size:
        what, less = f"--micro-batches {parts}", "give fewer"
        if options.micro_batches is None:
            what = f"{RUN_FILE} has {parts} micro-batches" if before else f"{parts} processes"
            less = "give another --out" if before else "start fewer"
        raise TrainerError(
            f"{what}: a batch of {options.batch_size} cannot be cut so often; {less}, or a larger "
            "--batch-size"
        )
    return parts


def refuse_loss(options: Options, dataset: Dataset) -> None:
    """TrainerError for a task without answers in the dataset, and for options of other losses."""
    labelled = dataset.contents == "labels"
    if (options.loss == "cross_entropy") != labelled:
        holds, task = ("classes", "classify") if labelled else ("parameters", "parameters")
        raise TrainerError(f"--data: the dataset holds {holds}; train on it with --task {task}")
    if options.loss in ("direct", "sum"):
        return
    for name, value, default in (
        ("--matching", options.matching, "nearest"),
        ("--components", options.components, "all"),
    ):
        if value != default:
            raise TrainerError(f"{name} {value}: of --loss direct or sum alone")


def refuse_init(options: Options, dataset: Dataset) -> None:
    """TrainerError for first weights that are not there, or cannot be recentred."""
    if options.init is None:
        return
    if not options.init.is_file():
        raise TrainerError(f"--init {options.init}: no such file; give safetensors weights")
    if dataset.contents == "labels":
        raise TrainerError(
            f"--init {options.init}: a labelled dataset keeps no normals to recentre batch norms "
            "on; train from scratch"
        )
