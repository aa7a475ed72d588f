"""What the trainer reads of `dataset.json`, the index of a dataset (see builder/SHARDS.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from trainer.artifacts import Model, Sha256, canonical_json, parse_model, sha256_of
from trainer.errors import TrainerError
from trainer.storage import Storage, open_storage

# No number of a file may be larger than what the trainer counts in, or could ever hold.
MAX_SAMPLES = 2**53
MAX_SHARD_SAMPLES = 10**7
MAX_SHARD_BYTES = 2**40
MAX_NORMALS = 10**7
MAX_COMPONENTS = 1024
BLOCK = 512  # a tar is made of blocks of 512 bytes


class ShardRecord(Model):
    """One tar: its path below the dataset folder, how many samples, how many bytes, its hash."""

    name: str = Field(pattern=r"^(data/(train|theta)|normals/normals)-\d{5,7}-of-\d{5,7}\.tar$")
    samples: int = Field(ge=1, le=MAX_SHARD_SAMPLES)
    bytes: int = Field(ge=1, le=MAX_SHARD_BYTES)
    sha256: Sha256


class ImageFormat(Model):
    """The images of both kinds of shard: square, 8 bit; `suffix` is the data shards' alone."""

    size_px: int = Field(ge=1, le=4096)
    channels: Literal[1, 3]
    codec: Literal["webp", "png", "jpeg"]
    suffix: Literal["webp", "png", "jpg"]
    lossless: bool


class ThetaFormat(Model):
    """The parameter vector: K components of C+6 values, then the scale."""

    components: int = Field(ge=1, le=MAX_COMPONENTS)
    channels: Literal[1, 3]
    length: int = Field(ge=1, le=MAX_COMPONENTS * 9 + 1)


class Recipe(Model):
    """The recipe is the builder's: the trainer needs its name, and all of it for the hash."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=64)


class Normals(Model):
    """The normal images: count and shards; `source` (provenance) is not the trainer's concern."""

    count: int = Field(ge=1, le=MAX_NORMALS)
    suffix: Literal["webp"]
    source: dict[str, Any]
    shards: list[ShardRecord]


class Dataset(Model):
    """`dataset.json`: the index, written last. The reader trusts nothing that it does not name.

    A labelled dataset, whose file is another (labelled.py), is one of these in memory: its
    `contents` are `labels`, `classes` their names; `recipe_sha256` is null, `normals` and `theta`
    are empty.
    """

    format: Literal["semiformula-shards"]
    format_version: Literal[2]
    builder_version: str
    environment: dict[str, str]
    recipe: Recipe
    recipe_sha256: Sha256 | None
    content_sha256: Sha256
    contents: Literal["images", "parameters", "labels"]
    classes: list[str] = Field(default_factory=list)
    samples: int = Field(ge=1, le=MAX_SAMPLES)
    image: ImageFormat
    theta: ThetaFormat
    normals: Normals
    shards: list[ShardRecord]

    @property
    def order_key(self) -> str:
        """What the order of samples hangs on: hex SHA-256 of the recipe and the normal images.

        Equal for the images and for the parameters alone of one recipe and the same normals, whose
        samples are the same. A labelled dataset has nothing but its content.
        """
        if self.contents == "labels":
            return self.content_sha256
        normals = "".join(f"{shard.sha256}\n" for shard in self.normals.shards)
        return hashlib.sha256(f"{self.recipe_sha256}\n{normals}".encode()).hexdigest()


def read_dataset(data: Storage | Path | str) -> Dataset:
    """Read dataset.json and check that its numbers agree with one another.

    Raises TrainerError in one line when there is no finished dataset or a number is off.
    """
    storage = data if isinstance(data, Storage) else open_storage(str(data))
    where, url = storage.where("dataset.json"), storage.url
    if storage.local is not None and not storage.local.is_dir():
        raise TrainerError(f"{url}: no such folder; --data wants one written by `builder build`")
    try:
        fields = json.loads(storage.read("dataset.json"))
    except FileNotFoundError:
        raise TrainerError(
            f"{url}: holds no dataset.json; finish it with `builder build ... --out {url}`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise TrainerError(f"{where}: not readable as JSON ({error}); is the file cut?") from None
    if isinstance(fields, dict) and fields.get("format") == "semiformula-classes":
        from trainer.labelled import labelled_dataset  # here: it is made of this module's parts

        return labelled_dataset(fields, where)
    dataset = parse_model(Dataset, fields, where)
    _refuse_contradictions(dataset, where)
    least = 4 * dataset.theta.length
    least += 3 * BLOCK if dataset.contents == "images" else 4
    refuse_crowds(dataset.shards, least, where)
    refuse_crowds(dataset.normals.shards, 2 * BLOCK, where)
    return dataset


def refuse_crowds(shards: Sequence[ShardRecord], least_bytes: int, where: str) -> None:
    """TrainerError where a shard has no room for its samples, of `least_bytes` bytes or more each.

    Nobody makes arrays of a size that no file bears out.
    """
    for shard in shards:
        if shard.samples * least_bytes > shard.bytes:
            raise TrainerError(
                f"{where}: {shard.name}: {shard.bytes} bytes cannot hold the {shard.samples} "
                f"samples of at least {least_bytes} bytes that it says; build the dataset again"
            )


def _refuse_contradictions(dataset: Dataset, where: str) -> None:
    theta, image = dataset.theta, dataset.image
    listing = "".join(f"{s.sha256}  {s.name}\n" for s in (*dataset.normals.shards, *dataset.shards))
    if dataset.contents == "labels" or dataset.classes:
        raise TrainerError(f"{where}: labels belong into a file of format 'semiformula-classes'")
    kind = {"images": "data/train-", "parameters": "data/theta-"}[dataset.contents]
    for what, found, expected in (
        ("theta.length", theta.length, theta.components * (theta.channels + 6) + 1),
        ("theta.channels", theta.channels, image.channels),
        ("samples of all shards", sum(s.samples for s in dataset.shards), dataset.samples),
        (
            "samples of the normals shards",
            sum(s.samples for s in dataset.normals.shards),
            dataset.normals.count,
        ),
        ("recipe_sha256", dataset.recipe_sha256, sha256_of(canonical_json(dataset.recipe))),
        ("content_sha256", dataset.content_sha256, hashlib.sha256(listing.encode()).hexdigest()),
        (
            f"number of shards named {kind}*",
            sum(s.name.startswith(kind) for s in dataset.shards),
            len(dataset.shards),
        ),
    ):
        if found != expected:
            raise TrainerError(
                f"{where}: {what} is {found}, the rest of the file gives {expected}; build it again"
            )
