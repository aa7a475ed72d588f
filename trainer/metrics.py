"""metrics.jsonl: one JSON object a line; the curves and the TensorBoard files are made of it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import Field

from trainer.artifacts import Model, parse_model, unwritable
from trainer.errors import TrainerError

METRICS_FILE = "metrics.jsonl"
RECENT_STEPS = 100


class Waits(Model):
    """What `data_wait` was spent on; the three add up to it."""

    shards: float = Field(description="until the fetcher had the shard, verified")
    decode: float = Field(description="reading and decoding")
    handoff: float = Field(description="from the loader's processes to the trainer's")


class TrainLine(Model):
    """The mean of some steps; shares are of the time that they took."""

    kind: Literal["train"]
    step: int = Field(ge=1, description="optimizer steps taken")
    steps: int = Field(ge=1, description="how many steps this line averages")
    samples: int = Field(ge=1, description="the cursor: stream positions consumed")
    epoch: float = Field(description="the cursor in passes over the training samples")
    loss: float
    terms: dict[str, float]
    grad_norm: float
    lr: float = Field(description="of the last step")
    images_per_s: float = Field(description="of all processes together")
    data_wait: float = Field(description="share of the time spent waiting for a batch")
    waits: Waits
    device: float = Field(description="share of the time spent in the steps themselves")


class HoldoutLine(Model):
    """A held-out evaluation."""

    kind: Literal["holdout"]
    step: int = Field(ge=1)
    samples: int = Field(ge=1, description="the cursor")
    loss: float
    terms: dict[str, float]


KINDS: dict[str, type[Model]] = {"train": TrainLine, "holdout": HoldoutLine}


class MetricsLog:
    """Appends to RUN/metrics.jsonl; starts at `start_bytes`, dropping what was written beyond.

    With `tensorboard` each line goes to RUN/tensorboard, too.
    """

    def __init__(self, out: Path, start_bytes: int, tensorboard: bool = False) -> None:
        path = self._path = out / METRICS_FILE
        data = path.read_bytes() if path.exists() else b""
        if len(data) < start_bytes:
            start_bytes = data.rfind(b"\n") + 1  # the weights are whole, and worth more
            click.echo(
                f"Warning: {path}: shorter than its checkpoint says; going on without the lines "
                "that are missing.",
                err=True,
            )
        lines = _parse(data[:start_bytes], path)  # damage shows now, not when the run is through
        self._events = None
        if tensorboard:
            from trainer.tensorboard import Events

            self._events = Events(out, lines)
        self._file = path.open("ab")
        self._file.truncate(start_bytes)
        self._file.seek(start_bytes)

    def append(self, kind: str, **fields: Any) -> None:
        """Add one line; numbers only, rounded to six digits for reading."""
        line = {"kind": kind, **{key: _rounded(value) for key, value in fields.items()}}
        try:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from None
        if self._events is not None:
            self._events.append(line)

    def sync(self) -> int:
        """Force the file to disk and return its length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        with suppress(OSError):  # of a full disk: `append` has said so
            self._file.close()
        if self._events is not None:
            self._events.close()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut by a kill is left out.

    Raises TrainerError naming the line where another one is damaged.
    """
    return _parse((out / METRICS_FILE).read_bytes(), out / METRICS_FILE)


def _parse(data: bytes, path: Path) -> list[dict[str, Any]]:
    *whole, _ = data.split(b"\n")  # nothing follows the last line's end, unless a kill cut it
    lines = []
    for number, line in enumerate(whole, start=1):
        where = f"{path}: line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainerError(f"{where}: not readable as JSON ({error})") from None
        kind = fields.get("kind") if isinstance(fields, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            raise TrainerError(f"{where}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
        lines.append(parse_model(KINDS[kind], fields, where).model_dump())
    return lines


def recent_train_loss(lines: list[dict[str, Any]]) -> float:
    """Mean training loss of the last RECENT_STEPS steps, each line weighted by its steps."""
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        raise TrainerError(f"{METRICS_FILE}: holds no line of training; was it altered?")
    recent = [line for line in train if line["step"] > train[-1]["step"] - RECENT_STEPS]
    return sum(line["loss"] * line["steps"] for line in recent) / sum(s["steps"] for s in recent)
