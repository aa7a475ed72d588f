"""The index that a built dataset carries, and the commit record of a shard: pydantic models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, model_validator

from builder.artifacts import Model
from builder.recipe import Codec, Recipe, Sha256, Suffix

Contents = Literal["images", "parameters"]


class ShardRecord(Model):
    """One tar: its path below the dataset folder, how many samples, how many bytes, its hash."""

    name: str = Field(pattern=r"^(data/(train|theta)|normals/normals)-\d{5,7}-of-\d{5,7}\.tar$")
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: Sha256


class ImageFormat(Model):
    """The images of both kinds of shard: square, 8 bit; `suffix` is the data shards' alone."""

    size_px: int = Field(ge=1)
    channels: Literal[1, 3]
    codec: Codec
    suffix: Suffix
    lossless: bool


class ThetaFormat(Model):
    """The parameter vector: K components of C+6 values, then the scale."""

    components: int = Field(ge=1)
    channels: Literal[1, 3]
    length: int = Field(ge=1)


class CategoryCount(Model):
    """What a source gave for one category: files found, kept, and rejected by reason."""

    category: str
    found: int = Field(ge=0)
    kept: int = Field(ge=0)
    expected: int | None = Field(default=None, ge=0)
    rejected: dict[str, int] = Field(default_factory=dict)


class SourceReport(Model):
    """Where the normal images come from, and under which licence.

    `other_files` counts files of a folder that are no images by their suffix.
    """

    name: str
    licence: str
    citation: str = ""
    homepage: str = ""
    other_files: int = Field(default=0, ge=0)
    incomplete: bool = False
    faults: list[str] = Field(default_factory=list)
    categories: list[CategoryCount]


class Normals(Model):
    """The normal images: count, provenance, and their shards."""

    count: int = Field(ge=1)
    suffix: Literal["webp"] = "webp"
    source: SourceReport
    shards: list[ShardRecord]


class Environment(Model):
    """What bytes depend on, and the processor, of the machine that planned.

    `kernel` is a hash of the renderer's and the draw's source: builders that share it make the
    same parameters and pixels on any processor.
    """

    kernel: str
    python: str
    numpy: str
    numba: str
    llvmlite: str
    pillow: str
    libwebp: str
    zlib: str
    libjpeg: str
    cpu: str


class Commit(Model):
    """`records/*.json`: one shard is whole, and of this plan. Written after its tar."""

    format: Literal["semiformula-commit"]
    format_version: Literal[1]
    plan_sha256: Sha256
    shard: ShardRecord


class DatasetHead(Model):
    """`dataset.json` without its list of shards.

    `contents` says what a data shard holds: painted images with their parameters, or parameters
    alone, from which `image` tells what to render.
    """

    format: Literal["semiformula-shards"]
    format_version: Literal[2]
    builder_version: str
    environment: Environment
    recipe: Recipe
    recipe_sha256: Sha256
    content_sha256: Sha256
    contents: Contents
    samples: int = Field(ge=1)
    image: ImageFormat
    theta: ThetaFormat
    normals: Normals


class Dataset(DatasetHead):
    """`dataset.json`: the index, written last. Readers trust nothing that it does not name."""

    shards: list[ShardRecord]

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        recipe = self.recipe
        for what, stated, counted in (
            ("recipe_sha256", self.recipe_sha256, recipe.sha256),
            ("samples", self.samples, recipe.samples),
            ("samples", self.samples, sum(shard.samples for shard in self.shards)),
            ("theta.length", self.theta.length, recipe.theta_length),
            ("image.size_px", self.image.size_px, recipe.size_px),
            ("image.channels", self.image.channels, recipe.channels),
            ("normals.count", self.normals.count, sum(s.samples for s in self.normals.shards)),
            (
                "content_sha256",
                self.content_sha256,
                content_sha256([*self.normals.shards, *self.shards]),
            ),
        ):
            if stated != counted:
                raise ValueError(f"{what} is {stated}, but the rest of the file says {counted}")
        return self


def content_sha256(shards: Iterable[ShardRecord]) -> str:
    """The dataset's hash: SHA-256 of the lines `sha256  name` of the given shards, in order."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.sha256}  {shard.name}\n".encode())
    return digest.hexdigest()
