"""How often two equally good backbones are told apart, by the number of test images.

    python -m tests.benchmarks null --cases 1000

Each line: share of made-up comparisons with p < 0.05 and p < 0.01, by the bootstrap alone and as
reported (at least the t test's); 5 and 1 % would be exact. A minute with 1000 cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from scipy.special import ndtr

from evaluator.bootstrap import p_value
from evaluator.compare import Found, add_to_groups, complete, pairs_of, resample
from evaluator.report import Bootstrap, Group
from evaluator.statistics import Statistics

DRAWS = 1000
PIXELS = 50_000
DEFECT = 665  # pixels of each defect


def detector(rng: np.random.Generator, bad: int, good: int) -> Statistics:
    """Pixels are normal around a level of their image, defects around one above it."""
    images = good + bad
    level = rng.normal(0, 0.3, images)
    defects = level[good:] + rng.normal(2, 0.7, bad)
    defective = np.arange(images) >= good
    positives = np.where(defective, DEFECT, 0)
    negatives = PIXELS - positives
    right = ndtr((defects[:, None] - level) / np.sqrt(2))
    score = level + 3
    score[good:] = np.maximum(score[good:], defects + 1.5)
    none = np.empty(0, np.uint32)
    return Statistics(
        above=none,
        tied=none,
        same_score=none.astype(np.bool_),
        region=none.astype(np.uint8),
        region_image=np.arange(good, images),
        region_pixels=np.full(bad, DEFECT),
        positives_of=positives,
        negatives_of=negatives,
        pairs=np.round(2 * DEFECT * negatives * right).astype(np.int64),
        grid_negatives=np.zeros((images, 1), np.uint32),
        grid_region=np.zeros((bad, 1), np.uint32),
        image_score=(score + rng.normal(0, 0.2, images)).astype(np.float32),
        image_defective=defective,
    )


def compared(rng: np.random.Generator, bad: int, good: int, categories: int, case: int) -> Found:
    """Two detectors on one category, or the means over several."""
    names = [f"category {index}" for index in range(categories)]
    settings = Bootstrap(draws=DRAWS, seed=case, level=0.95)
    sums: dict[Group, Found] = {}
    for name in names:
        pair = {backbone: [detector(rng, bad, good)] for backbone in ("a", "b")}
        add_to_groups(sums, {"own": names}, name, resample(name, pair, settings))
    return complete(sums["own"], names)


def shares(cases: int, bad: int, good: int, categories: int) -> Iterator[str]:
    """One line per metric."""
    rng = np.random.default_rng(1)
    found: dict[str, list[tuple[float, float]]] = {"pixel_auroc": [], "image_auroc": []}
    for case in range(cases):
        numbers = compared(rng, bad, good, categories, case)
        kept = {key: one for key, one in numbers.items() if key[1] in found}
        for pair in pairs_of("own", "mean", kept, 0.95):
            draws = numbers["a", pair.metric].draws - numbers["b", pair.metric].draws
            found[pair.metric].append((p_value(draws), pair.p))
    for metric, values in found.items():
        told = [
            " ".join(f"{np.mean(p < level):6.1%}" for level in (0.05, 0.01))
            for p in np.array(values).T
        ]
        yield (
            f"{categories:2} x ({bad} defective + {good} good) {metric}: "
            f"bootstrap {told[0]}, reported {told[1]}"
        )


def main(arguments: tuple[str, ...] = ()) -> None:
    """Print all lines; means over categories take fewer cases."""
    parser = argparse.ArgumentParser(prog="null", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    cases = parser.parse_args(arguments).cases
    single = [(3, 2, 1), (5, 5, 1), (10, 10, 1), (30, 12, 1), (60, 30, 1)]
    for bad, good, categories in (*single, (3, 2, 3), (5, 5, 3), (3, 2, 15)):
        for line in shares(max(1, cases // categories), bad, good, categories):
            print(line, flush=True)
