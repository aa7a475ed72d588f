"""Arm minus baseline, with an interval for both what other test images and other training runs do.

The bootstrap over test images says how far a difference would move on other photographs of the
same parts; it knows nothing of another training run with another seed. With two seeds an arm's own
spread says little, so the variance between training seeds is pooled over all arms, and added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from evaluator.bootstrap import holm
from evaluator.evidence.gathered import METRICS, Result, Scored
from evaluator.report import Metric

LEVEL = 0.95


@dataclass(frozen=True)
class Noise:
    """Variance of a score between training seeds, pooled over arms, and its degrees of freedom."""

    variance: float
    freedom: int


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline on a category or a mean of several, in percentage points."""

    arm: str
    baseline: str
    categories: str
    metric: Metric
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0

    @property
    def distinct(self) -> bool:
        """Told apart after Holm's correction."""
        return self.p_holm < 1 - LEVEL


def group_score(result: Result, categories: Sequence[str], metric: Metric) -> Scored | None:
    """The mean over categories, seed by seed and draw by draw; None where one has no such score."""
    parts = [result.scores.get((category, metric)) for category in categories]
    if not parts or any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    return Scored(
        seeds=np.mean([part.seeds for part in known], axis=0),
        sds=np.mean([part.sds for part in known], axis=0),
        draws=np.mean([part.draws for part in known], axis=0),
        images=sum(part.images for part in known),
    )


def pooled_noise(results: Sequence[Result], categories: Sequence[str], metric: Metric) -> Noise:
    """The variance between training seeds, from every arm that was trained with several."""
    squares, freedom = 0.0, 0
    for result in results:
        score = group_score(result, categories, metric)
        if result.arm.experiment.train is None or score is None or len(score.seeds) < 2:
            continue
        squares += float(((score.seeds - score.value) ** 2).sum())
        freedom += len(score.seeds) - 1
    return Noise(squares / freedom if freedom else math.nan, freedom)


def difference(
    arm: Result,
    baseline: Result,
    name: str,
    categories: Sequence[str],
    metric: Metric,
    noise: Noise,
) -> Difference | None:
    """One difference with its interval and p, before Holm's correction.

    Variance: that of the paired bootstrap draws, plus noise.variance / seeds of each side that
    differs from seed to seed (weights from a file have none). Student's t with Satterthwaite's
    degrees of freedom, images less two a category for the bootstrap's part. Arms that share their
    training runs are given the noise too, which makes them harder to tell apart, not easier.
    """
    x, y = group_score(arm, categories, metric), group_score(baseline, categories, metric)
    if x is None or y is None:
        return None
    of_images = float(np.nanvar(x.draws - y.draws, ddof=1))
    of_training = sum(
        noise.variance / len(side.seeds)
        for result, side in ((arm, x), (baseline, y))
        if not _fixed(result)
    )
    variance = of_images + of_training
    value = x.value - y.value
    if not variance > 0:
        return Difference(
            arm.arm.name, baseline.arm.name, name, metric, value, math.nan, math.nan, 1.0
        )
    parts = of_images**2 / max(1, x.images - 2 * len(categories))
    parts += of_training**2 / max(1, noise.freedom)
    freedom = variance**2 / parts
    error = math.sqrt(variance)
    half = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(freedom, -abs(value) / error))
    return Difference(
        arm.arm.name, baseline.arm.name, name, metric, value, value - half, value + half, p
    )


def _fixed(result: Result) -> bool:
    spec = result.arm.experiment.backbone
    return spec is not None and "{seed}" not in spec


def differences(results: Sequence[Result], groups: Mapping[str, Sequence[str]]) -> list[Difference]:
    """Every arm minus its baseline in every group; Holm's family: one group under one metric."""
    by_name = {result.arm.name: result for result in results}
    found: list[Difference] = []
    for name, categories in groups.items():
        for metric in METRICS:
            noise = pooled_noise(results, categories, metric)
            family = []
            for result in results:
                baseline = by_name.get(result.arm.experiment.baseline or "")
                if baseline is None:
                    continue
                one = difference(result, baseline, name, categories, metric, noise)
                if one is not None:
                    family.append(one)
            corrected = holm([one.p for one in family])
            found += [
                Difference(**{**vars(one), "p_holm": p})
                for one, p in zip(family, corrected, strict=True)
            ]
    return found
