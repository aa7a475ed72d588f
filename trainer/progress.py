"""Where a run stands: steps, samples, seconds and what was waited for; its lines of metrics."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from trainer.errors import TrainerError
from trainer.pictures import Shown
from trainer.samples import Batch
from trainer.schedule import last_step
from trainer.setup import Setup
from trainer.task import TERMS

WAITS = ("shards", "decode", "handoff")


@dataclass
class Progress:
    """Where the run stands, and what has gathered since the last line of metrics."""

    step: int = 0
    cursor: int = 0  # samples consumed, the position in the stream
    seconds: float = 0.0  # training time over all resumes: waits for data, and steps
    first_step: int = 0  # of this call
    saved_step: int = 0
    saved_seconds: float = 0.0
    logged_seconds: float = 0.0
    logged_cursor: int = 0
    waited: np.ndarray[Any, np.dtype[np.float64]] = field(
        default_factory=lambda: np.zeros(len(WAITS))
    )
    rows: list[torch.Tensor] = field(default_factory=list)  # a step's, as forward_part's
    norms: list[torch.Tensor] = field(default_factory=list)  # a step's gradient norm
    cursors: list[int] = field(default_factory=list)  # where the steps began
    quarantined: list[str] = field(default_factory=list)
    compiled: bool = False
    held_out: list[Batch] | None = None  # this process's share, where it is kept
    bad_held_out: set[str] = field(default_factory=set)  # shards without which it goes
    figure5: Shown | None = None  # the first process's, once it was read


def progress_of(this: Setup) -> Progress:
    """Where the checkpoint was taken, or the start."""
    old = this.resumed
    if old is None:
        return Progress()
    return Progress(
        step=old.step,
        cursor=old.samples_seen,
        seconds=old.seconds,
        first_step=old.step,
        saved_step=old.step,
        saved_seconds=old.seconds,
        logged_seconds=old.seconds,
        logged_cursor=old.samples_seen,
        quarantined=list(old.quarantined),
    )


def through(this: Setup, at: Progress) -> bool:
    """Whether the run has reached its end."""
    end = this.end
    return at.step >= end.step or at.cursor >= end.sample or at.seconds >= end.seconds


def split_wait(waited: float, seconds: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What the seconds that a batch was waited for went to: [3], as WAITS names them.

    `seconds` [3] is what its maker spent on shards, reading and decoding. The wait is laid first
    to reading and decoding, then to shards; what is left went to the hand-off.

    >>> split_wait(1.0, torch.tensor([5.0, 0.25, 0.25])).tolist()
    [0.5, 0.5, 0.0]
    >>> split_wait(1.0, torch.tensor([0.0, 0.25, 0.25])).tolist()
    [0.0, 0.5, 0.5]
    """
    decode = min(waited, float(seconds[1:].sum()))
    shards = min(waited - decode, float(seconds[0]))
    return np.array([shards, decode, waited - decode - shards])


def log_metrics(this: Setup, at: Progress, bar: Any = None) -> None:
    """Write the mean of the steps since the last line; TrainerError when one was not finite.

    All processes call it at the same step; the first one writes.
    """
    if not at.rows:
        return
    # The only wait for the device: rows are sums over own parts, the norms everybody's.
    rows = this.ranks.total(torch.stack(at.rows)).cpu().double().numpy()
    norms = torch.stack(at.norms).tolist()
    names = ["loss", *TERMS[this.task.loss]]
    weights = rows[:, 0]  # below 1 where a step ends the run, or shards were left out
    means = rows[:, 1:] / np.where(weights > 0, weights, 1)[:, None]
    for number, (row, norm) in enumerate(zip(means.tolist(), norms, strict=True)):
        if not np.isfinite([*row, norm]).all():
            refuse_step(this, at, number, [*names, "grad_norm"], [*row, norm])
    seconds = max(at.seconds - at.logged_seconds, 1e-9)
    images_per_s = (at.cursor - at.logged_cursor) / seconds
    if this.log is not None and weights.any():  # a sample came
        mean = dict(zip(names, (rows[:, 1:].sum(axis=0) / weights.sum()).tolist(), strict=True))
        this.log.append(
            "train",
            step=at.step,
            steps=len(rows),
            samples=at.cursor,
            epoch=at.cursor / this.order.train_samples,
            loss=mean.pop("loss"),
            grad_norm=float(np.mean(norms)),
            terms=mean,
            lr=this.optimizer.param_groups[0]["lr"],
            images_per_s=images_per_s,
            data_wait=float(at.waited.sum()) / seconds,
            waits=dict(zip(WAITS, (at.waited / seconds).tolist(), strict=True)),
            device=max(0.0, 1 - float(at.waited.sum()) / seconds),
        )
    if bar is not None:
        if this.end.seconds < float("inf"):
            bar.total = round(at.step * this.end.seconds / at.seconds)  # as far as can be told
        bar.set_postfix_str(f"loss {means[-1, 0]:.4g}, {images_per_s:.0f} img/s")
    at.rows, at.norms, at.cursors, at.waited = [], [], [], np.zeros(len(WAITS))
    at.logged_seconds, at.logged_cursor = at.seconds, at.cursor


def refuse_step(
    this: Setup, at: Progress, number: int, names: list[str], values: list[float]
) -> NoReturn:
    """Stop for a step, the `number`-th since the last line, whose numbers are not finite."""
    stops = [*at.cursors[1:], at.cursor]
    indices = this.order.samples(at.cursors[number], stops[number]).tolist()
    keys = [f"{index:09d}" for index in indices]
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    listed = ", ".join(f"{n} {value:.4g}" for n, value in zip(names, values, strict=True))
    step = at.step - len(at.rows) + number + 1
    refuse(
        at,
        f"step {step}: not finite ({listed}) for the batch of samples {', '.join(keys[:8])}{more}",
    )


def refuse(at: Progress, what: str) -> NoReturn:
    """Stop for a number that is not finite."""
    raise TrainerError(
        f"{what}; the last checkpoint is of step {at.saved_step}: try a lower --lr or "
        "--precision fp32 in a new --out"
    )


@contextmanager
def progress_bar(this: Setup, at: Progress) -> Iterator[Any]:
    """Steps with rate and time left, on a terminal only, of the first process only."""
    config = this.run.config
    total = last_step(this.end, config.batch_size, at.step, at.cursor)
    what = f"{config.arch} {config.loss}"
    quiet = None if this.ranks.first else True
    with tqdm(total=total, initial=at.step, unit="step", desc=what, disable=quiet) as bar:
        yield bar


def memory_line(device: torch.device) -> str:
    """Peak memory of this process, of the largest of its ended children, and on the device."""
    here, child = (
        resource.getrusage(who).ru_maxrss * 1024 / 1e9
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    line = f"Peak memory: {here:.2f} GB in the process, {child:.2f} GB in the largest child"
    if device.type == "cuda":
        line += f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the device"
    return line + "."
