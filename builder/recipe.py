"""The recipe: what determines a dataset, together with the normal photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from builder.artifacts import Model, canonical_json, read_toml, sha256_of
from builder.errors import BuilderError

RECIPES = Path(__file__).parent / "recipes"
MAX_SAMPLES = 10**9  # keys have nine digits
MAX_SHARDS = 10**6

Codec = Literal["webp", "png", "jpeg"]
Suffix = Literal["webp", "png", "jpg"]
SUFFIX: dict[Codec, Suffix] = {"webp": "webp", "png": "png", "jpeg": "jpg"}

# Adding 0 turns -0.0 into 0.0: equal numbers must have equal hashes.
Number = Annotated[float, AfterValidator(lambda value: value + 0.0)]
Signed = Annotated[Number, Field(ge=-1, le=1)]
Sigma = Annotated[Number, Field(ge=0.002, le=10)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Interval(Model):
    """A uniform draw between `low` and `high`, both within [-1, 1]."""

    low: Signed
    high: Signed

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class LogUniform(Model):
    """sigma log-uniform in [low, high]: every size of defect equally likely per octave."""

    kind: Literal["log_uniform"]
    low: Sigma
    high: Sigma

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class SoftplusNormal(Model):
    """sigma = softplus(n) + offset with n ~ N(0, 1): the draw of the authors' earlier generator."""

    kind: Literal["softplus_normal"]
    offset: Sigma = 0.01


class Mixture(Model):
    """Of all images about `share` draw sigma log-uniform in [low, high], the others softplus.

    Within an image all components have one law: under the normalised density of equation 3 wide
    components beside narrow ones could not be seen.
    """

    kind: Literal["mixture"]
    share: Number = Field(ge=0, le=1)
    low: Sigma
    high: Sigma
    offset: Sigma = 0.01

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class Prior(Model):
    """How theta is drawn. Coordinates and pixel values live in [-1, 1]; see prior.py.

    pi: `mass` is the softmax of K normals, the share of each component in the integral of p;
    `peak` draws the components' relative heights so, and gives pi the shares that make them: the
    images of a generator without the normalising constant of equation 3. Hashes and files name
    `pi` only where it is not `mass`, so that older recipes keep theirs.
    """

    color: Interval = Interval(low=-1, high=1)
    mean: Interval = Interval(low=-1, high=1)
    sigma: Annotated[LogUniform | SoftplusNormal | Mixture, Field(discriminator="kind")]
    max_abs_rho: Number = Field(default=0.99, ge=0, le=0.999)
    scale: Interval = Interval(low=0, high=1)
    pi: Literal["mass", "peak"] = "mass"

    @model_serializer(mode="wrap")
    def _without_default_pi(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        if self.pi == "mass":
            fields.pop("pi", None)
        return fields

    @model_validator(mode="after")
    def _scale_is_a_share(self) -> Self:
        if self.scale.low < 0:
            raise ValueError("prior.scale must lie within [0, 1]")
        return self


class Recipe(Model):
    """What determines a dataset, together with the normal photographs.

    `size_px` is the edge of the square images; sample i depends on `seed`, `prior`, `components`,
    `channels` and i alone, never on `samples` or `samples_per_shard`.
    """

    format: Literal["semiformula-recipe"]
    format_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    samples: int = Field(ge=1, le=MAX_SAMPLES)
    samples_per_shard: int = Field(default=1000, ge=1, le=1_000_000)
    size_px: int = Field(default=224, ge=16, le=4096)
    channels: Literal[1, 3] = 3
    components: int = Field(default=30, ge=1, le=1000)
    codec: Codec = "webp"
    prior: Prior

    @model_validator(mode="after")
    def _shards_can_be_numbered(self) -> Self:
        if self.shard_count > MAX_SHARDS:
            raise ValueError(
                f"{self.samples} samples at {self.samples_per_shard} a shard are "
                f"{self.shard_count} shards, more than {MAX_SHARDS}: raise samples_per_shard"
            )
        return self

    @property
    def theta_length(self) -> int:
        """K(C+6)+1: 271 for 30 components on RGB (equation 1)."""
        return self.components * (self.channels + 6) + 1

    @property
    def shard_count(self) -> int:
        """How many data shards the samples fill; the last may be shorter."""
        return -(-self.samples // self.samples_per_shard)

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON: two recipes agree when and only when this does."""
        return sha256_of(canonical_json(self))


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name (`paper`, `fine`, `demo`), or the one in a TOML file."""
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise BuilderError(
            f"recipe {name_or_path!r}: neither a shipped recipe ({', '.join(shipped)}) nor a file"
        )
    return read_toml(Recipe, path)
