"""`trainer selftest --chaos`: its means, its verdict, and a small run of all of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from builder.artifacts import parse_model
from builder.build import build
from builder.recipe import Recipe, load_recipe
from builder.sources import find_source
from tests.shards_by_hand import sha256
from trainer import chaos, selftest
from trainer.cli import main
from trainer.errors import TrainerError
from trainer.ledger import digest, expected_sums
from trainer.verdict import ledger_faults, loss_of_run, verdict, weights_distance

MARK = f"test-{os.getpid()}"
SLEEP = "import time; time.sleep(60)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"


@pytest.fixture
def marked() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child, both with the mark."""
    environment = os.environ | {chaos.MARK: MARK}
    process = subprocess.Popen([sys.executable, "-c", PARENT], env=environment)
    while not any(found.command.endswith(SLEEP) for found in chaos.living(MARK)):
        assert process.poll() is None
    yield process
    chaos.kill(chaos.living(MARK))
    process.wait()
    chaos.wait_for_end(MARK, 10)


def test_marked_processes_are_found_with_their_parents(marked: subprocess.Popen[bytes]) -> None:
    found = {process.pid: process.parent for process in chaos.living(MARK)}
    assert found.pop(marked.pid) == os.getpid()
    assert list(found.values()) == [marked.pid]
    assert chaos.living(MARK[:-1]) == []


@pytest.mark.parametrize(
    ("kind", "world", "code", "left"),
    [
        ("SIGTERM", 1, -signal.SIGTERM, 1),
        ("SIGUSR1", 1, -signal.SIGUSR1, 1),
        ("launcher killed", 2, -signal.SIGKILL, 1),
        ("rank killed", 2, 0, 0),  # the child of the launcher, which then ends
        ("helper killed", 1, 0, 0),
        ("all killed", 1, -signal.SIGKILL, 0),
    ],
)
def test_strike_hits_whom_it_names(
    marked: subprocess.Popen[bytes], kind: str, world: int, code: int, left: int
) -> None:
    assert chaos.strike(kind, MARK, marked.pid, world, random.Random(0))
    assert marked.wait(10) == code
    end = time.monotonic() + 5  # a killed process takes a moment to be gone
    while len(chaos.living(MARK)) != left:
        assert time.monotonic() < end, chaos.living(MARK)


def test_process_that_lives_on_is_named_and_ended(marked: subprocess.Popen[bytes]) -> None:
    os.kill(marked.pid, signal.SIGKILL)
    marked.wait()
    with pytest.raises(TrainerError, match=r"^1 processes outlived the run by 0 s: \d+ .*sleep"):
        chaos.wait_for_end(MARK, 0.2)
    chaos.wait_for_end(MARK, 5)


def test_damage_hurts_a_third_of_the_cache(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.tar").write_bytes(bytes(100))
    (tmp_path / "lock").touch()
    done = chaos.damage_cache(tmp_path, random.Random(0))
    files = [tmp_path / f"{i}.tar" for i in range(9)]
    assert len(done) == 3
    assert sum(path.exists() and path.read_bytes() == bytes(100) for path in files) == 6
    assert (tmp_path / "lock").exists()


def test_newest_checkpoint_is_damaged_only_while_the_other_is_whole(tmp_path: Path) -> None:
    records = []
    for name in ("new", "old"):
        (tmp_path / name).write_bytes(name.encode() * 50)
        records.append({"file": name, "sha256": sha256(name.encode() * 50)})
    moments = random.Random(0)
    assert chaos.damage_checkpoint(records[:1], tmp_path, moments) == ""
    assert chaos.damage_checkpoint(records, tmp_path, moments) in ("cut", "flipped")
    assert (tmp_path / "new").read_bytes() != b"new" * 50
    assert (tmp_path / "old").read_bytes() == b"old" * 50
    assert chaos.damage_checkpoint(records, tmp_path, moments) == ""


def test_leftovers_are_temporary_files_and_shared_memory(tmp_path: Path) -> None:
    before = chaos.shared_memory()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.json").touch()
    assert chaos.leftovers([tmp_path / "run"], tmp_path / "tmp", before) == []
    (tmp_path / "run" / ".run.json.tmp-3").touch()
    (tmp_path / "tmp" / "x").touch()
    shared = chaos.SHARED_MEMORY / f"semiformula-test-{os.getpid()}"
    shared.touch()
    try:
        found = chaos.leftovers([tmp_path / "run"], tmp_path / "tmp", before)
    finally:
        shared.unlink()
    assert {f"{tmp_path}/run/.run.json.tmp-3", f"{tmp_path}/tmp/x", str(shared)} <= set(found)


def write_run(out: Path, *, samples: int = 7, loss: float = 0.5, weight: float = 1.0) -> Path:
    """Ledger, metrics and weights of a run of one epoch of `samples` of 7 samples, 4 steps."""
    out.mkdir()
    line = {"epoch": 0, "samples": samples, "digest": digest(expected_sums(samples)[1:])}
    (out / "ledger.json").write_text(json.dumps({"epochs": [line]}))
    lines = [{"kind": "train", "step": 3, "steps": 3, "loss": loss}]
    lines += [{"kind": "holdout", "step": 3, "loss": 9}]
    lines += [{"kind": "train", "step": 4, "steps": 1, "loss": 2 * loss}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = {"w": np.array([[3.0, 4.0 * weight]], np.float32), "bias": np.zeros(1, np.float32)}
    save_file(weights, out / "backbone.safetensors")
    return out


def judge(calm: Path, same: Path, elastic: Path) -> list[str]:
    start = {"w": np.array([[3.0, 3.0]]), "fc": np.ones((2, 2))}
    limits = {"weights_tolerance": 0.1, "loss_tolerance": 1e-3}
    return list(verdict(calm, same, elastic, start, 7, 1, **limits))


def test_verdict_of_equal_runs_has_a_line_each(tmp_path: Path) -> None:
    calm, same = write_run(tmp_path / "calm"), write_run(tmp_path / "same")
    elastic = write_run(tmp_path / "elastic", loss=0.5001, weight=1.005)
    assert judge(calm, same, elastic) == [
        "ledger: 1 epochs of 7 samples, each once, in all three runs",
        "one process: the weights of the calm run, bit for bit",
        "changing processes: weights within 0.02 of what the calm run moved them (at most 0.1), "
        "mean loss within 0.0002 (at most 0.001)",
    ]


@pytest.mark.parametrize(
    ("changed", "of", "message"),
    [
        ({"samples": 6}, "same", r"DIFFERENT: same: ledger \[\(0, 6, '.*, expected \[\(0, 7, '"),
        ({"weight": 1.001}, "same", "DIFFERENT: weights of same differ .* by 0.004 of what that"),
        ({"weight": 1.05}, "elastic", "elastic differ by 0.2 of what the .* expected at most 0.1$"),
        ({"loss": 0.501}, "elastic", "loss of elastic is 0.62625, of the calm run 0.625; expected"),
        ({"loss": 0.5001}, "same", "loss of same is 0.625125, of the calm run 0.625; expected"),
    ],
)
def test_verdict_names_what_differs(
    tmp_path: Path, changed: dict[str, float], of: str, message: str
) -> None:
    runs = [
        write_run(tmp_path / name, **(changed if name == of else {}))  # type: ignore[arg-type]
        for name in ("calm", "same", "elastic")
    ]
    with pytest.raises(TrainerError, match=message):
        judge(*runs)


def test_ledger_with_a_missing_epoch_is_a_fault(tmp_path: Path) -> None:
    assert ledger_faults(write_run(tmp_path / "a"), 7, 1) == []
    assert len(ledger_faults(tmp_path / "a", 7, 2)) == 1


def test_steps_that_double_are_a_fault(tmp_path: Path) -> None:
    out = write_run(tmp_path / "a")
    assert loss_of_run(out) == (0.625, [])
    log = out / "metrics.jsonl"
    log.write_text(log.read_text().replace('"steps": 1', '"steps": 2'))
    assert loss_of_run(out)[1] == ["a: the line of step 4 covers 2 steps after step 3"]


def test_weights_of_other_names_are_infinitely_far(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    start = {"w": np.zeros((1, 2)), "v": np.zeros((1, 2))}
    assert weights_distance(a, b, start) == 0
    save_file({"v": np.ones((1, 2), np.float32)}, b / "backbone.safetensors")
    assert weights_distance(a, b, start) == float("inf")


@pytest.fixture(scope="module")
def small_set(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples of 32 x 32 in twelve shards, built by the builder."""
    fields = {**load_recipe("fine").model_dump(), "samples": 120, "samples_per_shard": 10}
    recipe = parse_model(Recipe, {**fields, "size_px": 32}, "small")
    out = tmp_path_factory.mktemp("chaos") / "set"
    build(recipe, find_source(str(photographs), None, "CC0-1.0"), out, jobs=1)
    return out


@pytest.mark.slow
def test_chaos_ends_where_a_calm_run_ends(small_set: Path, tmp_path: Path) -> None:
    words = ["selftest", "--chaos", "--data", str(small_set), "--rounds", "3", "--epochs", "8"]
    run = CliRunner().invoke(main, [*words, "--keep", str(tmp_path / "kept")])
    assert run.exit_code == 0, run.output
    lines = run.output.splitlines()
    assert lines[0].startswith("calm: 18 steps, 1 process, ")
    assert [line.split(":")[0] for line in lines[1:6]] == [
        "round 1", "round 2", "round 3", "last", "last",
    ]  # fmt: skip
    assert lines[6:8] == [
        "ledger: 8 epochs of 108 samples, each once, in all three runs",
        "one process: the weights of the calm run, bit for bit",
    ]
    assert lines[9].startswith("same as the calm run, after 3 strikes (1 SIGTERM, 1 SIGUSR1, 1 all")
    assert lines[9].endswith("; nothing left behind")
    again = CliRunner().invoke(main, [*words, "--keep", str(tmp_path / "kept")])
    assert again.exit_code == 1
    assert again.output == f"Error: {tmp_path}/kept: is not empty; choose another --keep\n"


def test_dataset_too_large_for_the_self_test_is_refused(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "MAX_SAMPLES", 100)
    with pytest.raises(TrainerError, match=r"120 samples; .* give one of at most 100 \(`builder"):
        selftest.selftest(selftest.Options(small_set), tmp_path, print)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = CliRunner().invoke(main, ["selftest", "--chaos", "--data", str(small_set)])
    assert run.exit_code == 1
    assert list(tmp_path.iterdir()) == []
