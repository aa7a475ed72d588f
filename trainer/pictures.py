"""The pictures of a run: its curves, and figure 5 of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.artifacts import atomic_file
from trainer.metrics import read_metrics

CURVES_FILE = "curves.png"


def draw_curves(out: Path, title: str) -> None:
    """RUN/curves.png: training and held-out loss over the step, loss on a log axis."""
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
    with atomic_file(out / CURVES_FILE) as file:
        figure.savefig(file, format="png", dpi=120)
