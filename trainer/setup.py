"""From the command's options to everything that the loop works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import click
import numpy as np
import torch

from trainer.artifacts import write_json
from trainer.cache import Cache, default_bytes, default_folder
from trainer.checkpoint import CheckpointRecord, restore
from trainer.config import Options, config_of
from trainer.dataset import Dataset
from trainer.errors import TrainerError
from trainer.initial import RECENTRE_IMAGES, begin_with, recentre, some_of
from trainer.ledger import Ledger, epoch_lines, ledger_from, write_ledger
from trainer.metrics import MetricsLog
from trainer.models import build_model
from trainer.norms import Norms, norms_of
from trainer.order import Order, train_counts
from trainer.ranks import Ranks
from trainer.run import (
    RUN_FILE,
    Config,
    Run,
    new_run,
    previous_run,
    refuse_other_run,
)
from trainer.rundir import RunDir
from trainer.schedule import End, end_of
from trainer.shards import read_normals
from trainer.step import Cut, own_parts
from trainer.storage import Storage, is_remote, local_path
from trainer.task import Task, make_task, needs_normals, pick_device

Tensors = list[torch.Tensor]


class Pairs(NamedTuple):
    """The averaged weights' tensors, and the model's that they follow, in the same order."""

    floats: tuple[Tensors, Tensors]  # weights and running statistics
    counts: tuple[Tensors, Tensors]  # num_batches_tracked


@dataclass(frozen=True)
class Setup:
    """What the loop works with."""

    ranks: Ranks
    place: RunDir | None  # the run folder; the first process's alone
    run: Run
    storage: Storage
    cache: Cache
    dataset: Dataset
    order: Order
    cut: Cut
    end: End
    task: Task
    model: torch.nn.Module
    averaged: torch.nn.Module | None  # --ema
    pairs: Pairs  # of both, empty without --ema
    optimizer: torch.optim.Optimizer
    norms: Norms
    ledger: Ledger
    log: MetricsLog | None  # the first process's alone
    resumed: CheckpointRecord | None
    max_bad_ratio: float

    @property
    def shown(self) -> torch.nn.Module:
        """The weights that are evaluated and exported."""
        return self.model if self.averaged is None else self.averaged


def set_up(
    options: Options,
    place: RunDir | None,
    storage: Storage,
    dataset: Dataset,
    cache: Cache,
    ranks: Ranks,
) -> Setup:
    """Read and verify everything that the loop needs, and go to the newest checkpoint."""
    device = pick_device(options.device, ranks)
    run = described(options, place, dataset, device, ranks)
    config = run.config
    order = order_of(dataset, config)
    torch.manual_seed(config.seed)
    model = network(config, dataset, device)
    if options.init is not None:
        begin_with(model, config.arch, options.init)
    averaged = None
    if config.ema is not None:
        averaged = network(config, dataset, device)
        averaged.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    resumed = restored(place, config, model, optimizer, averaged, ranks)
    normals = None
    if needs_normals(config.loss, dataset):
        normals = torch.from_numpy(read_normals(storage, cache, dataset))
    task = make_task(config, dataset, device, normals)
    if options.init is not None and resumed is None:
        table = read_normals(storage, cache, dataset) if normals is None else normals.numpy()
        recentre(task, model, torch.from_numpy(some_of(table, RECENTRE_IMAGES)))
        ranks.copy_first(list(model.state_dict().values()))
        if averaged is not None:
            averaged.load_state_dict(model.state_dict())
    ledger = ledger_from(resumed, order.train_samples)
    log = None
    if place is not None:  # nothing was refused
        log = opened(place, run, order, ledger, resumed, options.tensorboard)
    return Setup(
        ranks=ranks,
        place=place,
        run=run,
        storage=storage,
        cache=cache,
        dataset=dataset,
        order=order,
        cut=Cut(
            config.batch_size,
            config.micro_batches,
            own_parts(ranks.rank, ranks.world, config.micro_batches),
        ),
        end=end_of(options.duration, order.train_samples),
        task=task,
        model=model,
        averaged=averaged,
        pairs=pairs_of(averaged, model),
        optimizer=optimizer,
        norms=norms_of(model),
        ledger=ledger,
        log=log,
        resumed=resumed,
        max_bad_ratio=options.max_bad_ratio,
    )


def network(config: Config, dataset: Dataset, device: torch.device) -> torch.nn.Module:
    """A network with weights from torch's generator."""
    model = build_model(config.arch, outputs_of(dataset)).to(device)
    return model.to(memory_format=torch.channels_last)  # 1.15 times faster


def opened(
    place: RunDir,
    run: Run,
    order: Order,
    ledger: Ledger,
    resumed: CheckpointRecord | None,
    tensorboard: bool,
) -> MetricsLog:
    """The run folder's files as they were at the checkpoint, and its log."""
    write_run(place, run)
    if resumed is not None:  # the newest may have been damaged, and its ledger with it
        lines = epoch_lines(ledger, resumed.samples_seen)
        write_ledger(place.folder, order, lines, resumed.quarantined)
    return MetricsLog(place.folder, resumed.metrics_bytes if resumed else 0, tensorboard)


def pairs_of(averaged: torch.nn.Module | None, model: torch.nn.Module) -> Pairs:
    """The tensors of both state dicts; they stay where they are for the life of the modules."""
    pairs = Pairs(([], []), ([], []))
    if averaged is not None:
        for old, new in zip(
            averaged.state_dict().values(), model.state_dict().values(), strict=True
        ):
            kind = pairs.floats if new.is_floating_point() else pairs.counts
            kind[0].append(old)
            kind[1].append(new)
    return pairs


def described(
    options: Options,
    place: RunDir | None,
    dataset: Dataset,
    device: torch.device,
    ranks: Ranks,
) -> Run:
    """The run, as the first process describes it to all; TrainerError where it is another."""
    told = None
    if place is not None:
        before = previous_run(place.folder)
        config = config_of(options, dataset, device, ranks.world, before)
        data = options.data if is_remote(options.data) else str(local_path(options.data).absolute())
        compiled = before.compiled if before else None
        run = new_run(config, dataset, data, options.duration, compiled)
        if before is not None:
            refuse_other_run(place.folder, before, run)
            warn_of_torch(before, run)
        told = run.model_dump_json()
    run = Run.model_validate_json(ranks.share(told))
    if ranks.world > run.config.micro_batches:
        raise TrainerError(
            f"{ranks.world} processes for {run.config.micro_batches} parts of a batch: each needs "
            "one; start fewer processes, or a new --out with more --micro-batches"
        )
    return run


def outputs_of(dataset: Dataset) -> int:
    """How many outputs the network has: a theta's length, or the classes."""
    return len(dataset.classes) if dataset.contents == "labels" else dataset.theta.length


def order_of(dataset: Dataset, config: Config) -> Order:
    """The order of the samples of a run."""
    counts = train_counts(np.array([s.samples for s in dataset.shards]), config.holdout)
    return Order(dataset.order_key, config.seed, counts, config.window_shards)


def restored(
    place: RunDir | None,
    config: Config,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: torch.nn.Module | None,
    ranks: Ranks,
) -> CheckpointRecord | None:
    """Go to the newest checkpoint, which the first process reads and gives to the others."""
    ema = None if averaged is None else averaged.state_dict()
    said = None
    if place is not None:
        record = restore(place.folder, config, model, optimizer, ema)
        said = record.model_dump_json() if record else ""
    said = ranks.share(said)
    if not said:
        return None
    record = CheckpointRecord.model_validate_json(said)
    if not ranks.first:
        empty_moments(optimizer)
    moments = [optimizer.state[p] for p in model.parameters()]
    ranks.copy_first(
        [
            *model.state_dict().values(),
            *(state[key] for state in moments for key in ("step", "exp_avg", "exp_avg_sq")),
            *(ema or {}).values(),
        ]
    )
    return record


def empty_moments(optimizer: torch.optim.Optimizer) -> None:
    """Adam's state as after its first step, to be overwritten."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter).detach(),
                "exp_avg_sq": torch.zeros_like(parameter).detach(),
            }


def cache_of(options: Options) -> Cache:
    """The folder that shards from object storage are kept in."""
    folder = options.cache or default_folder()
    given = options.cache_bytes
    return Cache(folder, default_bytes(folder) if given is None else given)


def write_run(place: RunDir, run: Run) -> None:
    """Write run.json where the run lives."""
    write_json(place.folder / RUN_FILE, run)
    place.begin()


def warn_of_torch(before: Run, run: Run) -> None:
    """A line where bits may differ from an uninterrupted run's."""
    if before.versions.get("torch") != run.versions["torch"]:
        click.echo(
            f"Warning: torch was {before.versions.get('torch')}, is {run.versions['torch']}: the "
            "run goes on, but not bit for bit as an uninterrupted one.",
            err=True,
        )
