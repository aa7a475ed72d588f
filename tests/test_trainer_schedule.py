"""When a run ends; learning rate and averaging as functions of the step."""

from __future__ import annotations

import math

import pytest

from trainer.run import Config, Duration
from trainer.schedule import decay_at, end_of, last_step, lr_at


def config(**changes: object) -> Config:
    plain: dict[str, object] = {
        "loss": "direct", "arch": "resnet18", "size_px": 32, "batch_size": 4, "micro_batches": 1,
        "window_shards": 16, "lr": 0.1, "schedule": "constant", "warmup_steps": 0,
        "total_steps": None, "ema": None, "seed": 0, "holdout": 1, "precision": "fp32",
    }  # fmt: skip
    return Config.model_validate(plain | changes)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (Duration(epochs=50), 782),  # 1000 samples in batches of 64: 781.25
        (Duration(epochs=0.0001), 1),
        (Duration(steps=7), 7),
        (Duration(minutes=7), None),
    ],
)
def test_duration_in_steps(duration: Duration, expected: int | None) -> None:
    assert last_step(end_of(duration, 1000), 64) == expected


def test_epochs_end_at_a_sample() -> None:
    # 0.1 * 30 is 3.0000000000000004 in floating point: no fourth sample.
    assert end_of(Duration(epochs=0.1), 30).sample == 3
    assert end_of(Duration(epochs=2), 15).sample == 30


def test_remaining_steps_count_from_where_the_run_stands() -> None:
    # An epoch of 10 was ended with a batch of 2; the next takes three more steps.
    assert last_step(end_of(Duration(epochs=2), 10), 4, step=3, cursor=10) == 6


def test_constant_rate() -> None:
    assert [lr_at(config(), step) for step in (0, 10**6)] == [0.1, 0.1]


def test_warm_up_rises_linearly_to_the_rate() -> None:
    plan = config(warmup_steps=4)
    assert [lr_at(plan, step) for step in range(6)] == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    )


def test_cosine_typed_by_hand() -> None:
    plan = config(schedule="cosine", total_steps=10, warmup_steps=2)
    assert lr_at(plan, 0) == pytest.approx(0.05)
    assert lr_at(plan, 2) == pytest.approx(0.1)
    assert lr_at(plan, 4) == pytest.approx(0.1 * 0.8535533906)  # (1 + cos(pi / 4)) / 2
    assert lr_at(plan, 6) == pytest.approx(0.05)
    assert lr_at(plan, 10) == pytest.approx(0, abs=1e-15)
    assert lr_at(plan, 99) == pytest.approx(0, abs=1e-15)


def test_cosine_of_a_run_that_is_all_warm_up_stays_finite() -> None:
    plan = config(schedule="cosine", total_steps=3, warmup_steps=5)
    assert all(math.isfinite(lr_at(plan, step)) for step in range(10))


def test_average_forgets_the_start() -> None:
    assert decay_at(0.999, 0) == pytest.approx(0.1)
    assert decay_at(0.999, 90) == pytest.approx(0.91)
    assert decay_at(0.999, 10**6) == 0.999
