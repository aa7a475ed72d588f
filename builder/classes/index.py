"""The index of a labelled dataset, and the plan it is made from: pydantic models."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from builder.artifacts import Model, canonical_json, parse_json, sha256_of
from builder.dataset import INDEX, MAX_INDEX_BYTES
from builder.errors import BuilderError
from builder.index import Environment, ImageFormat, ShardRecord, SourceReport, content_sha256
from builder.place import PLAN
from builder.recipe import MAX_SAMPLES, Sha256
from builder.shards import shard_name
from builder.storage import Storage

FORMAT = "semiformula-classes"
MAX_CLASSES = 100_000

Classes = Annotated[list["ClassCount"], Field(min_length=2, max_length=MAX_CLASSES)]


class ClassCount(Model):
    """One class: its name and how many samples carry its label, which is its place in the list."""

    category: str = Field(min_length=1)
    samples: int = Field(ge=1)


class ClassSet(Model):
    """`dataset.json` of a labelled dataset: the index, written last."""

    format: Literal["semiformula-classes"]
    format_version: Literal[1]
    builder_version: str
    environment: Environment
    seed: int = Field(ge=0)
    samples_per_shard: int = Field(ge=1)
    content_sha256: Sha256
    samples: int = Field(ge=1)
    classes: Classes
    image: ImageFormat
    source: SourceReport
    shards: list[ShardRecord]

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        for what, stated, counted in (
            ("samples", self.samples, sum(one.samples for one in self.classes)),
            ("samples", self.samples, sum(shard.samples for shard in self.shards)),
            ("content_sha256", self.content_sha256, content_sha256(self.shards)),
            ("classes", len(self.classes), len({one.category for one in self.classes})),
        ):
            if stated != counted:
                raise ValueError(f"{what} is {stated}, but the rest of the file says {counted}")
        return self


class ClassPlan(Model):
    """`plan.json` of a labelled dataset: every photograph, before any shard is written.

    `paths`, `labels` and `sha256s` are the photographs' that are kept, in the order in which they
    were listed; `listing_sha256` is that of the lines `category path` of all that were found.
    """

    format: Literal["semiformula-classes-plan"]
    format_version: Literal[1]
    builder_version: str
    environment: Environment
    seed: int = Field(ge=0)
    samples_per_shard: int = Field(ge=1, le=1_000_000)
    classes: Classes
    image: ImageFormat
    source: SourceReport
    listing_sha256: Sha256
    paths: list[str] = Field(min_length=1, max_length=MAX_SAMPLES)
    labels: list[Annotated[int, Field(ge=0)]]
    sha256s: list[Sha256]

    @model_validator(mode="after")
    def _lists_agree(self) -> Self:
        if not len(self.paths) == len(self.labels) == len(self.sha256s):
            raise ValueError("paths, labels and sha256s are of several lengths")
        if max(self.labels) >= len(self.classes):
            raise ValueError(
                f"a label is {max(self.labels)}, there are {len(self.classes)} classes"
            )
        return self

    @cached_property
    def sha256(self) -> str:
        """What a commit record refers to."""
        return sha256_of(canonical_json(self))

    @property
    def shard_count(self) -> int:
        """How many shards the samples fill; the last may be shorter."""
        return -(-len(self.paths) // self.samples_per_shard)

    def shard(self, index: int) -> str:
        """The name of shard `index`."""
        return shard_name("train", index, self.shard_count)

    @cached_property
    def order(self) -> list[int]:
        """The place in the plan's lists of each sample."""
        return shuffled(len(self.paths), self.seed)

    def lines(self) -> list[str]:
        """What `builder verify` compares: `sha256 category path` of each sample."""
        names = [one.category for one in self.classes]
        return [f"{self.sha256s[i]} {names[self.labels[i]]} {self.paths[i]}\n" for i in self.order]


def shuffled(count: int, seed: int) -> list[int]:
    """0 to count - 1 in the order of SHA-256 of "SEED I" for each I.

    >>> shuffled(4, 0)
    [2, 1, 0, 3]
    """
    return sorted(range(count), key=lambda i: sha256_of(f"{seed} {i}".encode()))


def is_class_set(storage: Storage) -> bool:
    """Whether the index that stands is a labelled dataset's, by its first bytes."""
    try:
        with storage.open(INDEX) as file:
            return f'"{FORMAT}"'.encode() in file.read(4096)
    except FileNotFoundError:
        return False


def read_class_set(storage: Storage) -> ClassSet:
    """`dataset.json`, checked. Raises BuilderError when it is missing, damaged or contradictory."""
    where = storage.where(INDEX)
    try:
        return parse_json(ClassSet, storage.read(INDEX, MAX_INDEX_BYTES), where)
    except FileNotFoundError:
        raise BuilderError(f"{where}: no such file; make it with `builder classes`") from None


def read_class_plan(storage: Storage) -> ClassPlan | None:
    """The plan at a storage's root, None where there is none; BuilderError when it is damaged."""
    try:
        return parse_json(ClassPlan, storage.read(PLAN, MAX_INDEX_BYTES), storage.where(PLAN))
    except FileNotFoundError:
        return None
