"""Learning curve: the same features and seeds, with fewer normal images to fit on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluator.datasets import Category
from evaluator.gaussians import LayerSource
from evaluator.metrics import measure
from evaluator.padim import anomaly_maps, score
from evaluator.plan import make_plan
from evaluator.report import CellConfig, LearningPoint, Metric
from evaluator.statistics import statistics

if TYPE_CHECKING:
    from evaluator.cells import Resources, Truth


def learning_curve(
    layers: Sequence[LayerSource],
    category: Category,
    truth: Truth,
    config: CellConfig,
    resources: Resources,
    device: torch.device,
) -> list[LearningPoint]:
    """The metrics for each number in `config.learning_curve` below the category's own.

    The images are the first ones of one fixed shuffle, so each set holds the smaller ones, and
    every backbone fits on the same.
    """
    train, test = len(category.train), len(category.test)
    order = np.argsort(np.random.Philox(key=0).random_raw(train), kind="stable")
    dims = [draw.indices for draw in config.dims]
    shapes = [(layer.channels, layer.height, layer.width) for layer in layers]
    points = []
    for number in config.learning_curve:
        if number >= train:
            continue
        plan = make_plan(
            shapes,
            dims,
            number,
            test,
            resources.max_memory_bytes,
            resources.cores,
            images=train + test,
        )
        chosen = sorted(order[:number].tolist())
        tested = range(train, train + test)
        scored = score(layers, dims, chosen, tested, config.protocol.epsilon, plan, device)
        measured = [
            measure(statistics(anomaly_maps(one, config.protocol), truth.regions, truth.defective))
            for one in scored.distance
        ]
        points.append(LearningPoint(train=number, metrics=by_metric(measured)))
    return points


def by_metric(measured: Sequence[dict[Metric, float | None]]) -> dict[Metric, list[float]]:
    """Metric -> one value a seed, without the metrics that the category does not have."""
    found: dict[Metric, list[float]] = {}
    for metric in measured[0]:
        values = [one[metric] for one in measured]
        known = [value for value in values if value is not None]
        if known:
            found[metric] = known
    return found
