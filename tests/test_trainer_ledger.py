"""The ledger: sums that any order, any sharing and any kill leave as they are."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from trainer.artifacts import read_json
from trainer.errors import TrainerError
from trainer.ledger import (
    Ledger,
    LedgerFile,
    check_lines,
    digest,
    epoch_lines,
    expected_sums,
    ledger_from,
    positions_of,
    records_of,
    sums_of,
    write_ledger,
)
from trainer.order import Order

MASK = 2**64 - 1


def naive_mix(index: int, salt: int) -> int:
    """SplitMix64 with Python's whole numbers."""
    z = (index * 0x9E3779B97F4A7C15 + salt) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def naive_sums(indices: list[int]) -> list[int]:
    sums = [len(indices), 0, 0, 0, 0]
    for index in indices:
        for place, salt in ((1, 0x9E3779B97F4A7C15), (3, 0xD1B54A32D192ED03)):
            z = naive_mix(index, salt)
            sums[place] = (sums[place] + (z & 0xFFFFFFFF)) & MASK
            sums[place + 1] = (sums[place + 1] + (z >> 32)) & MASK
    return sums


def test_first_word_is_splitmix64s() -> None:
    # The first output of SplitMix64 seeded with 0, as its author's code prints it.
    assert naive_mix(0, 0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_sums_agree_with_plain_numbers() -> None:
    indices = [0, 1, 7, 123456789, 999999999]
    assert sums_of(np.array(indices)).tolist() == naive_sums(indices)
    assert digest(sums_of(np.array([0]))[1:])[:32] == "000000007b1dcdaf00000000e220a839"


def test_expected_sums_are_those_of_all_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.ledger.PIECE_SAMPLES", 7)
    expected_sums.cache_clear()
    assert expected_sums(100).tolist() == naive_sums(list(range(100)))


def test_expected_sums_are_made_once_and_cannot_be_altered() -> None:
    assert expected_sums(101) is expected_sums(101)  # a second each for 10^7 samples
    with pytest.raises(ValueError, match="read-only"):
        expected_sums(101)[0] = 0


def consume(order: Order, ledgers: list[Ledger], start: int, stop: int, batch: int) -> None:
    """Hand the stream out in batches, each cut among the ledgers."""
    while start < stop:
        end = min(start + batch, stop)
        bounds = np.linspace(start, end, len(ledgers) + 1).astype(int).tolist()
        for ledger, first, last in zip(ledgers, bounds, bounds[1:], strict=False):
            asked = order.samples(first, last)
            ledger.add(first, asked, asked)
        start = end


def settled(ledgers: list[Ledger], cursor: int) -> Ledger:
    total = sum(ledger.pending(cursor) for ledger in ledgers)
    for ledger in ledgers:
        ledger.settle(cursor, total)
    return ledgers[0]


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 4), (3, 7), (3, 50)])
def test_any_sharing_gives_the_expected_epochs(world: int, batch: int) -> None:
    order = Order("key", 3, np.array([5, 5, 1]), window_shards=2)
    ledgers = [Ledger(11) for _ in range(world)]
    consume(order, ledgers, 0, 30, batch)
    lines = epoch_lines(settled(ledgers, 30), 30)
    check_lines(lines, [])
    expected = digest(naive_sums(list(range(11)))[1:])
    assert [line.digest == expected for line in lines] == [True, True, False]
    assert [line.complete for line in lines] == [True, True, False]
    assert [(line.samples, line.expected_samples) for line in lines] == [(11, 11), (11, 11), (8, 8)]


def test_kills_lose_nothing_and_double_nothing() -> None:
    order = Order("key", 0, np.array([9, 9]), window_shards=1)
    calm = Ledger(18)
    consume(order, [calm], 0, 60, 5)
    settled([calm], 60)
    moments = random.Random(0)
    cursor, record = 0, None
    while cursor < 60:
        ledger = Ledger(18) if record is None else Ledger(18, dict(record), since=cursor)
        stop = min(60, cursor + 5 * moments.randrange(1, 4))
        consume(order, [ledger], cursor, stop, 5)
        consume(order, [Ledger(18)], stop, stop + 5, 5)  # a step that the kill undoes
        cursor, record = stop, settled([ledger], stop).base
    assert [s.tolist() for s in record.values()] == [s.tolist() for s in calm.base.values()]


def test_missing_and_doubled_samples_are_refused() -> None:
    order = Order("key", 0, np.array([6]), window_shards=1)
    for arrived in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4]):
        ledger = Ledger(6)
        asked = np.array(arrived)
        ledger.add(0, asked, asked)
        lines = epoch_lines(settled([ledger], 6), 6)
        with pytest.raises(TrainerError, match=r"epoch 0: trained on \d samples with digest"):
            check_lines(lines, [])
    assert order.train_samples == 6


def test_quarantined_samples_are_missing_without_an_error() -> None:
    ledger = Ledger(6)
    ledger.add(0, np.array([3, 0, 5, 1, 2, 4]), np.array([3, 5, 4]))
    lines = epoch_lines(settled([ledger], 6), 6)
    check_lines(lines, ["data/train-00000-of-00001.tar"])
    assert lines[0].samples == 3
    assert lines[0].digest == digest(naive_sums([3, 4, 5])[1:])


def test_sample_that_was_not_asked_for_is_refused() -> None:
    assert positions_of(np.array([4, 9, 2]), np.array([4, 2])).tolist() == [0, 2]
    for arrived in ([9, 4], [7], [4, 9, 2, 2]):
        with pytest.raises(TrainerError, match="was not asked for"):
            positions_of(np.array([4, 9, 2]), np.array(arrived))


def test_part_across_epochs_counts_in_both() -> None:
    ledger = Ledger(4)
    ledger.add(2, np.array([3, 1, 1, 0]), np.array([3, 1, 1, 0]))
    settled([ledger], 6)
    assert {epoch: s.tolist() for epoch, s in ledger.base.items()} == {
        0: naive_sums([3, 1]),
        1: naive_sums([1, 0]),
    }


def test_record_brings_the_ledger_back() -> None:
    ledger = Ledger(4)
    ledger.add(0, np.array([3, 1, 0]), np.array([3, 1, 0]))
    settled([ledger], 3)
    (record,) = records_of(ledger)
    assert [record.samples, *record.limbs] == naive_sums([3, 1, 0])
    assert ledger_from(None, 4).base == {}


def test_file_holds_what_the_page_says(tmp_path: Path) -> None:
    order = Order("ab" * 32, 5, np.array([2]), window_shards=1)
    ledger = Ledger(2)
    consume(order, [ledger], 0, 3, 2)
    write_ledger(tmp_path, order, epoch_lines(settled([ledger], 3), 3), ["x.tar"])
    file = read_json(LedgerFile, tmp_path / "ledger.json")
    assert (file.seed, file.samples_per_epoch, file.quarantined) == (5, 2, ["x.tar"])
    assert [line.expected_digest is None for line in file.epochs] == [False, True]
