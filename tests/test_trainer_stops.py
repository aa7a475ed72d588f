"""Signals: noted in the loop, an exception elsewhere, a second one at once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trainer.saving
import trainer.setup
import trainer.train
from tests.shards_by_hand import write_dataset
from tests.slots import Slots
from trainer.config import Options
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.feed import Feed
from trainer.loader import batches_from
from trainer.progress import Progress
from trainer.ranks import Ranks
from trainer.run import Duration
from trainer.samples import Samples
from trainer.schedule import End
from trainer.stops import SIGNALS, Stop, Stopped, stop_signals
from trainer.train import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


def test_signal_outside_of_the_loop_raises() -> None:
    with pytest.raises(Stopped) as stopped, stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopped.value.signal == signal.SIGUSR1
    assert stop()


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_in_the_loop_is_noted_and_a_second_raises(number: int) -> None:
    with stop_signals() as stop, stop.notes():
        os.kill(os.getpid(), number)
        assert stop.signal == number
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == number
        with pytest.raises(Stopped):
            stop.check()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_no_library_takes_it_for_an_error_of_its_own() -> None:
    assert not issubclass(Stopped, Exception)


def test_torchruns_echo_is_not_a_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with stop_signals() as stop, stop.notes():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # until the process has ended
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


RANK = """
import os, signal, sys, time
from trainer.stops import Stopped, stop_signals
try:
    with stop_signals():
        print(os.getpid(), flush=True)
        time.sleep(60)
except Stopped as stopped:
    print(stopped.signal, flush=True)
"""


def test_killed_torchrun_is_a_signal_to_its_processes() -> None:
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", launcher],
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.kill()
        assert process.stdout.readline() == f"{signal.SIGTERM:d}\n"
        assert process.stdout.read() == ""  # the rank has ended


def test_stop_is_asked_like_a_question() -> None:
    assert not Stop()()
    assert Stop(signal=15)()


PHASES: dict[str, tuple[Any, str, dict[str, object], int | None]] = {
    "set-up": (trainer.setup, "build_model", {}, None),
    "normals": (trainer.setup, "read_normals", {"loss": "indirect"}, None),
    "first batch": (trainer.train, "at_hand", {}, None),
    "compile": (trainer.train, "try_compiled", {"compile": "measure"}, None),
    "step": (trainer.train, "commit", {}, 1),
    "figure": (trainer.train, "draw_epochs_end", {}, 1),
    "held-out": (trainer.saving, "held_out", {}, 2),
    "checkpoint": (trainer.saving, "save_checkpoint", {}, 2),
    "export": (trainer.saving, "export_backbone", {}, 2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, size_px=32)
    return folder


def signalled(module: Any, name: str, patch: pytest.MonkeyPatch) -> None:
    """Let a function send this process SIGTERM the first time it is called, and then work."""
    plain = getattr(module, name)

    def strike(*words: Any, **more: Any) -> Any:
        patch.setattr(module, name, plain)
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*words, **more)

    patch.setattr(module, name, strike)


@pytest.mark.parametrize("phase", PHASES)
def test_signal_anywhere_ends_in_one_line(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    phase: str,
) -> None:
    module, name, more, step = PHASES[phase]
    plain = Options(
        data=str(data),
        out=str(tmp_path / "run"),
        loss="direct",
        arch="mobilenet_v2",
        duration=Duration(steps=2),
        batch_size=4,
        workers=0,
        holdout=2,
        precision="fp32",
    )
    options = replace(plain, **more)  # type: ignore[arg-type]
    signalled(module, name, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        pretrain(options)
    assert ended.value.code == 143
    where = f" at step {step}" if step else ""
    assert capsys.readouterr().err == f"Stopped by SIGTERM{where}; the same command goes on.\n"
    assert (tmp_path / "run" / "checkpoint.json").exists() == (step is not None)
    assert not (tmp_path / "run" / "backbone.json").exists()
    assert not list((tmp_path / "run").glob(".*.tmp-*"))


@pytest.fixture
def unreadable(tmp_path: Path) -> Options:
    """A run that trains on two shards; the third, of held-out samples, is gone."""
    write_dataset(tmp_path / "data", samples=9, samples_per_shard=3, size_px=32)
    (tmp_path / "data/data/train-00002-of-00003.tar").unlink()
    return Options(
        data=str(tmp_path / "data"),
        out=str(tmp_path / "run"),
        loss="direct",
        arch="mobilenet_v2",
        duration=Duration(steps=2),
        batch_size=4,
        workers=0,
        holdout=3,
        precision="fp32",
    )


def test_signal_does_not_wait_for_held_out_samples(
    unreadable: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signalled(trainer.train, "commit", monkeypatch)
    with pytest.raises(SystemExit) as ended:
        pretrain(unreadable)
    assert ended.value.code == 143
    assert capsys.readouterr().err == "Stopped by SIGTERM at step 1; the same command goes on.\n"
    assert steps_saved(unreadable) == [1]


def test_held_out_samples_that_cannot_be_read_cost_no_checkpoint(
    unreadable: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    said = r"no such file.*; the checkpoint of step 2 is written"
    with pytest.raises(TrainerError, match=said):
        pretrain(unreadable)
    assert steps_saved(unreadable) == [2]
    assert "dataset.json lists it; no figure5 of epoch 1.\n" in capsys.readouterr().err
    with pytest.raises(TrainerError, match=r"no such file"):  # at the export
        pretrain(unreadable)


def steps_saved(options: Options) -> list[int]:
    index = json.loads((Path(options.out) / "checkpoint.json").read_text())
    return [record["step"] for record in index["checkpoints"]]


class Stalled:
    """A feed whose samples do not come; it is asked at most a hundred times."""

    asked = 0

    def fill(self, seconds: float, stop: Callable[[], bool]) -> bool:
        self.asked += 1
        assert self.asked < 100
        time.sleep(0.01)
        return False


@pytest.mark.parametrize("saved_seconds", [-239.9, -230.0])
def test_minutes_end_while_samples_are_waited_for(saved_seconds: float) -> None:
    this: Any = SimpleNamespace(ranks=Ranks(), end=End(math.inf, math.inf, 60.2))
    feed: Any = Stalled()
    options: Any = SimpleNamespace(checkpoint_every=None)
    at = Progress(step=3, seconds=60.0, saved_seconds=saved_seconds)
    word = trainer.train.at_hand(this, at, feed, Stop(), options)
    assert word.over
    assert word.due == (saved_seconds < -239)  # 300 seconds have gone by in the stall


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_that_was_given_up_comes_at_the_next_call(data: Path, workers: int) -> None:
    slots = Slots(data, read_dataset(data))
    parts = [[0, 1], [4, 5], [2, 3]]
    samples = Samples(read_dataset(data), Late(slots, data.parent / f"here-{workers}"))
    with batches_from(samples, iter(parts), workers, on_cuda=False) as stream:
        feed = Feed(None, stream, count=2)  # type: ignore[arg-type]
        start = time.monotonic()
        assert not feed.fill(0.3, lambda: False)  # shard 1 does not come: given up by the clock
        assert not feed.fill(60, lambda: time.monotonic() > start + 0.6)  # and for a signal
        (data.parent / f"here-{workers}").touch()
        assert feed.fill(60, lambda: False)
        taken = list(feed.take())
    assert [part.index.tolist() for part, _ in taken] == parts[:2]
    assert [more for _, more in taken] == [True, False]


class Late:
    """Shards of which the second is not there before a file is."""

    def __init__(self, slots: Slots, sign: Path) -> None:
        self.slots, self.sign = slots, sign

    def shard(self, shard: int, stop: Callable[[], bool]) -> Any:
        while shard == 1 and not self.sign.exists():
            if stop():
                raise Stopped
            time.sleep(0.01)
        return self.slots.shard(shard, stop)
