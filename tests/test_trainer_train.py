"""The loop: resumed runs, killed runs, refused options, faults while training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tests.shards_by_hand import flip_byte, sha256, write_dataset
from trainer.config import Options, config_of
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.metrics import read_metrics
from trainer.run import Duration
from trainer.setup import order_of
from trainer.train import pretrain

STEPS = 10


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, samples=18, samples_per_shard=7, size_px=32)
    return folder


def options(data: Path, out: Path, steps: int = STEPS, **changes: object) -> Options:
    plain = Options(
        data=str(data),
        out=str(out),
        loss="indirect",
        arch="mobilenet_v2",
        duration=Duration(steps=steps),
        batch_size=4,
        workers=0,
        holdout=3,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    pretrain(options(data, out))
    return out


def assert_same_weights(out: Path, expected: Path) -> None:
    name = f"checkpoint-{STEPS:08d}.safetensors"
    found, wanted = load_file(out / name), load_file(expected / name)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    weights = "backbone.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()


def test_run_folder_holds_what_the_page_says(undisturbed: Path) -> None:
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        ".lock", "backbone.json", "backbone.safetensors", "checkpoint-00000010.safetensors",
        "checkpoint.json", "curves.png", "figure5", "ledger.json", "metrics.jsonl", "run.json",
    ]  # fmt: skip
    lines = read_metrics(undisturbed)
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 10), ("holdout", 10)]
    assert 0 <= lines[0]["data_wait"] <= 1
    assert lines[0]["epoch"] == pytest.approx(40 / 15, rel=1e-5)


def test_resumed_run_equals_the_uninterrupted_one(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    pretrain(options(data, tmp_path / "run", steps=3))
    pretrain(options(data, tmp_path / "run", steps=7, workers=1))
    pretrain(options(data, tmp_path / "run", checkpoint_every=2))
    assert_same_weights(tmp_path / "run", undisturbed)
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert steps == [3, 7, 8, 10]


def test_finished_run_changes_nothing(
    data: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir() if path.is_file()}
    pretrain(options(data, undisturbed))
    assert {name: (undisturbed / name).read_bytes() for name in before} == before
    assert "10 steps of 4, 40 samples, 2.67 epochs of 15 (0 steps in this call)" in (
        capsys.readouterr().out
    )


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """The same run as `options`, as a process of its own."""
    command = [sys.executable, "-m", "trainer", "pretrain", "--loss", "indirect"]
    command += [
        "--arch",
        "mobilenet_v2",
        "--batch-size",
        "4",
        "--holdout",
        "3",
        "--data",
        str(data),
    ]
    command += ["--out", str(out), *more]
    log = (out.parent / "log.txt").open("wb")
    with log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the trainer ended early"
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_killed_run_resumed_equals_the_uninterrupted_one(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(data, out, "--steps", "500", "--checkpoint-every", "1", "--workers", "1")
    wait_for(out / "checkpoint.json", process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = json.loads((out / "checkpoint.json").read_text())["checkpoints"][0]["step"]
    assert step < STEPS
    pretrain(options(data, out))
    assert_same_weights(out, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_a_checkpoint_and_ends_in_one_line(
    data: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "run"
    process = start(data, out, "--steps", "5000", "--checkpoint-every", "3", "--workers", "1")
    wait_for(out / "checkpoint.json", process)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    step = json.loads((out / "checkpoint.json").read_text())["checkpoints"][0]["step"]
    name = signal.Signals(number).name
    text = (tmp_path / "log.txt").read_text()
    assert text == f"Stopped by {name} at step {step}; the same command goes on.\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet18"}, "was started with --arch mobilenet_v2, now with --arch resnet18"),
        ({"loss": "direct"}, "was started with --loss indirect, now with --loss direct"),
        ({"size_px": 16}, "was started with --size 32, now with --size 16"),
        ({"batch_size": 5}, "was started with --batch-size 4, now with --batch-size 5"),
        ({"lr": 0.5}, "was started with --lr 0.0003, now with --lr 0.5"),
        ({"seed": 1}, "was started with --seed 0, now with --seed 1"),
        ({"holdout": 2}, "was started with --holdout 3, now with --holdout 2"),
        ({"holdout": 18}, "--holdout 18: of 18 samples none is left to train on"),
        ({"device": "quantum"}, "--device quantum: not a device"),
    ],
)
def test_changed_option_is_refused(
    data: Path, undisturbed: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainerError) as error:
        pretrain(options(data, undisturbed, **changes))
    assert message in error.value.message
    assert "\n" not in error.value.message


def test_other_dataset_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", samples=18, size_px=32, seed=1)
    with pytest.raises(TrainerError, match="was trained on dataset by-hand"):
        pretrain(options(tmp_path / "other", undisturbed))


def test_folder_of_something_else_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not overwrite")
    with pytest.raises(TrainerError, match=r"is not empty and holds no run\.json"):
        pretrain(options(data, tmp_path))


def copied(run: Path, out: Path) -> Path:
    shutil.copytree(run, out)
    return out


def test_checkpoint_with_a_flipped_byte_is_refused_where_it_is_the_only_one(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = copied(undisturbed, tmp_path / "run")
    flip_byte(out / "checkpoint-00000010.safetensors", -5)
    with pytest.raises(TrainerError, match=r"00000010\.safetensors: SHA-256 differs"):
        pretrain(options(data, out, steps=12))


def test_checkpoint_of_another_architecture_is_refused(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = copied(undisturbed, tmp_path / "run")
    path = out / "checkpoint.json"
    path.write_text(path.read_text().replace("mobilenet_v2", "resnet18"))
    with pytest.raises(TrainerError, match=r"of arch resnet18, run\.json says mobilenet_v2"):
        pretrain(options(data, out, steps=12))
    run = out / "run.json"
    run.write_text(run.read_text().replace("mobilenet_v2", "resnet18"))
    with pytest.raises(TrainerError, match="checkpoint of another architecture than resnet18"):
        pretrain(options(data, out, steps=12, arch="resnet18"))


def test_loss_that_is_not_finite_stops_the_run(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = copied(undisturbed, tmp_path / "run")
    poison(out, "model/classifier.1.weight")
    before = (out / "checkpoint.json").read_bytes()
    with pytest.raises(TrainerError) as error:
        pretrain(options(data, out, steps=20))
    keys = re.search(r"samples (\d{9}), (\d{9}), (\d{9}), (\d{9});", error.value.message)
    assert keys is not None  # step 11 takes samples 40..43 of a stream of epochs of 15
    dataset = read_dataset(data)
    order = order_of(dataset, config_of(options(data, out), dataset, torch.device("cpu"), 1, None))
    assert [int(key) for key in keys.groups()] == order.samples(40, 44).tolist()
    assert error.value.message.startswith("step 11: not finite (loss nan")
    assert "the last checkpoint is of step 10" in error.value.message
    assert (out / "checkpoint.json").read_bytes() == before


def poison(out: Path, name: str) -> None:
    """Put a NaN into a checkpoint, with a hash that agrees."""
    path = out / f"checkpoint-{STEPS:08d}.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[0] = float("nan")
    path.write_bytes(save(tensors))
    index = json.loads((out / "checkpoint.json").read_text())
    record = index["checkpoints"][0]
    record["bytes"], record["sha256"] = path.stat().st_size, sha256(path.read_bytes())
    (out / "checkpoint.json").write_text(json.dumps(index))


def test_minutes_end_a_run_and_add_up_over_resumes(data: Path, tmp_path: Path) -> None:
    run = options(data, tmp_path / "run", duration=Duration(minutes=0.003), loss="direct")
    pretrain(run)
    record = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["checkpoints"][0]
    assert record["seconds"] >= 0.18
    pretrain(run)
    again = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["checkpoints"][0]
    assert again == record


def test_grey_dataset_at_another_size_trains(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", size_px=40, channels=1)
    pretrain(options(tmp_path / "data", tmp_path / "run", steps=1, size_px=32))
    assert (tmp_path / "run" / "backbone.json").exists()


@pytest.mark.parametrize("several", [{}, {"steps": 1, "minutes": 1}])
def test_duration_is_exactly_one(several: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected exactly one of epochs, steps and minutes"):
        Duration(**several)  # type: ignore[arg-type]
