"""Pre-training: one loop from shards to weights, in as many processes as torchrun starts.

Read `train` from the top: the loop. Where a run stands is one integer, the samples consumed; a
batch is cut into the same parts whoever works on them. So a run is a pure function of (dataset,
config): a resumed run is the uninterrupted one, on a CPU bit for bit, and with another number of
processes to rounding.
"""

from __future__ import annotations

import signal
import time
from contextlib import closing, nullcontext
from inspect import signature
from typing import Any

import click
import torch
from torch.nn.parallel import DistributedDataParallel

from trainer.config import Options
from trainer.dataset import read_dataset
from trainer.feed import Feed, feeding
from trainer.ledger import Indices
from trainer.preflight import eager_where_odd, try_compiled, verdict, wanted, warm_up
from trainer.progress import Progress, log_metrics, progress_bar, progress_of, split_wait, through
from trainer.ranks import Word, joined, summed_gradients, told
from trainer.rundir import run_dir
from trainer.samples import Batch
from trainer.saving import draw_epochs_end, finish, save
from trainer.schedule import decay_at, lr_at
from trainer.setup import Setup, cache_of, set_up, write_run
from trainer.step import batch_samples, padded, weights_of
from trainer.stops import Stop, Stopped, stop_signals
from trainer.storage import open_storage
from trainer.task import losses_of, on_device, wants_cuda

LOG_EVERY_STEPS = 10  # a line of metrics, and the only wait for the device; sane: 10 to 100
CHECKPOINT_EVERY_SECONDS = 300  # what a kill costs at most, where --checkpoint-every is not given
AGREE_SECONDS = 1.0  # how long a process waits for its batch before it asks how the others are


def pretrain(options: Options) -> None:
    """Train until the duration is reached or a signal comes; then checkpoint, export, summarise.

    Raises TrainerError in one line for every bad input, for an option that differs from the run
    folder's, and for a loss or gradient that is not finite.
    """
    at = Progress()
    try:
        with (
            stop_signals() as stop,
            joined(wants_cuda(options.device)) as ranks,
            told(ranks, stop),
        ):
            storage = open_storage(options.data)
            dataset = read_dataset(storage)  # a wrong path leaves no run folder behind
            cache = cache_of(options)
            with run_dir(options.out, cache.folder) if ranks.first else nullcontext() as place:
                this = set_up(options, place, storage, dataset, cache, ranks)
                at = progress_of(this)
                with nullcontext() if this.log is None else closing(this.log):
                    if not through(this, at):
                        train(this, at, options, stop)
                    finish(this, at)
    except Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        where = f" at step {at.saved_step}" if at.saved_step else ""
        click.echo(f"Stopped by {name}{where}; the same command goes on.", err=True)
        raise SystemExit(128 + stopped.signal) from None


def train(this: Setup, at: Progress, options: Options, stop: Stop) -> None:
    """The loop; a signal that came within is raised when its checkpoint is written."""
    model, optimizer, norms = this.model, this.optimizer, this.norms
    ranks, config, end = this.ranks, this.run.config, this.end
    model.train()
    with feeding(this, at, options) as feed, progress_bar(this, at) as bar:
        net: Any = network(this, at, options, feed, stop)
        with stop.notes():
            while at.step < end.step and at.cursor < end.sample:
                mark = time.perf_counter()
                word = at_hand(this, at, feed, stop, options)
                waited = time.perf_counter() - mark
                at.waited += split_wait(waited, feed.seconds)
                if word.signal or word.over:
                    at.seconds += waited
                    stop.signal = word.signal or stop.signal  # one exit code for all processes
                    break  # no process has made anything of its parts

                optimizer.zero_grad(set_to_none=True)
                norms.begin()
                rows, arrived = [], []
                for part, more in feed.take():
                    rows.append(forward_part(this, at, net, part, more))
                    norms.add(len(part.index))
                    arrived.append(part.index.numpy())
                norm = gradient_norm(model)  # nothing waits for the device here
                norms.end(ranks.total, len(rows))
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(config, at.step)
                optimizer.step()
                average(this, at.step)

                before = at.cursor
                commit(this, at, arrived, torch.stack(rows).sum(dim=0), norm)
                feed.node.advance(at.cursor)
                at.seconds += time.perf_counter() - mark
                bar.update()
                if at.step % LOG_EVERY_STEPS == 0:
                    log_metrics(this, at, bar)
                draw_epochs_end(this, at, before)
                if word.due:
                    save(this, at, feed.node, options, stop, bar)
            if at.step > at.saved_step:
                save(this, at, feed.node, options, stop, bar)
            if stop() and this.place is not None and not this.place.settle():
                click.echo(
                    f"Warning: {this.place.folder} alone has this checkpoint: on this machine the "
                    "same command goes on from it.",
                    err=True,
                )
        stop.check()


def forward_part(this: Setup, at: Progress, net: Any, part: Batch, more: bool) -> torch.Tensor:
    """Add a part's gradients, after the last one those of all processes; `more` follow.

    Returns float32 [2 + terms]: what the samples that came weigh together, and the sums of their
    weighted losses and terms. The parts' sums add up to the batch's mean where all came.
    """
    task, config = this.task, this.run.config
    batch = on_device(task, padded(part))
    weights = weights_of(len(batch.normal), part, config.batch_size, task.device)
    sync = net.no_sync() if more and this.ranks.world > 1 else nullcontext()
    with sync, eager_where_odd(at.compiled, config, len(weights)):
        losses, terms = losses_of(task, net, batch)  # float32 [rows] each
        loss = weights @ losses
        loss.backward()
    return torch.stack([weights.sum(), loss.detach(), *(weights @ t for t in terms.values())])


def at_hand(this: Setup, at: Progress, feed: Feed, stop: Stop, options: Options) -> Word:
    """Wait until every process has its parts, or one wants to stop; all hear the same word.

    A process that waits for long asks the others every second, so that none of them is deaf to a
    signal, or to the end of the minutes, because another one's storage is slow. A run by minutes
    makes a step at least.
    """
    mark = time.perf_counter()
    while True:
        ready = feed.fill(AGREE_SECONDS, stop)
        seconds = at.seconds + time.perf_counter() - mark
        word = this.ranks.agree(
            Word(
                signal=stop.signal,
                waiting=not ready,
                over=this.ranks.first and at.step > 0 and seconds >= this.end.seconds,
                due=checkpoint_due(this, at, seconds, options.checkpoint_every),
            )
        )
        if word.signal or word.over or not word.waiting:
            return word


def checkpoint_due(this: Setup, at: Progress, seconds: float, every_steps: int | None) -> bool:
    """By steps where --checkpoint-every says so, else by the first process's training `seconds`.

    Neither changes the weights.
    """
    if every_steps is not None:
        return (at.step + 1) % every_steps == 0
    return this.ranks.first and seconds - at.saved_seconds >= CHECKPOINT_EVERY_SECONDS


def gradient_norm(model: torch.nn.Module) -> torch.Tensor:
    """The 2-norm of all gradients, on the device; not finite as soon as one of them is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def average(this: Setup, step: int) -> None:
    """Move the averaged weights and statistics towards the model's, after step count `step`."""
    if this.run.config.ema is None:
        return
    torch._foreach_lerp_(*this.pairs.floats, 1 - decay_at(this.run.config.ema, step))
    torch._foreach_copy_(*this.pairs.counts)


def commit(
    this: Setup, at: Progress, arrived: list[Indices], row: torch.Tensor, norm: torch.Tensor
) -> None:
    """Count a step that was made: its samples in the ledger, its numbers for the next line."""
    samples = batch_samples(this.cut, this.end, at.cursor)
    for (start, stop), indices in zip(this.cut.stretches(at.cursor, samples), arrived, strict=True):
        this.ledger.add(start, this.order.samples(start, stop), indices)
    at.cursors.append(at.cursor)
    at.rows.append(row)
    at.norms.append(norm)
    at.step += 1
    at.cursor += samples


def network(this: Setup, at: Progress, options: Options, feed: Feed, stop: Stop) -> torch.nn.Module:
    """The model as the loop calls it: compiled where that was chosen, its gradients summed."""
    net = chosen(this, at, options, feed, stop)
    if this.ranks.world == 1:
        return net
    on = this.task.device
    known = signature(DistributedDataParallel).parameters  # newer torch has another name
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    parallel = DistributedDataParallel(
        net,
        device_ids=[on] if on.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{buffers: False},  # type: ignore[arg-type]  # norms.py brings them on
    )
    parallel.register_comm_hook(None, summed_gradients)
    return parallel


def chosen(this: Setup, at: Progress, options: Options, feed: Feed, stop: Stop) -> torch.nn.Module:
    """The model, or torch.compile's of it: as run.json says, else as the preflight finds.

    It takes the first part that arrives for a look; the loop trains on it all the same.
    """
    task, model, before = this.task, this.model, this.run.compiled
    if before is False or not (before or wanted(options.compile, task.device)):
        return model
    compiled: torch.nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    if at_hand(this, at, feed, stop, options).over:
        return model
    part = on_device(task, padded(feed.parts[0]))
    if before:
        at.compiled = True
        warm_up(task, model, compiled, part)
        return compiled
    found = try_compiled(task, model, compiled, part)
    numbers = (float(not found.right), found.eager_s, found.compiled_s)
    wrong, eager_s, compiled_s = this.ranks.largest(numbers)
    at.compiled, line = verdict(not wrong, eager_s, compiled_s)
    if this.place is not None:
        click.echo(line)
        write_run(this.place, this.run.model_copy(update={"compiled": at.compiled}))
    return compiled if at.compiled else model
