"""metrics.jsonl: one JSON object a line, and the loss curve drawn from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError

METRICS_FILE = "metrics.jsonl"
RECENT_STEPS = 100


class MetricsLog:
    """Appends to RUN/metrics.jsonl; starts at `bytes`, dropping what a killed run wrote beyond."""

    def __init__(self, out: Path, start_bytes: int) -> None:
        self._file = (out / METRICS_FILE).open("ab")
        if self._file.seek(0, os.SEEK_END) < start_bytes:
            raise TrainerError(
                f"{out / METRICS_FILE}: shorter than its checkpoint says; was it cut?"
            )
        self._file.truncate(start_bytes)
        self._file.seek(start_bytes)

    def append(self, kind: str, **fields: Any) -> None:
        """Add one line; numbers only, rounded to six digits for reading."""
        rounded = {key: _rounded(value) for key, value in fields.items()}
        self._file.write(json.dumps({"kind": kind, **rounded}).encode() + b"\n")
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
    """The lines of metrics.jsonl; a last line that was cut by a kill is left out."""
    lines = []
    for line in (out / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def recent_train_loss(lines: list[dict[str, Any]]) -> float:
    """Mean training loss of the last RECENT_STEPS steps, each line weighted by its steps."""
    train = [line for line in lines if line["kind"] == "train"]
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
    figure.savefig(out / "loss.png", dpi=120)
