"""TensorBoard files say what metrics.jsonl says, once, however often a run was resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from trainer.errors import TrainerError
from trainer.metrics import MetricsLog, read_metrics
from trainer.tensorboard import EVENTS_FILE, Events

pytest.importorskip("tensorboard", reason="the extra [tensorboard] is not installed")

TRAIN = {
    "steps": 10, "epoch": 0.5, "terms": {"unpainted": 0.25}, "grad_norm": 1.5, "lr": 0.001,
    "images_per_s": 20.0, "data_wait": 0.75,
    "waits": {"shards": 0.25, "decode": 0.5, "handoff": 0.0}, "device": 0.25,
}  # fmt: skip


def log_to(out: Path, start_bytes: int, steps: range, with_held_out: bool = False) -> int:
    """Append a line for each step; returns the length of metrics.jsonl."""
    log = MetricsLog(out, start_bytes, tensorboard=True)
    for step in steps:
        log.append("train", step=step, samples=4 * step, loss=1 / step, **TRAIN)
        if with_held_out:
            log.append("holdout", step=step, samples=4 * step, loss=2.0, terms={})
    length = log.sync()
    log.close()
    return length


def read_events(out: Path) -> dict[str, list[tuple[float, int, float]]]:
    """Time, step and value of every scalar as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / EVENTS_FILE)).Reload()
    return {
        tag: [(event.wall_time, event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def test_events_hold_the_numbers_of_the_lines(tmp_path: Path) -> None:
    log_to(tmp_path, 0, range(10, 30, 10), with_held_out=True)
    # Forty samples at twenty a second: two seconds a line.
    assert read_events(tmp_path) == {
        "loss/train": [(2.0, 10, pytest.approx(0.1)), (4.0, 20, pytest.approx(0.05))],
        "unpainted/train": [(2.0, 10, 0.25), (4.0, 20, 0.25)],
        "epoch": [(2.0, 10, 0.5), (4.0, 20, 0.5)],
        "lr": [(2.0, 10, pytest.approx(0.001)), (4.0, 20, pytest.approx(0.001))],
        "grad_norm": [(2.0, 10, 1.5), (4.0, 20, 1.5)],
        "images_per_s": [(2.0, 10, 20.0), (4.0, 20, 20.0)],
        "data_wait": [(2.0, 10, 0.75), (4.0, 20, 0.75)],
        "device": [(2.0, 10, 0.25), (4.0, 20, 0.25)],
        "waits/shards": [(2.0, 10, 0.25), (4.0, 20, 0.25)],
        "waits/decode": [(2.0, 10, 0.5), (4.0, 20, 0.5)],
        "waits/handoff": [(2.0, 10, 0.0), (4.0, 20, 0.0)],
        "loss/holdout": [(2.0, 10, 2.0), (4.0, 20, 2.0)],
    }


def test_resumed_run_doubles_no_curve(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    length = log_to(out, 0, range(10, 30, 10))
    log_to(out, length, range(30, 60, 10))  # killed: the checkpoint is of step 20
    log_to(out, length, range(30, 50, 10))
    calm = tmp_path / "calm"
    calm.mkdir()
    log_to(calm, 0, range(10, 50, 10))
    assert [step for _, step, _ in read_events(out)["loss/train"]] == [10, 20, 30, 40]
    assert (out / EVENTS_FILE).read_bytes() == (calm / EVENTS_FILE).read_bytes()
    assert read_metrics(out) == read_metrics(calm)
    assert [path.name for path in (out / "tensorboard").iterdir()] == [Path(EVENTS_FILE).name]


def test_run_may_begin_to_write_events_when_it_resumes(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.append("train", step=10, samples=40, loss=1.0, **TRAIN)
    length = log.sync()
    log.close()
    assert not (tmp_path / EVENTS_FILE).exists()
    log_to(tmp_path, length, range(20, 30, 10))
    assert [step for _, step, _ in read_events(tmp_path)["loss/train"]] == [10, 20]


def test_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(TrainerError, match=r"pip install 'semiformula\[tensorboard\]'") as error:
        Events(tmp_path, [])
    assert "\n" not in error.value.message


def test_lines_read_back_as_they_were_appended(tmp_path: Path) -> None:
    log_to(tmp_path, 0, range(10, 20, 10), with_held_out=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert read_metrics(tmp_path) == lines
