"""Uncertainty: bootstrap intervals over images, paired differences, Holm's correction.

Resampled are the test images of each category, good and defective ones apart, with the same draws
for all backbones and seeds. A draw of a cell is the mean over its seeds; a draw of a group is the
mean over its categories, whose draws are independent.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluator.bootstrap import (
    Draws,
    Weights,
    holm,
    interval,
    p_value,
    resampler,
    t_test_p,
    weight_chunks,
    without_each,
)
from evaluator.report import MOST_DRAWS, Bootstrap, Comparison, Group, Metric
from evaluator.statistics import Statistics

# F1-max and the pixels' average precision have no statistics that images add up to.
RESAMPLED: tuple[Metric, ...] = (
    "pixel_auroc",
    "aupro_30",
    "aupro_05",
    "aupro_01",
    "image_auroc",
    "image_ap",
)
MEAN = "mean"  # the `category` of a group's mean
CHUNK_BYTES = 2**23  # about ten such arrays are alive at once


@dataclass(frozen=True)
class Resampled:
    """A number in percent, and what becomes of it with other test images.

    draws: float64 [draws]. without: for each kind of image of each category, float64 [its images],
    the number without one of them, up to a constant.
    """

    value: float
    draws: Draws
    without: tuple[Draws, ...]


Found = dict[tuple[str, Metric], Resampled]  # by backbone and metric
Functions = Mapping[tuple[str, Metric], Sequence[Callable[[Weights], Draws]]]  # one per seed


def resample(
    category: str,
    statistics: Mapping[str, Sequence[Statistics]],
    settings: Bootstrap,
    chunk_bytes: int = CHUNK_BYTES,
    metrics: Sequence[Metric] = RESAMPLED,
) -> Found:
    """One category's numbers with their draws; nothing where no draws are wanted.

    `statistics` holds one entry per seed for each backbone. The draws are the same for every
    `chunk_bytes`, up to rounding: only so large is an array while resampling.
    """
    if settings.draws == 0:
        return {}
    functions = {
        (backbone, metric): kept
        for backbone, seeds in statistics.items()
        for metric in metrics
        if (kept := [one for s in seeds if (one := resampler(s, metric)) is not None])
    }
    everything = [s for seeds in statistics.values() for s in seeds]
    defective = everything[0].image_defective
    images = len(defective)
    widest = max(
        max(images, s.grid_negatives.shape[1] + 1, len(s.region_image)) for s in everything
    )
    rows = max(1, chunk_bytes // (8 * widest))
    # Another stream for each category: their draws are independent.
    stream = settings.seed + (zlib.crc32(category.encode()) << 32)
    chunks = weight_chunks(defective, settings.draws, stream, rows)
    draws = _evaluated(functions, chunks, settings.draws)
    without = _evaluated(functions, without_each(images, rows), images)
    value = _evaluated(functions, [np.ones((1, images), np.uint16)], 1)
    return {
        key: Resampled(
            value=float(value[key][0]),
            draws=draws[key],
            without=(without[key][~defective], without[key][defective]),
        )
        for key in functions
    }


def _evaluated(
    functions: Functions, chunks: Iterable[Weights], count: int
) -> dict[tuple[str, Metric], Draws]:
    """The mean over seeds, in percent, for each of `count` rows of weights."""
    found = {key: np.empty(count) for key in functions}
    first = 0
    for weights in chunks:
        for key, seeds in functions.items():
            values = np.mean([one(weights) for one in seeds], axis=0)
            found[key][first : first + len(weights)] = 100 * values
        first += len(weights)
    return found


def add_to_groups(
    sums: dict[Group, Found], members: Mapping[Group, Sequence[str]], category: str, found: Found
) -> None:
    """Add one category's share to the means of its groups in `sums`, one category at a time."""
    for group, categories in members.items():
        if category not in categories:
            continue
        so_far = sums.setdefault(group, {})
        for key, one in found.items():
            before = so_far.get(key, Resampled(0.0, np.zeros(len(one.draws)), ()))
            so_far[key] = Resampled(
                value=before.value + one.value / len(categories),
                draws=before.draws + one.draws / len(categories),
                without=(*before.without, *(x / len(categories) for x in one.without)),
            )


def complete(found: Found, categories: Sequence[str]) -> Found:
    """The means to which all of a group's categories have come."""
    return {key: one for key, one in found.items() if len(one.without) == 2 * len(categories)}


def distinct_groups(members: Mapping[Group, Sequence[str]]) -> list[Group]:
    """The groups whose means are numbers of their own.

    The mean of one category is that category; `all` repeats a group that is alone.
    """
    seen: list[set[str]] = []
    groups: list[Group] = []
    for group, categories in members.items():
        if len(categories) > 1 and set(categories) not in seen:
            seen.append(set(categories))
            groups.append(group)
    return groups


@dataclass(frozen=True)
class Pair:
    """The paired difference a - b of two backbones, before Holm's correction."""

    group: Group
    category: str
    metric: Metric
    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float


def pairs_of(group: Group, category: str, found: Found, level: float) -> list[Pair]:
    """All pairs of backbones of one category or group, under every resampled metric.

    p: the larger of the bootstrap's and of the jackknife's t test. With few images the bootstrap
    is too sure of itself: it draws the same few sets again and again.
    """
    pairs = []
    for (a, one), (b, other) in itertools.combinations(found, 2):
        if one != other:
            continue
        x, y = found[a, one], found[b, one]
        draws = x.draws - y.draws
        low, high = interval(draws, level)
        difference = x.value - y.value
        without = [left - right for left, right in zip(x.without, y.without, strict=True)]
        p = max(p_value(draws), t_test_p(difference, without))
        pairs.append(Pair(group, category, one, a, b, difference, low, high, p))
    return pairs


def comparisons(pairs: Sequence[Pair], level: float) -> list[Comparison]:
    """The pairs with Holm's correction, by metric, categories before groups.

    Holm's family: the pairs of all categories under one metric; those of the groups' means are a
    family of their own.
    """
    found: list[Comparison] = []
    for metric, of_groups in itertools.product(RESAMPLED, (False, True)):
        family = [p for p in pairs if (p.metric, p.category == MEAN) == (metric, of_groups)]
        corrected = holm([pair.p for pair in family])
        found += [
            Comparison(
                group=pair.group,
                category=pair.category,
                metric=pair.metric,
                a=pair.a,
                b=pair.b,
                difference=round(pair.difference, 4),
                low=round(pair.low, 4),
                high=round(pair.high, 4),
                p=pair.p,
                p_holm=p_holm,
                distinct=p_holm < 1 - level,
            )
            for pair, p_holm in zip(family, corrected, strict=True)
        ]
    return found


def undecidable(comparisons: Sequence[Comparison], draws: int, level: float) -> str | None:
    """One line where so few draws cannot tell anything apart in the largest of Holm's families.

    The smallest p is 2 / (1 + draws), and Holm multiplies it by the number of comparisons.
    """
    families = Counter((pair.metric, pair.category == MEAN) for pair in comparisons)
    largest = max(families.values(), default=0)
    if draws == 0 or level >= 1 or largest * 2 / (1 + draws) < 1 - level:
        return None
    among = "1 comparison" if largest == 1 else f"{largest} comparisons of a metric"
    told = f"{draws} draws cannot tell anything apart among {among}"
    needed = math.ceil(4 * largest / (1 - level))  # twice as many as the fewest that can
    rounded = 10 ** (len(str(needed)) - 1)
    enough = -(-needed // rounded) * rounded
    if enough > MOST_DRAWS:
        return f"{told}; compare fewer backbones or categories"
    return f"{told}; use --bootstrap {enough}"
