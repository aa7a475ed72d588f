"""What the trainer reads of a labelled dataset's `dataset.json` (see builder/CLASSES.md)."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import Field

from trainer.artifacts import Model, Sha256, parse_model
from trainer.dataset import (
    BLOCK,
    MAX_SAMPLES,
    Dataset,
    ImageFormat,
    Normals,
    Recipe,
    ShardRecord,
    ThetaFormat,
    refuse_crowds,
)
from trainer.errors import TrainerError

FORMAT = "semiformula-classes"
MAX_CLASSES = 100_000


class ClassCount(Model):
    """One class: its name and how many samples carry its label, which is its place in the list."""

    category: str = Field(min_length=1)
    samples: int = Field(ge=1, le=MAX_SAMPLES)


class ClassSet(Model):
    """`dataset.json`: the index, written last. The reader trusts nothing that it does not name."""

    format: Literal["semiformula-classes"]
    format_version: Literal[1]
    builder_version: str
    environment: dict[str, str]
    seed: int = Field(ge=0)
    samples_per_shard: int = Field(ge=1)
    content_sha256: Sha256
    samples: int = Field(ge=1, le=MAX_SAMPLES)
    classes: list[ClassCount] = Field(min_length=2, max_length=MAX_CLASSES)
    image: ImageFormat
    source: dict[str, Any]
    shards: list[ShardRecord]


def labelled_dataset(fields: object, where: str) -> Dataset:
    """The parsed dataset.json of a labelled dataset as all else sees one.

    It has labels in the place of normals; no parameters, no recipe but a name. Raises TrainerError
    in one line where a field or a number is off.
    """
    found = parse_model(ClassSet, fields, where)
    _refuse_contradictions(found, where)
    refuse_crowds(found.shards, 3 * BLOCK, where)
    name = found.source.get("name")
    none: dict[str, Any] = {"components": None, "channels": found.image.channels, "length": 0}
    presented: dict[str, Any] = {
        "builder_version": found.builder_version,
        "environment": found.environment,
        "recipe": Recipe.model_construct(
            name=name if isinstance(name, str) and name else "classes"
        ),
        "recipe_sha256": None,
        "content_sha256": found.content_sha256,
        "contents": "labels",
        "classes": [one.category for one in found.classes],
        "samples": found.samples,
        "image": found.image,
        "theta": ThetaFormat.model_construct(**none),
        "normals": Normals.model_construct(count=0, suffix="webp", source={}, shards=[]),
        "shards": found.shards,
    }
    return Dataset.model_construct(**presented)  # unchecked: no file may say such numbers


def _refuse_contradictions(found: ClassSet, where: str) -> None:
    listing = "".join(f"{shard.sha256}  {shard.name}\n" for shard in found.shards)
    names = [one.category for one in found.classes]
    for what, stated, expected in (
        ("samples of all classes", sum(one.samples for one in found.classes), found.samples),
        ("samples of all shards", sum(shard.samples for shard in found.shards), found.samples),
        ("number of classes", len(names), len(set(names))),
        ("content_sha256", found.content_sha256, hashlib.sha256(listing.encode()).hexdigest()),
        (
            "number of shards named data/train-*",
            sum(shard.name.startswith("data/train-") for shard in found.shards),
            len(found.shards),
        ),
    ):
        if stated != expected:
            raise TrainerError(
                f"{where}: {what} is {stated}, the rest of the file gives {expected}; make it again"
            )
