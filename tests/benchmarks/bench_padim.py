"""PaDiM's distances against the naive version, and AUROC against scikit-learn."""

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from evaluator.metrics import auroc
from evaluator.padim import LayerFeatures, distance_tiles, draw_dims, plan_tiles
from tests import naive
from tests.benchmarks.timing import seconds, table

TRAIN, TEST = 100, 40
SHAPES = {"ResNet-18": ([64, 128, 256], 100), "WideResNet-50-2": ([256, 512, 1024], 550)}
NAIVE_ROWS = 8  # the naive version works on this many rows of the 56


def main() -> None:
    """Time fit and score at full size, the naive version on a part of it."""
    for name, (channels, dims) in SHAPES.items():
        distances(name, channels, dims)
    metrics()


def distances(name: str, channels: list[int], dims: int) -> None:
    """Fit on 100 images, score 40, 56 x 56 positions; the naive version on 8 x 8 of them."""
    rng = np.random.default_rng(0)
    grids = (56, 28, 14)
    layers = [
        LayerFeatures(g, g, rng.normal(size=(g * g, TRAIN + TEST, c)).astype(np.float32))
        for g, c in zip(grids, channels, strict=True)
    ]
    chosen = draw_dims(sum(channels), dims, 0)
    tile, workers = plan_tiles(TRAIN + TEST, dims, 2**30, 2)

    def ours() -> None:
        for _ in distance_tiles(layers, chosen, TRAIN, 0.01, tile, workers, torch.device("cpu")):
            pass

    parts = [
        layer.values.reshape(layer.height, layer.width, TRAIN + TEST, -1).transpose(2, 3, 0, 1)
        for layer in layers
    ]
    small = [
        part[:, :, : NAIVE_ROWS * g // 56, : NAIVE_ROWS * g // 56]
        for part, g in zip(parts, grids, strict=True)
    ]
    fast = seconds(ours, 1) / 56**2
    slow = seconds(lambda: naive.padim_distances(small, chosen, TRAIN, 0.01), 1) / NAIVE_ROWS**2
    table(
        f"PaDiM fit and score, {name}: {dims} dimensions, {TRAIN} + {TEST} images",
        "ms/pos.",
        [
            ("evaluator, two tiles at a time", fast * 1e3, f"{fast * 56**2:.1f} s a seed"),
            ("naive, explicit inverse", slow * 1e3, ""),
        ],
    )


def metrics() -> None:
    """Pixel AUROC of two million pixels."""
    rng = np.random.default_rng(0)
    score = rng.normal(size=2_000_000).astype(np.float32)
    defective = rng.random(score.size) < 0.02
    table(
        "pixel AUROC, two million pixels",
        "s",
        [
            ("evaluator", seconds(lambda: auroc(defective, score), 2), ""),
            ("scikit-learn", seconds(lambda: roc_auc_score(defective, score), 2), ""),
        ],
    )


if __name__ == "__main__":
    main()
