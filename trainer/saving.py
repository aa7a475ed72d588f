"""What a run leaves: held-out loss, checkpoint, ledger, and at the end backbone and summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import click
import numpy as np
import torch

from trainer.checkpoint import save_checkpoint
from trainer.config import Options
from trainer.errors import TrainerError
from trainer.export import export_backbone
from trainer.index import BadShard
from trainer.ledger import EpochLine, check_lines, epoch_lines, records_of, write_ledger
from trainer.metrics import read_metrics, recent_train_loss
from trainer.node import Node
from trainer.pictures import draw_curves, draw_epoch, read_shown, title_of
from trainer.progress import WAITS, Progress, log_metrics, memory_line, refuse
from trainer.ranks import Word
from trainer.samples import Batch, samples_now
from trainer.setup import Setup
from trainer.state import training_state
from trainer.stops import Stop
from trainer.task import TERMS, losses_of, on_device

KEPT_BYTES = 256 * 10**6  # of decoded held-out samples; more are read again at each evaluation


def save(this: Setup, at: Progress, node: Node, options: Options, stop: Stop, bar: Any) -> None:
    """Held-out loss, checkpoint, ledger and curves; nothing when a loss was not finite.

    All processes call it at the same step; the first one writes. Raises TrainerError where
    held-out samples cannot be read, when the checkpoint is written.
    """
    log_metrics(this, at, bar)
    held, fault = holdout_loss(this, at, stop)
    ledger = this.ledger
    pending = torch.from_numpy(ledger.pending(at.cursor))
    ledger.settle(at.cursor, this.ranks.total(pending).numpy())
    lines = epoch_lines(ledger, at.cursor)
    at.quarantined = left_out(this, at, node)
    check_lines(lines, at.quarantined)
    write_checkpoint(this, at, options, held, lines)
    at.saved_step, at.saved_seconds = at.step, at.seconds
    if fault is not None:
        raise TrainerError(f"{fault.message}; the checkpoint of step {at.step} is written")


def write_checkpoint(
    this: Setup,
    at: Progress,
    options: Options,
    held: list[float] | None,
    lines: Sequence[EpochLine],
) -> None:
    """Write what `save` has gathered; the first process alone."""
    if this.log is None or this.place is None:
        return
    if held is not None:
        loss, *terms = held
        named = dict(zip(TERMS[this.task.loss], terms, strict=True))
        this.log.append("holdout", step=at.step, samples=at.cursor, loss=loss, terms=named)
    averaged = None if this.averaged is None else this.averaged.state_dict()
    save_checkpoint(
        this.place.folder,
        this.run.config,
        training_state(this.model, this.optimizer, averaged),
        step=at.step,
        samples_seen=at.cursor,
        seconds=at.seconds,
        metrics_bytes=this.log.sync(),
        ledger=records_of(this.ledger),
        quarantined=at.quarantined,
        keep=options.keep,
    )
    out = this.place.folder
    write_ledger(out, this.order, lines, at.quarantined)
    draw_curves(out, title_of(this.run))
    this.place.push()


def draw_epochs_end(this: Setup, at: Progress, before: int) -> None:
    """Figure 5 where the step from stream position `before` has ended an epoch."""
    epoch = at.cursor // this.order.train_samples
    if this.place is None or this.task.loss == "cross_entropy":
        return
    if epoch == before // this.order.train_samples:
        return
    if at.figure5 is None:
        left_out = partial(leave_out, this, at)
        holdout = this.run.config.holdout
        try:
            at.figure5 = read_shown(this.storage, this.cache, this.dataset, holdout, left_out)
        except TrainerError as error:  # no figure is worth the steps since the last checkpoint
            click.echo(f"Warning: {error.message}; no figure5 of epoch {epoch}.", err=True)
            return
    if len(at.figure5.images):
        draw_epoch(this.place.folder, this.run, epoch, at.step, this.task, this.shown, at.figure5)


def left_out(this: Setup, at: Progress, node: Node) -> list[str]:
    """The shards that were quarantined so far on any node, in the order of dataset.json."""
    names = [shard.name for shard in this.dataset.shards]
    here = set(node.quarantined()) | set(at.quarantined)
    found = this.ranks.largest([float(name in here) for name in names])
    return [name for name, bad in zip(names, found, strict=True) if bad]


def held_out(this: Setup, at: Progress) -> Iterator[Batch]:
    """This process's share of the held-out samples, as many batches as every other has.

    Each shard is verified once; what takes little memory is kept for the next time.
    """
    if at.held_out is not None:
        yield from at.held_out
        return
    first, end = this.order.train_samples, this.dataset.samples
    size, rank, world = this.run.config.batch_size, this.ranks.rank, this.ranks.world
    shares = []
    for start in range(first, end, size):
        count = min(size, end - start)
        shares.append(range(start + rank * count // world, start + (rank + 1) * count // world))
    left_out = partial(leave_out, this, at)
    with samples_now(this.storage, this.cache, this.dataset, left_out) as samples:
        keep = samples.bytes_of(sum(map(len, shares))) <= KEPT_BYTES
        kept = []
        for rows in shares:
            batch = samples.batch(rows)
            if keep:
                kept.append(batch)
            yield batch
    at.held_out = kept if keep else None


def leave_out(this: Setup, at: Progress, shard: int, error: BadShard) -> None:
    """Do without the held-out samples of a bad shard where --max-bad-ratio allows it."""
    name, samples = this.dataset.shards[shard].name, this.dataset.samples
    bad = {name} | at.bad_held_out | set(at.quarantined)
    without = sum(record.samples for record in this.dataset.shards if record.name in bad)
    if without > this.max_bad_ratio * samples:
        more = (
            f"; with it {without} of {samples} samples would be left out, more than "
            f"--max-bad-ratio {this.max_bad_ratio:g} allows"
        )
        raise TrainerError(error.message + (more if this.max_bad_ratio else "")) from None
    if name not in at.bad_held_out:
        at.bad_held_out.add(name)
        click.echo(
            f"Warning: {error.message}; its held-out samples are left out: {without} of {samples} "
            "samples so far",
            err=True,
        )


@torch.inference_mode()
def holdout_loss(
    this: Setup, at: Progress, stop: Stop
) -> tuple[list[float] | None, TrainerError | None]:
    """Mean loss and terms over the held-out samples that are good; None when there is none.

    Taken with the running batch norms. Also None when a signal came to any process: a farm that
    asked to stop does not wait for a number; and when any could not read its samples: the error is
    that process's. Raises TrainerError when a mean is not finite, as after a step that broke the
    weights.
    """
    if this.dataset.samples == this.order.train_samples:
        return None, None
    if this.ranks.agree(Word(signal=stop.signal)).signal:  # before anything is read
        return None, None
    model, training = this.shown, this.shown.training
    sums = torch.zeros(2 + len(TERMS[this.task.loss]), dtype=torch.float64)
    batches, fault = held_out(this, at), None
    model.eval()
    while True:
        batch = None
        try:
            batch = next(batches, None)
        except TrainerError as error:
            fault = error
        word = this.ranks.agree(Word(signal=stop.signal, over=fault is not None))
        if word.signal or word.over or batch is None:
            break
        if len(batch.index):
            losses, terms = losses_of(this.task, model, on_device(this.task, batch))
            sums[:-1] += torch.stack([part.sum() for part in (losses, *terms.values())]).cpu()
            sums[-1] += len(batch.index)
    model.train(training)
    if word.signal:
        return None, None
    if word.over:
        return None, fault
    *totals, count = this.ranks.total(sums).tolist()
    if not count:
        return None, None
    means = [total / count for total in totals]
    if not np.isfinite(means).all():
        refuse(at, f"step {at.step}: held-out loss not finite ({means[0]:.4g})")
    return means, None


def finish(this: Setup, at: Progress) -> None:
    """Export the backbone and print what the run came to."""
    held = None
    place = this.place
    lines = [] if place is None else read_metrics(place.folder)
    # A run that a signal stopped, then asked for no more steps, has no held-out loss of its end.
    known = [line for line in lines if (line["kind"], line["step"]) == ("holdout", at.step)]
    if this.ranks.agree(Word(due=int(place is not None and not known))).due:
        held, fault = holdout_loss(this, at, Stop())
        if fault is not None:
            raise fault
        this.ranks.agree(Word())  # one that failed tells so now
    if place is None:
        return
    held_line = known[-1] if known else None
    if held is not None:
        loss, *terms = held
        held_line = {"loss": loss, "terms": dict(zip(TERMS[this.task.loss], terms, strict=True))}
    export_backbone(
        place.folder,
        this.run,
        this.shown.state_dict(),
        steps=at.step,
        samples_seen=at.cursor,
        train_samples=this.order.train_samples,
        processes=this.ranks.world,
        quarantined=len(at.quarantined),
        train_loss=recent_train_loss(lines),
        holdout_loss=None if held_line is None else held_line["loss"],
    )
    place.finish()
    summarise(this, at, lines, held_line)


def summarise(
    this: Setup, at: Progress, lines: list[dict[str, Any]], held: dict[str, Any] | None
) -> None:
    """Print what was trained, how well and fast, what was waited for, and what the ledger says."""
    config, size = this.run.config, this.order.train_samples
    processes = f" x {this.ranks.world}" if this.ranks.world > 1 else ""
    click.echo(
        f"Trained {config.arch} with L_{config.loss} at {config.size_px} px, {config.precision}, "
        f"on {this.task.device.type}{processes}: {at.step} steps of {config.batch_size}, "
        f"{at.cursor} samples, {at.cursor / size:.2f} epochs of {size} "
        f"({at.step - at.first_step} steps in this call)."
    )
    if held is not None:
        right = held["terms"].get("accuracy")
        accuracy = "" if right is None else f", accuracy {100 * right:.1f} %"
        click.echo(f"Held-out loss {held['loss']:.4g}{accuracy}.")
    train = [line for line in lines if line["kind"] == "train"]
    shares = waited_percent(train)
    causes = ", ".join(f"{name.replace('_', '-')} {share:.1f} %" for name, share in shares.items())
    click.echo(
        f"{at.seconds / 60:.1f} minutes of training, "
        f"{at.cursor / max(at.seconds, 1e-9):.1f} images/s; the device waited "
        f"{sum(shares.values()):.1f} % of the time for data: {causes}."
    )
    click.echo(ledger_line(this, at))
    click.echo(memory_line(this.task.device))


def waited_percent(train: list[dict[str, Any]]) -> dict[str, float]:
    """What the lines' waits come to, in percent of the seconds that their steps took.

    >>> half = {"shards": 0.5, "decode": 0.0, "handoff": 0.0}
    >>> slow = {"samples": 10, "images_per_s": 1.0, "waits": half}
    >>> fast = {"samples": 100, "images_per_s": 9.0, "waits": dict.fromkeys(half, 0.0)}
    >>> waited_percent([slow, fast])["shards"]
    25.0
    """
    before = [0, *(line["samples"] for line in train)]
    seconds = [
        (line["samples"] - start) / line["images_per_s"]
        for line, start in zip(train, before, strict=False)
    ]
    total = max(sum(seconds), 1e-9)
    return {
        name: 100
        * sum(line["waits"][name] * s for line, s in zip(train, seconds, strict=True))
        / total
        for name in WAITS
    }


def ledger_line(this: Setup, at: Progress) -> str:
    """Whether every sample was trained on once."""
    lines = epoch_lines(this.ledger, at.cursor)
    missing = sum(line.expected_samples - line.samples for line in lines)
    if not missing and not at.quarantined:
        return f"Ledger: {at.cursor} samples, each once an epoch; no shard was left out."
    shards = ", ".join(at.quarantined)
    return f"Ledger: {missing} of {at.cursor} samples missing; left out as bad: {shards}."
