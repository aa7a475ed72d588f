"""What the trainer reads of `dataset.json`, the index of a dataset (see builder/SHARDS.md)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from trainer.artifacts import Model, Sha256, canonical_json, read_json, sha256_of
from trainer.errors import TrainerError


class ShardRecord(Model):
    """One tar: its path below the dataset folder, how many samples, how many bytes, its hash."""

    name: str = Field(pattern=r"^(data/(train|theta)|normals/normals)-\d{5,7}-of-\d{5,7}\.tar$")
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
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

    components: int = Field(ge=1)
    channels: Literal[1, 3]
    length: int = Field(ge=1)


class Recipe(Model):
    """The recipe is the builder's: the trainer needs its name, and all of it for the hash."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=64)


class Normals(Model):
    """The normal images: count and shards; `source` (provenance) is not the trainer's concern."""

    count: int = Field(ge=1)
    suffix: Literal["webp"]
    source: dict[str, Any]
    shards: list[ShardRecord]


class Dataset(Model):
    """`dataset.json`: the index, written last. The reader trusts nothing that it does not name."""

    format: Literal["semiformula-shards"]
    format_version: Literal[2]
    builder_version: str
    environment: dict[str, str]
    recipe: Recipe
    recipe_sha256: Sha256
    content_sha256: Sha256
    contents: Literal["images", "parameters"]
    samples: int = Field(ge=1)
    image: ImageFormat
    theta: ThetaFormat
    normals: Normals
    shards: list[ShardRecord]

    @property
    def order_key(self) -> str:
        """What the order of samples hangs on: hex SHA-256 of the recipe and the normal images.

        Equal for the images and for the parameters alone of one recipe and the same normals, whose
        samples are the same.
        """
        normals = "".join(f"{shard.sha256}\n" for shard in self.normals.shards)
        return hashlib.sha256(f"{self.recipe_sha256}\n{normals}".encode()).hexdigest()


def read_dataset(folder: Path) -> Dataset:
    """Read DIR/dataset.json and check that its numbers agree with one another.

    Raises TrainerError in one line when the folder holds no finished dataset or a number is off.
    """
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise TrainerError(f"{folder}: no such folder; --data wants one written by `builder build`")
    if not path.exists():
        raise TrainerError(
            f"{folder}: holds no dataset.json; finish it with `builder build ... --out {folder}`"
        )
    dataset = read_json(Dataset, path)
    if dataset.contents != "images":
        raise TrainerError(
            f"{path}: holds parameters without images; paint them first with "
            f"`builder render-from {folder} --out DIR`"
        )
    theta, image = dataset.theta, dataset.image
    listing = "".join(f"{s.sha256}  {s.name}\n" for s in (*dataset.normals.shards, *dataset.shards))
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
    ):
        if found != expected:
            raise TrainerError(
                f"{path}: {what} is {found}, the rest of the file gives {expected}; build it again"
            )
    return dataset
