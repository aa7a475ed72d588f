"""Arm minus baseline, with an interval for both what other test images and other training runs do.

The bootstrap over test images says how far a difference would move on other photographs of the
same parts; it knows nothing of another training run with another seed. With two seeds an arm's own
spread says little, so the variance between training seeds is pooled over all arms of a network, and
added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from evaluator.bootstrap import holm
from evaluator.evidence.gathered import METRICS, Draws, Result, Scored
from evaluator.report import Metric

LEVEL = 0.95
STANDS_OUT = 0.001  # p of the F test of one arm's variance against the others'


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
    """The mean over the categories that have such a score, seed by seed and draw by draw.

    Those without masks have no pixel scores; None where all are such.
    """
    parts = [result.scores.get((category, metric)) for category in categories]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return Scored(
        seeds=np.mean([part.seeds for part in known], axis=0),
        sds=np.mean([part.sds for part in known], axis=0),
        draws=np.mean([part.draws for part in known], axis=0),
        without=tuple(kind / len(known) for part in known for kind in part.without),
    )


def pooled_noise(
    results: Sequence[Result], categories: Sequence[str], metric: Metric
) -> dict[str, Noise]:
    """The variance between training seeds by architecture, over arms trained with several.

    Without arms that stand out from the others, as one whose training hardly converges does: one
    such would widen every interval.
    """
    scores = [
        (result.arch, group_score(result, categories, metric))
        for result in results
        if result.arm.experiment.train is not None
    ]
    known: dict[str, list[Noise]] = {}
    for arch, score in scores:
        if score is not None and len(score.seeds) > 1:
            known.setdefault(arch, []).append(_own(score))
    return {arch: _pool(noises) for arch, noises in known.items()}


def _pool(noises: list[Noise]) -> Noise:
    while True:
        alike = [
            one
            for index, one in enumerate(noises)
            if not _stands_out(one, _sum(noises[:index] + noises[index + 1 :]))
        ]
        if len(alike) == len(noises):
            return _sum(noises)
        noises = alike


def _sum(noises: Sequence[Noise]) -> Noise:
    freedom = sum(one.freedom for one in noises)
    squares = sum(one.variance * one.freedom for one in noises)
    return Noise(squares / freedom if freedom else 0.0, freedom)


def _own(score: Scored) -> Noise:
    return Noise(float(np.var(score.seeds, ddof=1)), len(score.seeds) - 1)


def _stands_out(own: Noise, others: Noise) -> bool:
    """Whether a variance is larger than the others' by an F test at STANDS_OUT."""
    if not others.variance > 0:
        return False
    ratio = own.variance / others.variance
    return float(special.fdtrc(own.freedom, others.freedom, ratio)) < STANDS_OUT


def noise_of(result: Result, score: Scored, pooled: Mapping[str, Noise]) -> Noise | None:
    """The variance between seeds of an arm's single run; None where nothing tells it.

    The pooled one of its architecture; the arm's own where that stands out, and of random weights
    wherever it is larger; 0 for weights from a file.
    """
    spec = result.arm.experiment.backbone
    if spec is not None and "{seed}" not in spec:
        return Noise(0.0, 1)
    trained = pooled.get(result.arch)
    if len(score.seeds) < 2:
        return trained
    own = _own(score)
    if trained is None:
        return own if spec is not None else None
    larger = own.variance > trained.variance if spec else _stands_out(own, trained)
    return own if larger else trained


def paired_noise(x: Scored, y: Scored) -> Noise | None:
    """The variance between seeds of x minus y, two views of the same training runs; or None.

    Not pooled over arms: those that share runs are not independent, nor equally noisy.
    """
    pairs = x.seeds - y.seeds
    return Noise(float(np.var(pairs, ddof=1)), len(pairs) - 1) if len(pairs) > 1 else None


def shares_runs(arm: Result, baseline: Result) -> bool:
    """Whether an arm is another view of its baseline's training runs, seed by seed."""
    same = arm.arm.experiment.seeds == baseline.arm.experiment.seeds
    return same and arm.arm.experiment.runs == baseline.arm.name


def difference(
    arm: Result,
    baseline: Result,
    name: str,
    categories: Sequence[str],
    metric: Metric,
    pooled: Mapping[str, Noise],
) -> Difference | None:
    """One difference with its interval and p, before Holm's correction.

    Variance: that of the paired bootstrap draws, plus `noise_of` each side over its number of
    seeds. Student's t with Satterthwaite's degrees of freedom; the images' part has those of the
    jackknife, by kind of image, for few of a kind make the bootstrap too sure of itself. Of arms
    that share their training runs the seeds are paired too: `paired_noise` takes the place of both
    sides'. NaN and p = 1 where no run was made twice.
    """
    x, y = group_score(arm, categories, metric), group_score(baseline, categories, metric)
    if x is None or y is None:
        return None
    value = x.value - y.value
    sides = [(noise_of(arm, x, pooled), x), (noise_of(baseline, y, pooled), y)]
    if shares_runs(arm, baseline):
        sides = [(paired_noise(x, y), x)]
    known = [
        (noise.variance / len(side.seeds), noise.freedom)
        for noise, side in sides
        if noise is not None
    ]
    kinds = [a - b for a, b in zip(x.without, y.without, strict=True)]
    of_images = (float(np.nanvar(x.draws - y.draws, ddof=1)), _image_freedom(kinds))
    names = (arm.arm.name, baseline.arm.name, name, metric)
    error = None if len(known) < len(sides) else _error([of_images, *known])
    if error is None:
        return Difference(*names, value, math.nan, math.nan, 1.0)
    p = 2 * float(special.stdtr(error.freedom, -abs(value) / error.size))
    return Difference(*names, value, value - error.half, value + error.half, p)


def half_interval(
    result: Result, categories: Sequence[str], metric: Metric, pooled: Mapping[str, Noise]
) -> float:
    """Half the 95 % interval of an arm's own score, of the same parts as a difference's; or NaN."""
    score = group_score(result, categories, metric)
    noise = None if score is None else noise_of(result, score, pooled)
    if score is None or noise is None:
        return math.nan
    of_images = (float(np.nanvar(score.draws, ddof=1)), _image_freedom(score.without))
    error = _error([of_images, (noise.variance / len(score.seeds), noise.freedom)])
    return math.nan if error is None else error.half


@dataclass(frozen=True)
class _Error:
    """A standard error with its degrees of freedom."""

    size: float
    freedom: float

    @property
    def half(self) -> float:
        """Half of the interval."""
        return float(special.stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.size


def _error(parts: Sequence[tuple[float, float]]) -> _Error | None:
    """Of independent (variance, freedom) by Satterthwaite; None where nothing varies."""
    variance = sum(part for part, _ in parts)
    if not variance > 0:
        return None
    freedom = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    return _Error(math.sqrt(variance), freedom)


def _image_freedom(kinds: Sequence[Draws]) -> float:
    """Satterthwaite's degrees of freedom of the jackknife over images, kind by kind."""
    spread = [(len(k) - 1) ** 2 / len(k) * float(np.var(k, ddof=1)) for k in kinds if len(k) > 1]
    total = sum(spread)
    if not total > 0:
        return 1.0
    sizes = [len(k) for k in kinds if len(k) > 1]
    return 1 / sum((one / total) ** 2 / (n - 1) for one, n in zip(spread, sizes, strict=True))


def differences(results: Sequence[Result], groups: Mapping[str, Sequence[str]]) -> list[Difference]:
    """Every arm minus its baseline in every group; Holm's family: one group under one metric."""
    by_name = {result.arm.name: result for result in results}
    found: list[Difference] = []
    for name, categories in groups.items():
        for metric in METRICS:
            pooled = pooled_noise(results, categories, metric)
            family = []
            for result in results:
                baseline = by_name.get(result.arm.experiment.baseline or "")
                if baseline is None:
                    continue
                one = difference(result, baseline, name, categories, metric, pooled)
                if one is not None:
                    family.append(one)
            corrected = holm([one.p for one in family])
            found += [
                Difference(**{**vars(one), "p_holm": p})
                for one, p in zip(family, corrected, strict=True)
            ]
    return found
