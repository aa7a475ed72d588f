"""Several processes, started by torchrun itself: same batches, same ledger, same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.shards_by_hand import flip_byte, write_dataset
from trainer.config import Options
from trainer.errors import TrainerError
from trainer.ranks import environment
from trainer.run import Duration
from trainer.train import pretrain

STEPS = 6
# Sums of float32 over processes round otherwise; after Adam's first steps, which divide by the
# gradient's size, that is this much of a loss.
LOSS_TOLERANCE = 1e-3

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, samples=29, samples_per_shard=7, size_px=32)
    return folder


def options(data: Path, out: Path, **changes: object) -> Options:
    plain = Options(
        data=str(data),
        out=str(out),
        loss="direct",
        arch="resnet18",
        duration=Duration(epochs=2),
        batch_size=9,
        micro_batches=3,
        lr=1e-5,
        workers=1,
        holdout=4,
        precision="fp32",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def command(world: int, given: Options) -> list[str]:
    """The words of torchrun for options; at a port of its own."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    words += ["-m", "trainer", "pretrain", "--data", given.data, "--out", given.out]
    words += ["--loss", given.loss, "--arch", given.arch, "--lr", str(given.lr)]
    words += ["--batch-size", str(given.batch_size), "--micro-batches", str(given.micro_batches)]
    words += ["--holdout", str(given.holdout), "--precision", given.precision, "--device", "cpu"]
    words += ["--workers", str(given.workers)]
    if given.checkpoint_every:
        words += ["--checkpoint-every", str(given.checkpoint_every)]
    ((name, value),) = given.duration.model_dump(exclude_none=True).items()
    return [*words, f"--{name}", f"{value:g}"]


def start(world: int, given: Options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(world, given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run(world: int, given: Options, code: int = 0) -> str:
    """What the processes say; ends by themselves with `code`, which is torchrun's."""
    process = start(world, given)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == code, said
    return said


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, undisturbed."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    pretrain(options(data, out))
    return out


def errors(said: str) -> list[str]:
    """The lines of our errors; torchrun adds many of its own."""
    return [line for line in said.splitlines() if line.startswith("Error: ")]


def losses(out: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def newest(out: Path) -> dict[str, object]:
    return json.loads((out / "checkpoint.json").read_text())["checkpoints"][0]


def assert_agrees(out: Path, alone: Path) -> None:
    """Same ledger and position, losses within the tolerance."""
    assert (out / "ledger.json").read_text() == (alone / "ledger.json").read_text()
    assert newest(out)["samples_seen"] == 50
    assert newest(out)["ledger"] == newest(alone)["ledger"]
    found, expected = losses(out)[-1], losses(alone)[-1]
    assert found[:2] == expected[:2] == ("holdout", STEPS)
    assert found[2] == pytest.approx(expected[2], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_run(
    data: Path, alone: Path, tmp_path: Path, world: int
) -> None:
    said = run(world, options(data, tmp_path / "run"))
    assert f"on cpu x {world}: 6 steps of 9, 50 samples, 2.00 epochs of 25" in said
    assert said.count("Trained") == 1
    assert_agrees(tmp_path / "run", alone)


def test_world_may_change_at_every_resume(data: Path, alone: Path, tmp_path: Path) -> None:
    given = options(data, tmp_path / "run")
    first = Duration(steps=1)
    run(3, replace(given, duration=first))
    pretrain(options(data, tmp_path / "one", duration=first))
    found, expected = (
        load_file(tmp_path / name / "checkpoint-00000001.safetensors") for name in ("run", "one")
    )
    for name, tensor in expected.items():  # nothing but the rounding of sums differs in a step
        if name.endswith("/exp_avg"):
            assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm()
        if "running" in name:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
        if "num_batches" in name:
            assert found[name] == tensor == 1
    pretrain(replace(given, duration=Duration(steps=3)))
    run(2, given)
    assert_agrees(tmp_path / "run", alone)


def wait_for_checkpoint(out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(out: Path) -> dict[int, int]:
    """Process id by rank, of the trainers that work in `out`."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = dict(
                word.split(b"=", 1) for word in (path / "environ").read_bytes().split(b"\0") if word
            )
            torchrun = b"torch.distributed.run" in Path(f"/proc/{parent}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if torchrun and str(out).encode() in words:
            found[int(variables[b"RANK"])] = int(path.name)
    return found


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(data: Path, tmp_path: Path) -> None:
    calm = options(data, tmp_path / "calm", checkpoint_every=1, arch="mobilenet_v2")
    run(2, calm)
    killed = replace(calm, out=str(tmp_path / "killed"))
    process = start(2, replace(killed, duration=Duration(steps=500)))
    wait_for_checkpoint(tmp_path / "killed", process)
    os.kill(workers_of(tmp_path / "killed")[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = errors(said)
    assert "another process of this run is gone" in line
    assert newest(tmp_path / "killed")["step"] < STEPS
    run(2, killed)
    for name in ("backbone.safetensors", "ledger.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    kept = f"checkpoint-{STEPS:08d}.safetensors"
    found, expected = load_file(tmp_path / "killed" / kept), load_file(tmp_path / "calm" / kept)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("target", "number"), [("rank 1", signal.SIGUSR1), ("all", signal.SIGTERM)]
)
def test_signal_stops_all_with_one_checkpoint(
    data: Path, tmp_path: Path, target: str, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    process = start(2, options(data, out, duration=Duration(steps=5000), checkpoint_every=2))
    wait_for_checkpoint(out, process)
    ranks = workers_of(out)
    os.kill(ranks[1] if target == "rank 1" else process.pid, number)
    said, _ = process.communicate(timeout=120)
    step = newest(out)["step"]
    assert f"Stopped by {number.name} at step {step}; the same command goes on.\n" in said
    assert said.count("Stopped by") == 1
    if target == "rank 1":
        assert "exitcode  : 138" in said
    assert workers_of(out) == {}


def test_fault_of_the_data_is_said_once(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", samples=29, samples_per_shard=7, size_px=32)
    flip_byte(tmp_path / "data" / "data" / "train-00001-of-00005.tar", 600)
    said = run(2, options(tmp_path / "data", tmp_path / "run"), code=1)
    (line,) = errors(said)
    assert "SHA-256 differs from dataset.json" in line


def test_more_processes_than_parts_are_refused(data: Path, tmp_path: Path) -> None:
    said = run(2, options(data, tmp_path / "run", micro_batches=1), code=1)
    (line,) = errors(said)
    assert line.startswith("Error: 2 processes for 1 parts of a batch: each needs one")


def test_odd_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainerError, match=r"RANK=2, WORLD_SIZE=2, .*expected what torchrun sets"):
        environment()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(TrainerError, match="RANK=one"):
        environment()
