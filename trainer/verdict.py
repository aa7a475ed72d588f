"""Whether runs came to the same end: ledger, losses, weights; for `trainer selftest --chaos`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from trainer.artifacts import sha256_of
from trainer.errors import TrainerError
from trainer.ledger import digest, expected_sums

Array = npt.NDArray[np.floating]

LEDGER_KEYS = ("epoch", "samples", "digest")


def ledger_faults(out: Path, train_samples: int, epochs: int) -> list[str]:
    """What is wrong with the epochs of RUN/ledger.json; each must hold every sample once."""
    found = [
        tuple(line[key] for key in LEDGER_KEYS) for line in _json(out / "ledger.json")["epochs"]
    ]
    expected_digest = digest(expected_sums(train_samples)[1:])
    expected = [(epoch, train_samples, expected_digest) for epoch in range(epochs)]
    return [] if found == expected else [f"{out.name}: ledger {found}, expected {expected}"]


def loss_of_run(out: Path) -> tuple[float, list[str]]:
    """The mean loss over all steps by metrics.jsonl, and what is wrong with its step numbers."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    steps = [0, *(line["step"] for line in train)]
    wrong = [
        f"{out.name}: the line of step {after} covers {line['steps']} steps after step {before}"
        for before, after, line in zip(steps, steps[1:], train, strict=False)
        if after - before != line["steps"]
    ]
    total = sum(line["loss"] * line["steps"] for line in train)
    return total / sum(line["steps"] for line in train), wrong


def weights_distance(calm: Path, other: Path, start: Mapping[str, Array]) -> float:
    """|other - calm| over |calm - start|, of all weights with two or more dimensions as one vector.

    `start` holds the weights before the first step. Gains, biases and statistics of batch norms are
    left out: a shift that the next batch norm takes away has no gradient but rounding errors, which
    Adam makes as large as any other.
    """
    first, second = _weights(calm), _weights(other)
    if first.keys() != second.keys() or not first.keys() <= start.keys():
        return float("inf")
    moved = sum(float(np.square(first[name] - start[name]).sum()) for name in first)
    apart = sum(float(np.square(second[name] - first[name]).sum()) for name in first)
    return float(np.sqrt(apart / max(moved, 1e-30)))


def _weights(out: Path) -> dict[str, Array]:
    found = load_file(out / "backbone.safetensors")
    return {name: value.astype(np.float64) for name, value in found.items() if value.ndim > 1}


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two runs exported the same file."""
    name = "backbone.safetensors"
    return sha256_of((a / name).read_bytes()) == sha256_of((b / name).read_bytes())


def verdict(
    calm: Path,
    same: Path,
    elastic: Path,
    start: Mapping[str, Array],
    train_samples: int,
    epochs: int,
    *,
    weights_tolerance: float,
    loss_tolerance: float,
) -> Sequence[str]:
    """A line for each comparison that held; TrainerError with all that did not."""
    faults: list[str] = []
    losses = []
    for out in (calm, same, elastic):
        faults += ledger_faults(out, train_samples, epochs)
        loss, wrong = loss_of_run(out)
        losses.append(loss)
        faults += wrong
    if not same_bytes(calm, same):
        faults.append(
            f"weights of {same.name} differ from the calm run's, by "
            f"{weights_distance(calm, same, start):.2g} of what that moved them"
        )
    distance = weights_distance(calm, elastic, start)
    if not distance <= weights_tolerance:
        faults.append(
            f"weights of {elastic.name} differ by {distance:.2g} of what the calm run moved them, "
            f"expected at most {weights_tolerance:g}"
        )
    for out, loss, tolerance in ((same, losses[1], 1e-5), (elastic, losses[2], loss_tolerance)):
        if not abs(loss / losses[0] - 1) <= tolerance:
            faults.append(
                f"mean loss of {out.name} is {loss:.6g}, of the calm run {losses[0]:.6g}; expected "
                f"within {tolerance:g}"
            )
    if faults:
        raise TrainerError("DIFFERENT: " + "; ".join(faults))
    return [
        f"ledger: {epochs} epochs of {train_samples} samples, each once, in all three runs",
        "one process: the weights of the calm run, bit for bit",
        f"changing processes: weights within {distance:.1g} of what the calm run moved them (at "
        f"most {weights_tolerance:g}), mean loss within {abs(losses[2] / losses[0] - 1):.1g} (at "
        f"most {loss_tolerance:g})",
    ]


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())
