"""PaDiM's fit and score: the evaluator, anomalib's own classes and the naive version.

Each in a process of its own, on one thread, on the same made-up features. Memory is the peak of
the process from when its features are there: libraries, features and all work. The evaluator holds
every channel of every layer at its own resolution; anomalib holds what its memory bank does, the
chosen dimensions repeated onto the finest grid.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from evaluator.padim import draw_dims, repeated_index
from tests import naive
from tests.benchmarks.memory import forget_peak, peak_bytes

TRAIN, TEST = 200, 40
GRIDS = (56, 28, 14)
SIZES = {
    "ResNet-18": ((64, 128, 256), 100),
    "WideResNet-50-2": ((256, 512, 1024), 550),
}
SEEDS = 5  # how many seeds "a further seed" is measured with
NAIVE_POSITIONS = 8  # rows and columns that the naive version scores, of 56
EPSILON = 0.01
ANOMALIB_BATCH = 32  # its default
ANOMALIB_EPSILON = EPSILON + 1e-5  # what its inverse adds to the diagonal


def main() -> None:
    """Print seconds, memory and differences for each size."""
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            compare(size, Path(folder))


def compare(size: str, folder: Path) -> None:
    """One table; a contestant that is not installed is named and left out."""
    channels, dims = SIZES[size]
    print(
        f"\nPaDiM fit and score, {size}: {dims} of {sum(channels)} dimensions, 56 x 56 positions,"
    )
    print(f"{TRAIN} + {TEST} images, one thread, each in its own process; CPU seconds")
    rows = [run(size, name, folder) for name in ("evaluator", "several seeds", "naive")]
    if importlib.util.find_spec("anomalib") is None:
        print("  anomalib is not installed (extra `bench`): left out")
    else:
        rows.append(run(size, "anomalib", folder))
    ours = rows[0]
    for row in rows:
        ratios = f"x{row['cpu_s'] / ours['cpu_s']:8.2f}  x{row['peak'] / ours['peak']:6.2f} memory"
        print(
            f"  {row['name']:<16} {row['cpu_s']:9.2f} s (wall {row['wall_s']:.2f})  "
            f"{row['peak'] / 1e9:6.2f} GB  {ratios}  {row['remark']}"
        )
    further = (rows[1]["cpu_s"] - ours["cpu_s"]) / (SEEDS - 1)
    print(f"  a further seed   {further:9.2f} s  ({SEEDS} seeds in one pass)")
    for row in rows[2:]:
        print(f"  largest relative difference to {row['name']}: {differs(row, ours, folder):.1e}")


def differs(row: dict, ours: dict, folder: Path) -> float:
    """Largest relative difference of the distances, at the positions that `row` has."""
    theirs = np.load(folder / f"{row['name']}.npy")
    mine = np.load(folder / f"{ours['name']}.npy")[..., : theirs.shape[-2], : theirs.shape[-1]]
    return float((np.abs(mine - theirs) / theirs).max())


def run(size: str, name: str, folder: Path) -> dict:
    """Start a contestant in a fresh interpreter on one thread and read its one line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    module = "tests.benchmarks.bench_padim"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, size, name, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def layer_features(size: str, layer: int) -> np.ndarray:
    """float32 [images, rows, columns, channels]: a few causes, noise, then a ReLU."""
    rng = np.random.default_rng(layer)
    channels, grid = SIZES[size][0][layer], GRIDS[layer]
    causes = rng.standard_normal((TRAIN + TEST, grid, grid, 24), dtype=np.float32)
    mixing = rng.standard_normal((24, channels), dtype=np.float32)
    mixing *= 0.2 * rng.uniform(0.1, 1, channels).astype(np.float32)
    features = causes @ mixing
    for image in features:
        image += 0.1 * rng.standard_normal(image.shape, dtype=np.float32) + 0.2
    return np.maximum(features, 0, out=features)


def evaluator(size: str, seeds: int = 1):
    """Plan, fit and score; returns a function that does the work."""
    import torch

    from evaluator.padim import score
    from evaluator.plan import make_plan
    from tests.array_layers import ArrayLayer

    layers = [ArrayLayer(layer_features(size, index)) for index in range(len(GRIDS))]
    shapes = [(layer.channels, layer.height, layer.width) for layer in layers]
    channels, dims = SIZES[size]
    drawn = [draw_dims(sum(channels), dims, seed) for seed in range(seeds)]
    plan = make_plan(shapes, drawn, TRAIN, TEST, 2**30, cores=1)
    images = range(TRAIN + TEST)

    def work() -> np.ndarray:
        device = torch.device("cpu")
        fitted, tested = images[:TRAIN], images[TRAIN:]
        return score(layers, drawn, fitted, tested, EPSILON, plan, device).distance[0]

    return work, f"{plan.form} form, {plan.peak_bytes / 1e9:.2f} GB planned beside the features"


def embedding(size: str, cells: int = GRIDS[0]) -> np.ndarray:
    """Chosen dimensions, repeated (nearest), float32 [images, dims, rows, columns]."""
    channels, dims = SIZES[size]
    chosen = np.array(draw_dims(sum(channels), dims, 0))
    parts = []
    for index, grid in enumerate(GRIDS):
        first = sum(channels[:index])
        own = chosen[(chosen >= first) & (chosen < first + channels[index])] - first
        place = repeated_index(GRIDS[0], grid)[:cells]
        part = layer_features(size, index)[..., own].transpose(0, 3, 1, 2)
        parts.append(part[:, :, place][:, :, :, place])
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def anomalib(size: str):
    """Its MultiVariateGaussian and the distance of its PadimModel, as its PadimModel calls them."""
    import torch
    from anomalib.models.components import MultiVariateGaussian
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

    torch.set_num_threads(1)
    images = torch.from_numpy(embedding(size))
    gaussian = MultiVariateGaussian()

    def work() -> np.ndarray:
        with torch.no_grad():
            statistics = gaussian.fit(images[:TRAIN])
            batches = images[TRAIN:].split(ANOMALIB_BATCH)
            distance = [AnomalyMapGenerator.compute_distance(each, statistics) for each in batches]
            return torch.cat(distance)[:, 0].numpy()

    return work, f"its epsilon is {ANOMALIB_EPSILON:.5f}"


def naively(size: str):
    """The naive version on a corner of the grid; its seconds are scaled up to all positions."""
    corner = embedding(size, NAIVE_POSITIONS)
    dims = list(range(corner.shape[1]))
    remark = f"from {NAIVE_POSITIONS} x {NAIVE_POSITIONS} positions, explicit inverse"
    return lambda: naive.padim_distances([corner], dims, TRAIN, EPSILON), remark


def contestant(size: str, name: str, folder: Path) -> None:
    """Do the work of one contestant, keep its distances, print its figures as JSON."""
    makers = {
        "evaluator": lambda: evaluator(size),
        "several seeds": lambda: evaluator(size, SEEDS),
        "anomalib": lambda: anomalib(size),
        "naive": lambda: naively(size),
    }
    work, remark = makers[name]()
    forget_peak()
    repeats = 3 if name in ("evaluator", "several seeds") else 1
    cpu, wall, found = [], [], np.empty(0)
    for _ in range(repeats):
        start = time.process_time(), time.perf_counter()
        found = work()
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    np.save(folder / f"{name}.npy", found)
    scale = (GRIDS[0] / NAIVE_POSITIONS) ** 2 if name == "naive" else 1
    figures = {"cpu_s": min(cpu) * scale, "wall_s": min(wall) * scale, "peak": peak_bytes()}
    print(json.dumps({"name": name, "remark": remark} | figures))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        contestant(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        main()
