"""Metrics of eight million pixels against scikit-learn and a plain AU-PRO: time and peak memory.

One thread. A subprocess for each, so that its peak is its own; the arguments are made before.
anomalib's metrics are a further line where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from tests.benchmarks.timing import seconds, table

IMAGES, GOOD, SIZE = 160, 40, 224
REPEATS = 3
DRAWS = 2000
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main() -> None:
    """Time each way in a process of its own, and check that they agree."""
    names = ["ours", "sklearn_and_plain", "sklearn_all"]
    if importlib.util.find_spec("anomalib"):
        names.append("anomalib")
    found = {name: _measured(name) for name in names}
    pixels = IMAGES * SIZE**2
    table(
        f"metrics of {pixels / 1e6:.1f} million pixels, 3 % positive, one thread",
        "s",
        [
            (LABELS[name], one["seconds"], f"{one['bytes'] / pixels:.0f} bytes per pixel at peak")
            for name, one in found.items()
        ],
    )
    afterwards()
    for metric, value in found["ours"]["values"].items():
        others = [o["values"][metric] for o in found.values() if metric in o["values"]]
        error = max(abs(other - value) for other in others)
        print(f"  {metric:<14} {value:.6f}, largest difference {error:.1e}")


def afterwards() -> None:
    """What the stored counts cost: bytes, and seconds without maps."""
    from evaluator.bootstrap import resampler, weight_chunks
    from evaluator.metrics import CURVE_FPR, curves, measure
    from evaluator.ranks import good_false_positive_levels, label_regions
    from evaluator.statistics import load_statistics, save_statistics, statistics

    maps, masks = made_up()
    regions, _ = label_regions(masks)
    s = statistics(maps, regions, masks.any(axis=(1, 2)))
    data = save_statistics(s)
    weights = next(weight_chunks(s.image_defective, DRAWS, 0, DRAWS))
    pixel_auroc, aupro = (resampler(s, metric) for metric in ("pixel_auroc", "aupro_30"))
    ways = {
        "save": lambda: save_statistics(s),
        "load and check": lambda: load_statistics(data, "made up"),
        "nine metrics": lambda: measure(s),
        "ROC and PRO curves": lambda: curves(s, CURVE_FPR),
        f"weights of {DRAWS} draws": lambda: next(
            weight_chunks(s.image_defective, DRAWS, 0, DRAWS)
        ),
        f"pixel AUROC of {DRAWS} draws": lambda: pixel_auroc(weights),
        f"AUPRO at 0.3 of {DRAWS} draws": lambda: aupro(weights),
        "levels of all maps": lambda: good_false_positive_levels(maps, maps[~s.image_defective]),
    }
    rows = [(name, seconds(way, REPEATS) * 1e3, "") for name, way in ways.items()]
    size = f"{len(data)} bytes of file, {len(data) / s.positives:.2f} per positive pixel"
    table(f"afterwards: {size}", "ms", rows)


def _measured(name: str) -> dict:
    command = [sys.executable, "-m", "tests.benchmarks.bench_metrics", name]
    done = subprocess.run(
        command, env={**os.environ, **ONE_THREAD}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def made_up() -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 and masks bool, [160, 224, 224]: three regions on each defective image."""
    rng = np.random.default_rng(0)
    masks = np.zeros((IMAGES, SIZE, SIZE), np.bool_)
    for mask in masks[GOOD:]:
        for _ in range(3):
            height, width = rng.integers(8, 42, 2)
            top, left = rng.integers(0, SIZE - 42, 2)
            mask[top : top + height, left : left + width] = True
    maps = rng.gamma(8, 1, masks.shape).astype(np.float32)
    maps += masks * rng.gamma(4, 1.5, (IMAGES, 1, 1)).astype(np.float32)
    return maps, masks


def ours(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """All nine metrics, and the counts that resampling needs."""
    from evaluator.metrics import measure
    from evaluator.ranks import label_regions
    from evaluator.statistics import statistics

    regions, _ = label_regions(masks)
    return measure(statistics(maps, regions, masks.any(axis=(1, 2))))


def sklearn_and_plain(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Two metrics: pixel AUROC by scikit-learn and AU-PRO as written."""
    from sklearn.metrics import roc_auc_score

    from tests import naive

    return {
        "pixel_auroc": roc_auc_score(masks.ravel(), maps.ravel()),
        "aupro_30": naive.au_pro(maps, masks, 0.3),
    }


def sklearn_all(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """All nine metrics."""
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    from tests import naive

    found = {}
    images = (masks.any(axis=(1, 2)), maps.max(axis=(1, 2)))
    for kind, (truth, score) in {"pixel": (masks.ravel(), maps.ravel()), "image": images}.items():
        found[f"{kind}_auroc"] = roc_auc_score(truth, score)
        found[f"{kind}_ap"] = average_precision_score(truth, score)
        precision, recall, _ = precision_recall_curve(truth, score)
        found[f"{kind}_f1_max"] = np.nanmax(2 * precision * recall / (precision + recall))
    curve = naive.pro_curve(maps, masks)
    for name, limit in (("aupro_30", 0.3), ("aupro_05", 0.05), ("aupro_01", 0.01)):
        found[name] = naive.area_up_to(*curve, limit) / limit
    return found


def anomalib(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Two metrics: pixel AUROC and AUPRO."""
    import torch
    from anomalib.metrics.aupro import _AUPRO
    from torchmetrics.classification import BinaryAUROC

    torch.set_num_threads(1)
    score, truth = torch.from_numpy(maps), torch.from_numpy(masks)
    score = (score - score.min()) / (score.max() - score.min())  # else a sigmoid saturates
    auroc, aupro = BinaryAUROC(), _AUPRO(fpr_limit=0.3)
    auroc.update(score.flatten(), truth.flatten().int())
    aupro.update(score, truth.int())
    return {"pixel_auroc": float(auroc.compute()), "aupro_30": float(aupro.compute())}


WAYS: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "ours": ours,
    "sklearn_and_plain": sklearn_and_plain,
    "sklearn_all": sklearn_all,
    "anomalib": anomalib,
}
LABELS = {
    "ours": "evaluator: nine metrics + statistics",
    "sklearn_and_plain": "scikit-learn AUROC + plain AU-PRO",
    "sklearn_all": "scikit-learn + plain AU-PRO, nine metrics",
    "anomalib": "anomalib: AUROC + AUPRO",
}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(name: str) -> None:
    """Run one way; print the best time, the growth of memory above the arguments, the values."""
    maps, masks = made_up()
    small = slice(GOOD - 2, GOOD + 2)
    WAYS[name](maps[small], masks[small])  # imports and compilation
    before = _peak_bytes()
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        values = WAYS[name](maps, masks)
        best = min(best, time.perf_counter() - start)
    values = {metric: float(value) for metric, value in values.items()}
    print(json.dumps({"seconds": best, "bytes": _peak_bytes() - before, "values": values}))


if __name__ == "__main__":
    if sys.argv[1:]:
        one(sys.argv[1])
    else:
        main()
