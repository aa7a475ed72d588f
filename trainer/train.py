"""Pre-training: one loop from shards to weights.

Read `pretrain` from the top: set-up, loop. On a CPU a run is a pure function of (dataset, config),
and where it stands is one integer, the step: a resumed run is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
import numpy as np
import torch
from tqdm import tqdm

from trainer.artifacts import write_json
from trainer.checkpoint import CheckpointRecord, restore, save_checkpoint
from trainer.choices import Arch, Loss
from trainer.dataset import Dataset, read_dataset
from trainer.errors import TrainerError
from trainer.export import export_backbone
from trainer.loader import batches_from, next_batch
from trainer.metrics import MetricsLog, read_metrics, recent_train_loss
from trainer.models import build_model
from trainer.order import DEFAULT_WINDOW_SHARDS, Order, default_holdout, train_counts
from trainer.pictures import draw_curves
from trainer.run import (
    RUN_FILE,
    Config,
    Duration,
    Run,
    locked,
    new_run,
    previous_run,
    refuse_other_run,
)
from trainer.shards import ShardSamples, index_samples, key_of, read_normals
from trainer.state import training_state
from trainer.task import Task, loss_of, make_task, pick_device, pick_precision

LOG_EVERY_STEPS = 10  # a line of metrics, and the only wait for the device; sane: 10 to 100
CHECKPOINT_EVERY_SECONDS = 300  # what a kill costs at most, where --checkpoint-every is not given


@dataclass(frozen=True)
class Options:
    """The command's options as given; None where the default depends on dataset or machine."""

    data: Path
    out: Path
    loss: Loss
    arch: Arch
    duration: Duration
    size_px: int | None = None
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0
    holdout: int | None = None
    precision: str = "auto"
    device: str = "auto"
    workers: int | None = None
    checkpoint_every: int | None = None


@dataclass
class Progress:
    """Where the run stands, and what has gathered since the last line of metrics."""

    step: int = 0
    seconds: float = 0.0  # training time over all resumes: waits for data, and steps
    saved_step: int = 0
    saved_seconds: float = 0.0
    waited: float = 0.0  # seconds, since the last line
    logged_seconds: float = 0.0
    pending: list[dict[str, torch.Tensor]] = field(default_factory=list)  # a step's loss and terms


@dataclass
class Stop:
    """Which signal asked the run to end; 0 while none has."""

    signal: int = 0


@dataclass(frozen=True)
class Setup:
    """What the loop works with."""

    run: Run
    task: Task
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    samples: ShardSamples
    order: Order
    log: MetricsLog
    resumed: CheckpointRecord | None


def pretrain(options: Options) -> None:
    """Train until the duration is reached or a signal comes; then checkpoint, export, summarise.

    Raises TrainerError in one line for every bad input, for an option that differs from the run
    folder's, and for a loss or gradient that is not finite.
    """
    dataset = read_dataset(options.data)  # a wrong path leaves no run folder behind
    with locked(options.out):
        this = set_up(options, dataset)
        task, model, optimizer = this.task, this.model, this.optimizer
        at = Progress()
        if (old := this.resumed) is not None:
            at = Progress(old.step, old.seconds, old.step, old.seconds, 0.0, old.seconds)
        first_step = at.step
        duration, batch_size = options.duration, options.batch_size
        last_step = duration.last_step(this.order.train_samples, batch_size) or float("inf")
        last_second = 60 * (duration.minutes or float("inf"))

        model.train()
        with (
            closing(this.log),
            stop_signals() as stop,
            progress_bar(this, at, last_step) as bar,
            batches_from(
                this.samples,
                this.order,
                at.step,
                batch_size,
                options.workers,
                task.device.type == "cuda",
            ) as stream,
        ):
            while at.step < last_step and at.seconds < last_second and not stop.signal:
                mark = time.perf_counter()
                batch = next_batch(stream)
                at.waited += time.perf_counter() - mark

                loss, terms = loss_of(task, model, batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = gradient_norm(model)  # nothing waits for the device here
                optimizer.step()

                at.pending.append({"loss": loss.detach(), "grad_norm": norm} | terms)
                at.step += 1
                at.seconds += time.perf_counter() - mark
                bar.update()
                if at.step % LOG_EVERY_STEPS == 0:
                    log_metrics(this, at, bar, last_second)
                if checkpoint_due(at, options.checkpoint_every):
                    save(this, at, stop, bar, options.out)
            if at.step > at.saved_step:
                save(this, at, stop, bar, options.out)
        if stop.signal:
            name = signal.Signals(stop.signal).name
            click.echo(f"Stopped by {name} at step {at.step}; the same command goes on.", err=True)
            raise SystemExit(128 + stop.signal)
        finish(this, at, first_step, options.out)


def set_up(options: Options, dataset: Dataset) -> Setup:
    """Read and verify everything that the loop needs, and go to the newest checkpoint."""
    device = pick_device(options.device)
    before = previous_run(options.out)
    config = config_of(options, dataset, device, before)
    run = new_run(config, dataset, str(options.data.absolute()), options.duration)
    if before is not None:
        refuse_other_run(options.out, before, run)
    samples = ShardSamples(options.data, dataset, index_samples(options.data, dataset))
    normals = None
    if config.loss == "indirect":
        normals = torch.from_numpy(read_normals(options.data, dataset))

    torch.manual_seed(config.seed)
    model = build_model(config.arch, dataset.theta.length)
    model = model.to(device)
    model = model.to(memory_format=torch.channels_last)  # 1.15 times faster
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    resumed = restore(options.out, config, model, optimizer)
    if before is not None and before.versions.get("torch") != run.versions["torch"]:
        click.echo(
            f"Warning: torch was {before.versions.get('torch')}, is {run.versions['torch']}: the "
            "run goes on, but not bit for bit as an uninterrupted one.",
            err=True,
        )
    write_json(options.out / RUN_FILE, run)  # nothing was refused
    return Setup(
        run=run,
        task=make_task(config, dataset, device, normals),
        model=model,
        optimizer=optimizer,
        samples=samples,
        order=Order(
            dataset.order_key,
            config.seed,
            train_counts(np.array([s.samples for s in dataset.shards]), config.holdout),
            config.window_shards,
        ),
        log=MetricsLog(options.out, resumed.metrics_bytes if resumed else 0),
        resumed=resumed,
    )


def config_of(
    options: Options, dataset: Dataset, device: torch.device, before: Run | None
) -> Config:
    """The options with every default filled in; TrainerError when nothing is left to train on.

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
    return Config(
        loss=options.loss,
        arch=options.arch,
        size_px=options.size_px or dataset.image.size_px,
        batch_size=options.batch_size,
        micro_batches=1,
        window_shards=DEFAULT_WINDOW_SHARDS,
        lr=options.lr,
        schedule="constant",
        warmup_steps=0,
        total_steps=None,
        ema=None,
        seed=options.seed,
        holdout=holdout,
        precision=precision,
    )


def gradient_norm(model: torch.nn.Module) -> torch.Tensor:
    """The 2-norm of all gradients, on the device; not finite as soon as one of them is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def log_metrics(this: Setup, at: Progress, bar: Any, last_second: float) -> None:
    """Write the mean of the steps since the last line; TrainerError when one was not finite."""
    if not at.pending:
        return
    names = list(at.pending[0])
    rows = torch.stack([torch.stack(list(step.values())) for step in at.pending]).tolist()
    first = at.step - len(rows)
    for step, row in enumerate(rows, start=first):
        if not np.isfinite(row).all():
            size = this.run.config.batch_size
            keys = [key_of(int(i)) for i in this.order.samples(step * size, (step + 1) * size)]
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            listed = ", ".join(f"{n} {value:.4g}" for n, value in zip(names, row, strict=True))
            batch = ", ".join(keys[:8]) + more
            refuse(at, f"step {step + 1}: not finite ({listed}) for the batch of samples {batch}")
    mean = dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    seconds = at.seconds - at.logged_seconds
    batch_size = this.run.config.batch_size
    images_per_s = len(rows) * batch_size / seconds
    this.log.append(
        "train",
        step=at.step,
        steps=len(rows),
        samples=at.step * batch_size,
        epoch=at.step * batch_size / this.order.train_samples,
        loss=mean.pop("loss"),
        grad_norm=mean.pop("grad_norm"),
        terms=mean,
        lr=this.optimizer.param_groups[0]["lr"],
        images_per_s=images_per_s,
        data_wait=at.waited / seconds,
        waits={"shards": 0.0, "decode": 0.0, "handoff": at.waited / seconds},
        device=1 - at.waited / seconds,
    )
    if last_second < float("inf"):
        bar.total = round(at.step * last_second / at.seconds)  # time left, as far as it can be told
    bar.set_postfix_str(f"loss {rows[-1][0]:.4g}, {images_per_s:.0f} img/s")
    at.pending, at.waited, at.logged_seconds = [], 0.0, at.seconds


def refuse(at: Progress, what: str) -> NoReturn:
    """Stop for a number that is not finite."""
    raise TrainerError(
        f"{what}; the last checkpoint is of step {at.saved_step}: try a lower --lr or "
        "--precision fp32 in a new --out"
    )


def checkpoint_due(at: Progress, every_steps: int | None) -> bool:
    """By steps where --checkpoint-every says so, else by the clock; neither changes the weights."""
    if every_steps is not None:
        return at.step % every_steps == 0
    return at.seconds - at.saved_seconds >= CHECKPOINT_EVERY_SECONDS


def save(this: Setup, at: Progress, stop: Stop, bar: Any, out: Path) -> None:
    """Held-out loss, checkpoint and loss curve; nothing when a loss was not finite."""
    log_metrics(this, at, bar, last_second=float("inf"))
    loss = holdout_loss(this, at, stop)
    if loss is not None:
        samples = at.step * this.run.config.batch_size
        this.log.append("holdout", step=at.step, samples=samples, loss=loss, terms={})
    config = this.run.config
    save_checkpoint(
        out,
        config,
        training_state(this.model, this.optimizer),
        step=at.step,
        samples_seen=at.step * config.batch_size,
        seconds=at.seconds,
        metrics_bytes=this.log.sync(),
    )
    draw_curves(out, f"{config.arch}, L_{config.loss}")
    at.saved_step, at.saved_seconds = at.step, at.seconds


@torch.inference_mode()
def holdout_loss(this: Setup, at: Progress, stop: Stop) -> float | None:
    """Mean loss over the held-out samples, with the running batch norms; None when there is none.

    Also None when a signal came: a farm that asked to stop does not wait for a number. Raises
    TrainerError when it is not finite, as after a step that broke the weights.
    """
    first, end = this.order.train_samples, len(this.samples)
    total = 0.0
    this.model.eval()
    for start in range(first, end, this.run.config.batch_size):
        if stop.signal:
            break
        indices = range(start, min(start + this.run.config.batch_size, end))
        loss, _ = loss_of(this.task, this.model, this.samples.batch(indices))
        total += loss.item() * len(indices)
    this.model.train()
    if stop.signal or first == end:
        return None
    if not np.isfinite(total):
        refuse(at, f"step {at.step}: held-out loss not finite ({total:.4g})")
    return total / (end - first)


@contextmanager
def progress_bar(this: Setup, at: Progress, last_step: float) -> Iterator[Any]:
    """Steps with rate and time left, on a terminal only."""
    total = None if last_step == float("inf") else int(last_step)
    config = this.run.config
    what = f"{config.arch} {config.loss}"
    with tqdm(total=total, initial=at.step, unit="step", desc=what, disable=None) as bar:
        yield bar


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM end the loop after the current step; a second SIGINT at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(this: Setup, at: Progress, first_step: int, out: Path) -> None:
    """Export the backbone and print what the run came to."""
    lines = read_metrics(out)
    train_loss = recent_train_loss(lines)
    # A run that a signal stopped, then asked for no more steps, has no held-out loss of its end.
    held_out = [line for line in lines if line["kind"] == "holdout" and line["step"] == at.step]
    held = held_out[-1]["loss"] if held_out else holdout_loss(this, at, Stop())
    config, minutes = this.run.config, at.seconds / 60
    seen = at.step * config.batch_size
    export_backbone(
        out,
        this.run,
        this.model.state_dict(),
        steps=at.step,
        samples_seen=seen,
        train_samples=this.order.train_samples,
        train_loss=train_loss,
        holdout_loss=held,
    )
    share = sum(line["data_wait"] * line["steps"] for line in lines if line["kind"] == "train")
    click.echo(
        f"Trained {config.arch} with L_{config.loss} at {config.size_px} px, {config.precision}, "
        f"on {this.task.device.type}: {at.step} steps x {config.batch_size} = {seen} samples, "
        f"{seen / this.order.train_samples:.2f} epochs of {this.order.train_samples}"
        f" ({at.step - first_step} steps in this call)."
    )
    click.echo(
        f"{minutes:.1f} minutes of training, {seen / max(at.seconds, 1e-9):.1f} images/s, "
        f"{100 * share / at.step:.1f} % of the time waiting for data."
    )
    click.echo(
        f"Loss over the last steps {train_loss:.4g}, held out "
        f"{'not measured' if held is None else f'{held:.4g} ({config.holdout} samples)'}."
    )
    click.echo(f"Backbone: {out / 'backbone.safetensors'}")
