"""Uncertainty: bootstrap intervals over images, paired differences, Holm's correction.

Resampled are the test images of each category, good and defective ones apart, with the same draws
for all backbones and seeds. A draw of a cell is the mean over its seeds; a draw of a group is the
mean over its categories, whose draws are independent.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluator.bootstrap import bootstrap, holm, image_weights, interval, p_value
from evaluator.report import Bootstrap, Comparison, Group, Metric, TableRow
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

Draws = dict[tuple[str, str, Metric], npt.NDArray[np.float64]]


def cell_draws(
    category: str,
    statistics: Mapping[str, Sequence[Statistics]],
    settings: Bootstrap,
) -> Draws:
    """The draws of one category's cells, in percent: by (category, backbone, metric).

    `statistics` holds one entry per seed for each backbone.
    """
    found: Draws = {}
    if settings.draws == 0:
        return found
    first = next(iter(statistics.values()))[0]
    # Another stream for each category: their draws are independent.
    stream = settings.seed + (zlib.crc32(category.encode()) << 32)
    weights = image_weights(first.image_defective, settings.draws, stream)
    for backbone, seeds in statistics.items():
        for metric in RESAMPLED:
            values = [bootstrap(one, weights, metric) for one in seeds]
            kept = [value for value in values if value is not None]
            if kept:
                found[category, backbone, metric] = 100 * np.mean(kept, axis=0)
    return found


def group_draws(draws: Draws, members: Mapping[Group, Sequence[str]]) -> Draws:
    """The draws of the groups' means, by (group, backbone, metric)."""
    found: Draws = {}
    for group, categories in members.items():
        for backbone, metric in dict.fromkeys((key[1], key[2]) for key in draws):
            parts = [draws.get((category, backbone, metric)) for category in categories]
            kept = [part for part in parts if part is not None]
            if kept and len(kept) == len(parts):
                found[group, backbone, metric] = np.mean(kept, axis=0)
    return found


def with_intervals(
    rows: Sequence[TableRow], draws: Draws, groups: Draws, level: float
) -> list[TableRow]:
    """The rows with the intervals of their draws, where there are any."""
    result = []
    for row in rows:
        values = _draws_of(row, draws, groups)
        if values is None:
            result.append(row)
            continue
        low, high = interval(values, level)
        result.append(row.model_copy(update={"low": round(low, 4), "high": round(high, 4)}))
    return result


def _draws_of(row: TableRow, draws: Draws, groups: Draws) -> npt.NDArray[np.float64] | None:
    if row.category == MEAN:
        return groups.get((row.group, row.backbone, row.metric))
    return draws.get((row.category, row.backbone, row.metric))


@dataclass(frozen=True)
class _Pair:
    a: TableRow
    b: TableRow
    low: float
    high: float
    p: float


def comparisons(
    rows: Sequence[TableRow], draws: Draws, groups: Draws, level: float
) -> list[Comparison]:
    """All pairs of backbones, for every category, group and resampled metric.

    Holm's family: the pairs of all categories under one metric; those of the groups' means are a
    family of their own.
    """
    found: list[Comparison] = []
    for metric in RESAMPLED:
        for of_groups in (False, True):
            pairs = list(_pairs(rows, metric, of_groups, draws, groups, level))
            corrected = holm([pair.p for pair in pairs])
            found += [
                Comparison(
                    group=pair.a.group,
                    category=pair.a.category,
                    metric=metric,
                    a=pair.a.backbone,
                    b=pair.b.backbone,
                    difference=round(pair.a.mean - pair.b.mean, 4),
                    low=round(pair.low, 4),
                    high=round(pair.high, 4),
                    p=pair.p,
                    p_holm=p_holm,
                    distinct=p_holm < 1 - level,
                )
                for pair, p_holm in zip(pairs, corrected, strict=True)
            ]
    return found


def _pairs(
    rows: Sequence[TableRow],
    metric: Metric,
    of_groups: bool,
    draws: Draws,
    groups: Draws,
    level: float,
) -> Iterator[_Pair]:
    wanted = [row for row in rows if row.metric == metric and (row.category == MEAN) == of_groups]
    for a, b in itertools.combinations(wanted, 2):
        if (a.group, a.category) != (b.group, b.category):
            continue
        draws_a, draws_b = _draws_of(a, draws, groups), _draws_of(b, draws, groups)
        if draws_a is None or draws_b is None:
            continue
        difference = draws_a - draws_b
        low, high = interval(difference, level)
        yield _Pair(a, b, low, high, p_value(difference))
