"""The ledger: which samples were trained on, per epoch, as a sum that no order changes.

Each sample's index is mixed to 128 bits, and the four 32-bit limbs are summed modulo 2^64. A
sample that was missed, doubled or swapped changes the sums; the number of processes, the order
and kills do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from trainer.artifacts import Model, write_json
from trainer.checkpoint import CheckpointRecord, EpochLedger
from trainer.errors import TrainerError
from trainer.order import Order

LEDGER_FILE = "ledger.json"
PIECE_SAMPLES = 2**20  # how many indices are mixed at once: 8 MB an array
LIMBS = 4
LOW = np.uint64(0xFFFFFFFF)
SALTS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))

Indices = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]  # [1 + LIMBS]: samples, and the sums of the limbs


class EpochLine(Model):
    """One epoch: what was trained on, and what it should come to."""

    epoch: int = Field(ge=0)
    samples: int = Field(ge=0, description="trained on so far")
    expected_samples: int = Field(ge=0, description="that the stream has passed so far")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    expected_digest: str | None = Field(description="of the whole epoch; null before its end")
    complete: bool = Field(description="the stream has passed the epoch's end")


class LedgerFile(Model):
    """`ledger.json`: written with each checkpoint."""

    format: Literal["semiformula-ledger"]
    format_version: Literal[1]
    order_key: str
    seed: int
    samples_per_epoch: int = Field(ge=1)
    epochs: list[EpochLine]
    quarantined: list[str] = Field(description="shards whose samples are missing, by name")


@dataclass
class Ledger:
    """Sums per epoch: of the checkpoint and all processes, and of this process since."""

    train_samples: int
    base: dict[int, Sums] = field(default_factory=dict)
    own: dict[int, Sums] = field(default_factory=dict)
    since: int = 0  # the stream position of `base`

    def add(self, start: int, asked: Indices, arrived: Indices) -> None:
        """Count the samples of a part that begins at stream position `start`.

        `asked` are the sample indices at its positions, `arrived` those that came, in that order;
        TrainerError when another came.
        """
        rows = positions_of(asked, arrived)
        epochs = (start + rows) // self.train_samples
        for epoch in np.unique(epochs).tolist():
            sums = self.own.setdefault(epoch, np.zeros(1 + LIMBS, np.uint64))
            sums += sums_of(arrived[epochs == epoch])

    def pending(self, cursor: int) -> npt.NDArray[np.int64]:
        """This process's sums since the checkpoint, [epochs from `since` to `cursor`, 5]."""
        epochs = range(self.since // self.train_samples, cursor // self.train_samples + 1)
        zero = np.zeros(1 + LIMBS, np.uint64)
        return np.stack([self.own.get(epoch, zero) for epoch in epochs]).view(np.int64)

    def settle(self, cursor: int, total: npt.NDArray[np.int64]) -> None:
        """Take the sums of all processes since the checkpoint into the base."""
        first = self.since // self.train_samples
        for epoch, sums in enumerate(total.view(np.uint64), start=first):
            self.base[epoch] = self.base.get(epoch, np.zeros(1 + LIMBS, np.uint64)) + sums
        self.base = {epoch: sums for epoch, sums in self.base.items() if sums.any()}
        self.own, self.since = {}, cursor


def ledger_from(record: CheckpointRecord | None, train_samples: int) -> Ledger:
    """The ledger as it was at a checkpoint, or an empty one."""
    if record is None:
        return Ledger(train_samples)
    base = {line.epoch: np.array([line.samples, *line.limbs], np.uint64) for line in record.ledger}
    return Ledger(train_samples, base, since=record.samples_seen)


def records_of(ledger: Ledger) -> list[EpochLedger]:
    """The settled sums as a checkpoint keeps them."""
    return [
        EpochLedger(epoch=epoch, samples=int(sums[0]), limbs=[int(limb) for limb in sums[1:]])
        for epoch, sums in sorted(ledger.base.items())
    ]


def positions_of(asked: Indices, arrived: Indices) -> Indices:
    """Which rows of `asked` have arrived, when some are missing but none is out of order."""
    if len(asked) == len(arrived) and np.array_equal(asked, arrived):
        return np.arange(len(asked))
    rows, at = [], 0
    for row, index in enumerate(asked.tolist()):
        if at < len(arrived) and arrived[at] == index:
            rows.append(row)
            at += 1
    if at != len(arrived):
        raise TrainerError(
            f"the loader handed over sample {int(arrived[at])}, which was not asked for there; "
            "report this, it is an error of the trainer"
        )
    return np.array(rows, np.int64)


def mixed(indices: Indices, salt: np.uint64) -> Sums:
    """SplitMix64 of each index from a start of `salt`; Steele, Lea, Flood 2014."""
    z = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def sums_of(indices: Indices) -> Sums:
    """The number of the indices, and the four sums of their limbs, modulo 2^64."""
    sums = [np.uint64(len(indices))]
    for salt in SALTS:
        z = mixed(indices, salt)
        sums += [(z & LOW).sum(dtype=np.uint64), (z >> np.uint64(32)).sum(dtype=np.uint64)]
    return np.array(sums, np.uint64)


@lru_cache(maxsize=1)
def expected_sums(train_samples: int) -> Sums:
    """The sums of a whole epoch, read-only: each of the first `train_samples` indices once.

    Made in pieces of 8 MB, from no data, once a process: a second for 10^7 samples.
    """
    total = np.zeros(1 + LIMBS, np.uint64)
    for start in range(0, train_samples, PIECE_SAMPLES):
        total += sums_of(np.arange(start, min(start + PIECE_SAMPLES, train_samples)))
    total.flags.writeable = False
    return total


def digest(limbs: Iterable[int]) -> str:
    """Four sums as 64 hexadecimal digits."""
    return "".join(f"{int(limb) % 2**64:016x}" for limb in limbs)


def epoch_lines(ledger: Ledger, cursor: int) -> list[EpochLine]:
    """The ledger's epochs as far as the stream has come, from the settled sums."""
    size, lines = ledger.train_samples, []
    for epoch in range(-(-cursor // size)):
        sums = ledger.base.get(epoch, np.zeros(1 + LIMBS, np.uint64))
        complete = (epoch + 1) * size <= cursor
        lines.append(
            EpochLine(
                epoch=epoch,
                samples=int(sums[0]),
                expected_samples=size if complete else cursor - epoch * size,
                digest=digest(sums[1:]),
                expected_digest=digest(expected_sums(size)[1:]) if complete else None,
                complete=complete,
            )
        )
    return lines


def check_lines(lines: Sequence[EpochLine], quarantined: Sequence[str]) -> None:
    """TrainerError when an epoch lacks or doubles samples though no shard is quarantined."""
    for line in lines:
        wrong_count = line.samples != line.expected_samples
        wrong_keys = line.complete and line.digest != line.expected_digest
        if (wrong_count or wrong_keys) and not quarantined:
            raise TrainerError(
                f"epoch {line.epoch}: trained on {line.samples} samples with digest "
                f"{line.digest[:12]}, expected {line.expected_samples} with "
                f"{(line.expected_digest or 'any')[:12]}, each once; the checkpoint is not "
                "written: report this, it is an error of the trainer"
            )


def write_ledger(
    out: Path, order: Order, lines: Sequence[EpochLine], quarantined: Sequence[str]
) -> None:
    """Write RUN/ledger.json."""
    ledger = LedgerFile(
        format="semiformula-ledger",
        format_version=1,
        order_key=order.key,
        seed=order.seed,
        samples_per_epoch=order.train_samples,
        epochs=list(lines),
        quarantined=list(quarantined),
    )
    write_json(out / LEDGER_FILE, ledger)
