"""What a check of one shard is told and what it finds: passed between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from builder.index import DatasetHead, ShardRecord

MAX_FAULTS_PER_SHARD = 10

Kind = Literal[
    "index",  # dataset.json against the spec
    "plan",  # plan.json against dataset.json
    "record",  # a commit record against plan.json or dataset.json
    "surplus",  # a file that nothing names
    "missing",
    "unreadable",
    "length",
    "sha256",
    "swapped",  # the bytes are those of another shard
    "tar",
    "npy",
    "json",
    "image",
    "theta",  # out of its ranges
    "label",  # not a label of the index, or not that of the category
    "normal",  # names a normal image that is not there
    "draw",  # not what the recipe draws
    "rerender",  # not the image of its theta and normal
    "rebuild",  # not the bytes that the builder makes
]


class ShardFault(NamedTuple):
    """What is wrong, with the sample's key where it is one sample's."""

    kind: Kind
    key: str
    message: str


@dataclass
class ShardCheck:
    """What the check of one shard found.

    `samples` were read whole; `sha256` is that of the bytes found, empty where there are none;
    `differing` of the `redrawn` samples are not the recipe's draw. `photographs` are the lines of
    provenance that the plan's `photographs_sha256` is made of.
    """

    record: ShardRecord
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    faults: list[ShardFault] = field(default_factory=list)
    left_out: int = 0
    redrawn: int = 0
    differing: int = 0
    rerendered: int = 0
    categories: list[str | None] = field(default_factory=list)
    photographs: list[str] = field(default_factory=list)

    def add(self, kind: Kind, key: str, message: str) -> None:
        """Keep a fault; beyond the first few, their number alone."""
        if len(self.faults) < MAX_FAULTS_PER_SHARD:
            self.faults.append(ShardFault(kind, key, message))
        else:
            self.left_out += 1


class DataTask(NamedTuple):
    """What a process needs to check the data shard whose first sample is `start`.

    `categories`: the normals', None where unknown. `drawn`: the parameters must be the recipe's
    draw. `rerender`: the samples to paint again; `tolerance`: the grey levels by
    which these may differ.
    """

    url: str
    head: DatasetHead
    record: ShardRecord
    start: int
    categories: list[str | None]
    drawn: bool
    rerender: frozenset[int]
    tolerance: int
