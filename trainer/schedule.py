"""When a run ends, and the learning rate and averaging of each step: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.run import Config, Duration


@dataclass(frozen=True)
class End:
    """A run is through as soon as it reaches one of these; inf where it does not count."""

    step: float
    sample: float  # stream position, samples consumed
    seconds: float


def end_of(duration: Duration, train_samples: int) -> End:
    """Where a duration ends; epochs are whole samples, rounded, at least one.

    >>> from trainer.run import Duration
    >>> end_of(Duration(epochs=1.5), 1001)
    End(step=inf, sample=1502, seconds=inf)
    """
    never = math.inf
    if duration.epochs is not None:
        return End(never, max(1, round(duration.epochs * train_samples)), never)
    if duration.steps is not None:
        return End(duration.steps, never, never)
    assert duration.minutes is not None
    return End(never, never, 60 * duration.minutes)


def last_step(end: End, batch_size: int, step: int = 0, cursor: int = 0) -> int | None:
    """The step count at the end, from `step` at `cursor` on; None when only the clock decides.

    >>> last_step(End(math.inf, 1000, math.inf), batch_size=64)  # 15 whole batches, one of 40
    16
    """
    if end.sample < math.inf:
        return step + max(0, math.ceil((end.sample - cursor) / batch_size))
    return None if end.step == math.inf else int(end.step)


def lr_at(config: Config, step: int) -> float:
    """The learning rate of the step that makes step count `step` + 1.

    Linear from lr / warmup_steps up to lr, then constant, or half a cosine down to 0, which it
    would reach at total_steps.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.total_steps is None:
        return config.lr
    span = max(1, config.total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))


def decay_at(decay: float, step: int) -> float:
    """The decay of the averaged weights after step count `step`: lower at first.

    min(decay, (1 + step) / (10 + step)), so that an average over 10,000 steps does not remember
    the random start of a run of 1,000.
    """
    return min(decay, (1 + step) / (10 + step))
