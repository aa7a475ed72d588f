"""`trainer selftest --chaos`: training among kills and damage ends where a calm run ends.

A calm run first: one process, the dataset's own folder. Then two runs of the same configuration,
struck again and again, that read the dataset over HTTP from a server which fails at times, through
a cache that is damaged between the rounds: one stays with one process, the other goes on with 3, 2,
1, 3, ... processes. What is compared at the end: the ledger of every epoch, the mean loss of all
steps, the exported weights; and what processes and files were left behind.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import chaos
from trainer.dataset import Dataset
from trainer.errors import TrainerError
from trainer.faulty import Faults, FaultyServer, faulty_server
from trainer.verdict import verdict

ARCH = "mobilenet_v2"  # of ours the quickest at this size, and full of batch norms
SIZE_PX, BATCH_SIZE, MICRO_BATCHES, CHECKPOINT_EVERY = 32, 48, 6, 4
# Sums of several processes are added in another order. With Adam such errors grow to the size of
# a step wherever a gradient is nearly 0, and with them the network: at this rate it stays where it
# was, and what a run computed can be told from what it should have.
LR = 1e-6
DECODED = "1MB"  # a part of the samples
MAX_SAMPLES = 20_000
FAULT_PROBABILITY = 0.25  # of a request for a part of a shard
EARLY_PROBABILITY = 0.2  # of a strike before the first step
RUN_SECONDS, END_SECONDS = 900.0, 90.0
# Of what the run moved the weights, and of its mean loss. Measured: 0.02 to 0.2 and
# 3e-5; with one of the six parts of a batch left out 0.55 and 0.17, in another order 1.4 and 2e-3.
WEIGHTS_TOLERANCE, LOSS_TOLERANCE = 0.4, 2e-4

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """The command's options."""

    data: Path
    seed: int = 0
    rounds: int = 9
    epochs: int = 6


@dataclass
class Track:
    """A run folder, and the world sizes with which its rounds go on, over and over."""

    out: Path
    worlds: tuple[int, ...]
    begun: int = 0

    def next_world(self) -> int:
        """The number of processes of the next round."""
        world = self.worlds[self.begun % len(self.worlds)]
        self.begun += 1
        return world

    def records(self) -> list[dict[str, Any]]:
        """The checkpoints, newest first."""
        path = self.out / "checkpoint.json"
        return json.loads(path.read_bytes())["checkpoints"] if path.exists() else []

    def step(self) -> int:
        """Of the newest checkpoint; 0 before the first."""
        return next((record["step"] for record in self.records()), 0)


@dataclass
class Stage:
    """Where all of it takes place."""

    folder: Path
    options: Options
    task: tuple[str, ...]
    last_step: int
    url: str
    mark: str
    say: Say
    moments: random.Random
    done: Counter[str] = field(default_factory=Counter)
    runs: int = 0


def selftest(options: Options, folder: Path, say: Say) -> str:
    """Play all acts in `folder` and return the verdict.

    Raises TrainerError in one line when anything differs, or fewer strikes came than asked for.
    """
    from trainer.dataset import read_dataset

    if not chaos.PROC.joinpath("self/environ").exists():
        raise TrainerError("selftest finds the processes it strikes in /proc: it needs Linux")
    dataset = read_dataset(options.data)
    if dataset.samples > MAX_SAMPLES:
        raise TrainerError(
            f"{options.data}: {dataset.samples} samples; the self-test reads a dataset several "
            f"times, give one of at most {MAX_SAMPLES} (`builder build ... --samples 600`)"
        )
    before, shared = (threading.active_count(), open_files()), chaos.shared_memory()
    faults = Faults(
        probability=FAULT_PROBABILITY,
        seed=options.seed,
        ends=".tar",
        hang_seconds=1,
        drip_bytes_per_s=50_000,
    )
    with faulty_server(options.data, faults) as server:
        stage = Stage(
            folder=folder,
            options=options,
            task=("--task", "classify") if dataset.contents == "labels" else ("--loss", "direct"),
            last_step=-(-options.epochs * train_samples(dataset.samples) // BATCH_SIZE),
            url=server.url,
            mark=f"{os.getpid()}-{time.time_ns():x}",
            say=say,
            moments=random.Random(options.seed),
        )
        try:
            calm, same, elastic = play(stage, server)
        finally:
            chaos.kill(chaos.living(stage.mark))
    if (threading.active_count(), open_files()) > before:
        raise TrainerError("threads or sockets of the faulty server outlived it")
    left = chaos.leftovers([folder], folder / "tmp", shared)
    if left:
        raise TrainerError(f"left behind: {', '.join(left[:5])}")
    said = verdict(
        calm.out,
        same.out,
        elastic.out,
        weights_at_start(dataset, options.seed),
        train_samples(dataset.samples),
        options.epochs,
        weights_tolerance=WEIGHTS_TOLERANCE,
        loss_tolerance=LOSS_TOLERANCE,
    )
    for line in said:
        say(line)
    return account(stage)


def weights_at_start(dataset: Dataset, seed: int) -> dict[str, Any]:
    """The weights of a run before its first step, as setup.py makes them."""
    import torch

    from trainer.models import build_model
    from trainer.setup import outputs_of

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(ARCH, outputs_of(dataset))
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def account(stage: Stage) -> str:
    """What was survived; TrainerError when fewer strikes came than asked for."""
    counts = {
        what: Counter(
            {k.partition(": ")[2]: n for k, n in stage.done.items() if k.startswith(what)}
        )
        for what in ("strike", "damage", "storage")
    }
    said = "; ".join(
        f"{found.total()} {name} ({', '.join(f'{n} {kind}' for kind, n in sorted(found.items()))})"
        for name, found in zip(
            ("strikes", "damaged files", "storage faults"), counts.values(), strict=True
        )
    )
    if counts["strike"].total() < stage.options.rounds:
        raise TrainerError(
            f"the same results, but only {counts['strike'].total()} of {stage.options.rounds} "
            f"strikes came in time ({said}); try more --epochs, or another --seed"
        )
    return f"same as the calm run, after {said}; nothing left behind"


def open_files() -> int:
    """How many files and sockets this process has open."""
    return len(list((chaos.PROC / "self" / "fd").iterdir()))


def train_samples(samples: int) -> int:
    """How many samples of a dataset are trained on by default."""
    from trainer.order import default_holdout

    return samples - default_holdout(samples)


def play(stage: Stage, server: FaultyServer) -> tuple[Track, Track, Track]:
    """The calm run, the rounds, and the two runs' ends in peace."""
    (stage.folder / "tmp").mkdir(parents=True)
    calm = Track(stage.folder / "calm", (1,))
    same = Track(stage.folder / "same", (1,))
    elastic = Track(stage.folder / "elastic", (1, 3, 2))
    start = time.monotonic()
    finish(stage, calm, str(stage.options.data))
    stage.say(f"calm: {stage.last_step} steps, 1 process, {time.monotonic() - start:.1f} s")
    for number in range(1, stage.options.rounds + 1):
        track = same if number % 3 == 0 else elastic
        left = sum(
            (n % 3 == 0) == (number % 3 == 0) for n in range(number, stage.options.rounds + 1)
        )
        play_round(stage, track, number, left)
    for track in (same, elastic):
        done = damage(stage, track)
        world = finish(stage, track, stage.url)
        stage.say(f"last: {track.out.name}: {done}; {world} processes: went through in peace")
    stage.done.update({f"storage: {kind}": n for kind, n in server.counts.faults.items()})
    return calm, same, elastic


def play_round(stage: Stage, track: Track, number: int, left: int) -> None:
    """Damage what stands, start a run, and strike it at some moment; `left` rounds of its track."""
    done = damage(stage, track)
    world, before = track.next_world(), track.step()
    kind = chaos.STRIKES[(number - 1) % len(chaos.STRIKES)]
    early = stage.moments.random() < EARLY_PROBABILITY
    wanted = (
        0
        if early
        else before
        + 1
        + stage.moments.randrange(
            max(1, (stage.last_step - before) // (left + 1) - CHECKPOINT_EVERY)
        )
    )
    start = time.monotonic()
    process, log = launch(stage, track, world, stage.url)
    moment = start + stage.moments.uniform(0.5, 5) if early else 0.0
    while process.poll() is None and (time.monotonic() < moment or track.step() < wanted):
        refuse_endless(start, log)
        time.sleep(0.02)
    struck = process.poll() is None and chaos.strike(
        kind, stage.mark, process.pid, world, stage.moments
    )
    code = process.wait()
    chaos.wait_for_end(stage.mark, END_SECONDS)
    if not struck:
        if code:
            raise TrainerError(f"round {number} ended by itself with code {code}: {last_line(log)}")
        stage.say(f"round {number}: {track.out.name}: {done}; went through before the strike")
        return
    if world == 1 and kind.startswith("SIG"):
        expected = 128 + signal.Signals[kind]
        if code not in (expected, expected - 256, -signal.Signals[kind]) and not (code == 0):
            raise TrainerError(
                f"round {number}: {kind} ended with code {code}, expected {expected}: "
                f"{last_line(log)}"
            )
    stage.done[f"strike: {kind}"] += 1
    stage.say(
        f"round {number}: {track.out.name}: {done}; {world} processes: {kind} after "
        f"{time.monotonic() - start:.1f} s, step {before} -> {track.step()}, code {code}"
    )


def damage(stage: Stage, track: Track) -> str:
    """Hurt the cache, and every other time the newest checkpoint."""
    done = chaos.damage_cache(stage.folder / "cache", stage.moments)
    words = [f"{number} cache files {kind}" for kind, number in sorted(Counter(done).items())]
    if stage.moments.random() < 0.5:
        kind = chaos.damage_checkpoint(track.records(), track.out, stage.moments)
        words += [f"newest checkpoint {kind}"] if kind else []
        stage.done.update([f"damage: checkpoint {kind}"] if kind else [])
    stage.done.update(f"damage: cache {kind}" for kind in done)
    return ", ".join(words) or "no damage"


def finish(stage: Stage, track: Track, data: str) -> int:
    """Run to the end without strikes; the number of processes."""
    world = track.next_world()
    process, log = launch(stage, track, world, data)
    try:
        code = process.wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        raise TrainerError(f"a run in peace took over {RUN_SECONDS:.0f} s; see {log}") from None
    chaos.wait_for_end(stage.mark, END_SECONDS)
    if code:
        raise TrainerError(f"a run in peace ended with code {code}: {last_line(log)}")
    return world


def launch(
    stage: Stage, track: Track, world: int, data: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start `trainer pretrain` with so many processes; its output goes to a file of its own."""
    words = [sys.executable, "-m"]
    if world > 1:
        words += ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        words += ["--log-dir", str(stage.folder / "logs" / "torchrun"), "-m"]
    words += ["trainer", "pretrain", "--data", data, "--out", str(track.out), *stage.task]
    words += ["--arch", ARCH, "--size", str(SIZE_PX), "--batch-size", str(BATCH_SIZE)]
    words += ["--micro-batches", str(MICRO_BATCHES), "--epochs", str(stage.options.epochs)]
    words += ["--lr", str(LR), "--seed", str(stage.options.seed), "--device", "cpu"]
    words += ["--precision", "fp32", "--workers", "1", "--window", "2"]
    words += ["--checkpoint-every", str(CHECKPOINT_EVERY), "--cache", str(stage.folder / "cache")]
    if track.begun % 2 == 0:  # the same batches, decoded once
        words += ["--cache-decoded", DECODED]
    stage.runs += 1
    log = stage.folder / "logs" / f"{stage.runs:03d}-{track.out.name}-{world}.txt"
    log.parent.mkdir(exist_ok=True)
    environment = os.environ | {
        chaos.MARK: stage.mark,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(stage.folder / "tmp"),
        "SEMIFORMULA_RETRY_SECONDS": "120",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, log


def refuse_endless(start: float, log: Path) -> None:
    """TrainerError when a run has not come to its strike in RUN_SECONDS."""
    if time.monotonic() - start > RUN_SECONDS:
        raise TrainerError(f"no progress in {RUN_SECONDS:.0f} s; see {log}")


def last_line(log: Path) -> str:
    """The trainer's own error line, else the last line of the output."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("Error: ")]
    return (own or lines or ["it said nothing"])[-1].removeprefix("Error: ")[:300]
