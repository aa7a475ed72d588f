"""Thresholds with a guarantee: split conformal prediction on the scores of held-out good parts.

Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005; Laxhammar, Falkman,
"Conformal prediction for distribution-independent anomaly detection", 2010.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

from evaluator.errors import EvaluatorError


def rank_of_threshold(held_out: int, rate: float) -> int:
    """ceil((n + 1) (1 - a)), exactly: 1 - 0.05 in floating point is not 0.95.

    >>> rank_of_threshold(19, 0.05)
    19
    """
    return math.ceil((held_out + 1) * (1 - Fraction(repr(rate))))


def least_held_out(rate: float) -> int:
    """The smallest n that has a threshold at all: rank n or less.

    >>> least_held_out(0.05)
    19
    """
    return math.ceil(1 / Fraction(repr(rate))) - 1


def held_out_of(count: int, share: float) -> int:
    """How many of `count` photographs a share is, rounded."""
    return round(Fraction(repr(share)) * count)


def least_in_all(rate: float, share: float, least_rest: int) -> int:
    """The fewest photographs of which `share` suffices for `rate` and `least_rest` are left.

    >>> least_in_all(0.05, 0.25, 2)
    75
    """
    needed, exact = least_held_out(rate), Fraction(repr(share))
    # Rounding moves the answer by less than one photograph on either side.
    start = max(needed + least_rest, (needed - 1) // exact, (least_rest - 1) // (1 - exact))
    return next(n for n in itertools.count(start) if _suffices(n, share, rate, least_rest))


def sufficient_share(count: int, rate: float, near: float, least_rest: int) -> float | None:
    """The whole per cent nearest to `near` that suffices of `count` photographs; None: none does.

    >>> sufficient_share(40, 0.05, 0.2, 2)
    0.47
    """
    shares = [k / 100 for k in range(1, 100) if _suffices(count, k / 100, rate, least_rest)]
    return min(shares, key=lambda share: abs(share - near), default=None)


def _suffices(count: int, share: float, rate: float, least_rest: int) -> bool:
    held_out = held_out_of(count, share)
    return held_out >= least_held_out(rate) and count - held_out >= least_rest


def threshold(scores: Sequence[float], rate: float) -> float:
    """The score above which a part is rejected, from held-out scores and the false-reject rate.

    A further good part, exchangeable with the held-out ones, lies above it with probability at
    most `rate`, on average over draws. Raises EvaluatorError when `scores` are too few for it.
    """
    rank = rank_of_threshold(len(scores), rate)
    if rank > len(scores):
        raise EvaluatorError(
            f"a false-reject rate of {rate:g} needs {least_held_out(rate)} held-out photographs, "
            f"there are {len(scores)}"
        )
    return sorted(scores)[rank - 1]


def p_value(ascending: Sequence[float], score: float) -> float:
    """(1 + held-out scores at least as large) / (n + 1): small for parts unlike the good ones."""
    at_least = len(ascending) - bisect.bisect_left(ascending, score)
    return (1 + at_least) / (len(ascending) + 1)


def clopper_pearson(hits: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share, from `hits` out of `trials`."""
    from scipy.stats import beta  # half a second, and only --check asks for it

    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


def chance(rejected: int, trials: int, held_out: int, rate: float) -> float:
    """The probability of `rejected` or more of `trials` good parts, all exchangeable with held out.

    Exact without ties: the number is beta-binomial, for the threshold is drawn as well.

    >>> chance(1, 1, 19, 0.05)  # the next part above the largest of 19
    0.05
    """
    from scipy.stats import betabinom

    rank = rank_of_threshold(held_out, rate)
    return round(float(betabinom.sf(rejected - 1, trials, held_out + 1 - rank, rank)), 12)
