"""The models of what the evaluator reads and writes: backbone.json, cells, report.json.

REPORT.md is the spec page; a test compares its JSON Schema with `Report`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from evaluator.artifacts import Model, Sha256

Auroc = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Rgb = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Metric = Literal["pixel_auroc", "image_auroc"]
Group = Literal["low", "other", "own", "all"]


class ExportedWeights(Model):
    """The weights beside a backbone.json."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")
    bytes: int = Field(ge=1)
    sha256: Sha256


class ExportedDataset(Model):
    """The dataset that a backbone was pre-trained on."""

    name: str
    content_sha256: Sha256
    recipe_sha256: Sha256 | None = Field(description="null for a labelled dataset, since version 2")
    samples: int = Field(ge=1)


class ExportedInput(Model):
    """What the backbone was trained on: (x / 255 - mean) / std per channel."""

    size_px: int = Field(ge=1)
    channels: Literal[3]
    mean: Rgb
    std: tuple[Positive, Positive, Positive]


class ExportedPadim(Model):
    """The layers and the number of random dimensions that PaDiM takes by default."""

    layers: list[str] = Field(min_length=1)
    dims: int = Field(ge=1)


class ExportedBackbone(Model):
    """`backbone.json` of the trainer."""

    format: Literal["semiformula-backbone"]
    format_version: Literal[1, 2]
    trainer_version: str
    arch: str
    weights: ExportedWeights
    loss: str
    dataset: ExportedDataset
    input: ExportedInput
    padim: ExportedPadim
    training: dict[str, JsonValue]
    metrics: dict[str, JsonValue]


class Protocol(Model):
    """The settings that all backbones share; lengths in pixels."""

    resize_px: int = Field(ge=16)
    crop_px: int = Field(ge=0)
    blur_sigma_px: float = Field(ge=0)
    blur_border: Literal["reflect"]
    epsilon: Positive
    seeds: list[int] = Field(min_length=1)


class DimsOfSeed(Model):
    """The random dimensions of one seed, ascending, counted through the layers in order."""

    seed: int
    indices: list[Count] = Field(min_length=1)


class RandomDims(Model):
    """The random dimensions of all backbones of one architecture."""

    arch: str
    layers: list[str] = Field(min_length=1)
    channels: list[int] = Field(min_length=1)
    dims: int = Field(ge=1)
    seeds: list[DimsOfSeed] = Field(min_length=1)


class BackboneRecord(Model):
    """One backbone: where it came from and how it is read."""

    name: str
    spec: str
    kind: Literal["export", "weights", "random", "torchvision"]
    arch: str
    weights_sha256: Sha256
    ignored_keys: list[str]
    mean: Rgb
    std: tuple[Positive, Positive, Positive]
    layers: list[str] = Field(min_length=1)
    dims: int = Field(ge=1)
    export: ExportedBackbone | None


class CategoryRecord(Model):
    """One category: how many photographs, and the share of defective pixels in the crops."""

    category: str
    group: Literal["low", "other", "own"]
    train: int = Field(ge=2)
    test_good: int = Field(ge=1)
    test_defective: int = Field(ge=1)
    defects: dict[str, Count]
    masks_without_pixels: Count
    defective_pixel_share: Auroc
    sha256: Sha256


class Scores(Model):
    """AUROC in [0, 1] per seed, of one backbone on one category, and what it took."""

    category: str
    backbone: str
    pixel_auroc: list[Auroc] = Field(min_length=1)
    image_auroc: list[Auroc] = Field(min_length=1)
    images: int = Field(ge=1)
    images_per_s: Positive
    features_s: float = Field(ge=0)
    scoring_s: float = Field(ge=0)
    device: str


class TableRow(Model):
    """One line of table.csv; `category` is `mean` for the mean of a group's categories."""

    group: Group
    category: str
    backbone: str
    metric: Metric
    mean: Percent
    sd: float | None = Field(default=None, ge=0)
    n_seeds: int = Field(ge=1)


class Report(Model):
    """`report.json`."""

    format: Literal["semiformula-report"]
    format_version: Literal[1]
    evaluator_version: str
    versions: dict[str, str]
    data: str
    protocol: Protocol
    backbones: list[BackboneRecord] = Field(min_length=1)
    dims: list[RandomDims] = Field(min_length=1)
    categories: list[CategoryRecord] = Field(min_length=1)
    scores: list[Scores] = Field(min_length=1)
    table: list[TableRow] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        cells = sorted((cell.category, cell.backbone) for cell in self.scores)
        expected = sorted((c.category, b.name) for c in self.categories for b in self.backbones)
        if cells != expected:
            raise ValueError("scores must hold one entry per category and backbone")
        n_seeds = len(self.protocol.seeds)
        for cell in self.scores:
            if not len(cell.pixel_auroc) == len(cell.image_auroc) == n_seeds:
                raise ValueError(f"scores of {cell.category} must hold {n_seeds} seeds")
        return self


class CellConfig(Model):
    """Everything that a cell's numbers depend on; its hash decides whether a cell is reused."""

    evaluator_version: str
    versions: dict[str, str]
    protocol: Protocol
    category_sha256: Sha256
    arch: str
    weights_sha256: Sha256
    mean: Rgb
    std: Rgb
    layers: list[str]
    dims: list[DimsOfSeed]
    examples: Count


class HeatMaps(Model):
    """Maps of example images: uint8 npy [examples, rows, columns], see REPORT.md.

    `test_images` are their places in the order of `find_categories`.
    """

    file: str = Field(pattern=r"^[^/]+\.npy$")
    sha256: Sha256
    seed: int
    test_images: list[Count]


class Cell(Model):
    """`cells/*.json`: a finished category of one backbone, so that a rerun need not repeat it."""

    format: Literal["semiformula-report-cell"]
    format_version: Literal[1]
    config_sha256: Sha256
    scores: Scores
    heat_maps: HeatMaps
