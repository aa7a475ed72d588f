"""metrics.jsonl: one JSON object a line, and the loss curve drawn from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trainer.artifacts import Model, atomic_file, parse_model
from trainer.errors import TrainerError

METRICS_FILE = "metrics.jsonl"
RECENT_STEPS = 100


class TrainLine(Model):
    """The mean of some steps."""

    kind: Literal["train"]
    step: int = Field(ge=1)
    steps: int = Field(ge=1)
    epoch: float
    loss: float
    grad_norm: float
    terms: dict[str, float]
    lr: float
    images_per_s: float
    data_wait: float


class HoldoutLine(Model):
    """A held-out evaluation."""

    kind: Literal["holdout"]
    step: int = Field(ge=1)
    loss: float


KINDS: dict[str, type[Model]] = {"train": TrainLine, "holdout": HoldoutLine}


class MetricsLog:
    """Appends to RUN/metrics.jsonl; starts at `bytes`, dropping what a killed run wrote beyond."""

    def __init__(self, out: Path, start_bytes: int) -> None:
        path = out / METRICS_FILE
        data = path.read_bytes() if path.exists() else b""
        if len(data) < start_bytes:
            raise TrainerError(f"{path}: shorter than its checkpoint says; was it cut?")
        _parse(data[:start_bytes], path)  # damage shows now, not when the run is through
        self._file = path.open("ab")
        self._file.truncate(start_bytes)
        self._file.seek(start_bytes)

    def append(self, kind: str, **fields: Any) -> None:
        """Add one line; numbers only, rounded to six digits for reading."""
        rounded = {key: _rounded(value) for key, value in fields.items()}
        self._file.write(json.dumps({"kind": kind, **rounded}, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Force the file to disk and return its length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


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


def draw_loss_curve(out: Path, title: str) -> None:
    """RUN/loss.png: training and held-out loss over the step, loss on a log axis."""
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss (log scale)", yscale="log")
    styles: dict[str, dict[str, Any]] = {
        "train": {"color": "0.6", "linewidth": 1},
        "holdout": {"color": "C0", "marker": "o", "markersize": 4},
    }
    for kind, style in styles.items():
        chosen = [line for line in lines if line["kind"] == kind]
        if chosen:
            label = {"train": "training", "holdout": "held out"}[kind]
            axes.plot(
                [c["step"] for c in chosen], [c["loss"] for c in chosen], label=label, **style
            )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    with atomic_file(out / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)
