"""The models of what the evaluator reads and writes: backbone.json, cells, report.json.

REPORT.md is the spec page; a test compares its JSON Schema with `Report`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from evaluator.artifacts import Model, Sha256
from evaluator.protocols import Protocol

Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Rgb = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Metric = Literal[
    "pixel_auroc",
    "aupro_30",
    "aupro_05",
    "aupro_01",
    "pixel_ap",
    "pixel_f1_max",
    "image_auroc",
    "image_ap",
    "image_f1_max",
]
MOST_DRAWS = 100_000  # all draws of the groups and of one category are held at once
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


class Finding(Model):
    """What the audit of a category's files found, in one line."""

    category: str
    kind: Literal[
        "mask_missing",
        "mask_without_image",
        "mask_empty",
        "mask_grey_levels",
        "mask_size",
        "defect_cropped",
        "defect_lost",
        "duplicate",
        "count",
        "unreadable",
    ]
    file: str
    message: str
    fatal: bool


class TestImageRecord(Model):
    """A test photograph; `regions` are the sizes in pixels of its defects in the crop."""

    __test__ = False  # not a pytest class

    file: str
    defect: str = Field(description="good on a good one")
    regions: list[Annotated[int, Field(ge=1)]]


class CategoryRecord(Model):
    """One category: how many photographs, and the share of defective pixels in the crops."""

    category: str
    group: Literal["low", "other", "own"]
    layout: str
    train: int = Field(ge=2)
    test_good: int = Field(ge=1)
    test_defective: int = Field(ge=1)
    defects: dict[str, Count]
    masks: bool = Field(description="false: no masks, so image metrics only")
    defective_pixel_share: Share | None
    images: list[TestImageRecord] = Field(min_length=2)
    findings: list[Finding]
    sha256: Sha256


class Curves(Model):
    """ROC and PRO curves of the first seed over `fpr`, all in [0, 1]."""

    fpr: list[Share]
    tpr: list[Share]
    pro: list[Share]


class ImageScore(Model):
    """One test photograph under one backbone, in the order of the category's `images`."""

    score: list[float] = Field(min_length=1, description="largest pixel of the map, per seed")
    pixel_auroc: Share | None = Field(
        description="its defective pixels against all good ones of the category, first seed"
    )
    regions_aupro_30: list[Share] = Field(description="per region, first seed")
    layer_shares: list[Share] = Field(
        description="of the squared distance at the image's highest position, per layer, first seed"
    )


class LearningPoint(Model):
    """The metrics with fewer normal images to fit on, per seed."""

    train: int = Field(ge=2)
    metrics: dict[Metric, list[Share]]


class StoredFile(Model):
    """A file beside the report: path from the report's folder, length and hash."""

    file: str = Field(pattern=r"^cells/[^/\x00-\x1f]+\.(npz|png)$")
    bytes: int = Field(ge=1, le=2**31)
    sha256: Sha256


class Scores(Model):
    """What one backbone does on one category, and what it took."""

    category: str
    backbone: str
    metrics: dict[Metric, list[Share]] = Field(description="in [0, 1], per seed")
    curves: Curves | None
    images: list[ImageScore]
    learning_curve: list[LearningPoint]
    statistics: list[StoredFile] = Field(min_length=1, description="per seed; see Statistics")
    maps: StoredFile
    shown: list[Count] = Field(description="places in the category's images of the maps in `maps`")
    form: Literal["dual", "primal"]
    extracted: Count = Field(description="photographs that went through the network")
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
    low: float | None = Field(default=None, description="95 % bootstrap interval over images")
    high: float | None = None
    n_seeds: int = Field(ge=1)


class Comparison(Model):
    """A paired difference a - b in percentage points; `category` as in the table."""

    group: Group
    category: str
    metric: Metric
    a: str
    b: str
    difference: float
    low: float
    high: float
    p: Share
    p_holm: Share
    distinct: bool = Field(description="p_holm is below 1 - level")


class Published(Model):
    """A number printed elsewhere, in percent, for a category of this report."""

    source: str
    arch: str
    category: str
    metric: Metric
    value: Percent


class ProtocolMove(Model):
    """How far the same weights move under another named protocol, in percent."""

    protocol: str
    protocol_sha256: Sha256
    category: str
    backbone: str
    metric: Metric
    mean: Percent
    difference: float = Field(description="mean minus the mean under the report's protocol")


class Bootstrap(Model):
    """How the intervals were made: images resampled, good and defective ones apart."""

    draws: int = Field(ge=0, le=MOST_DRAWS)
    seed: int = Field(ge=0, lt=2**32)
    level: Share


class Report(Model):
    """`report.json`."""

    format: Literal["semiformula-report"]
    format_version: Literal[2]
    evaluator_version: str
    versions: dict[str, str]
    data: str
    protocol: Protocol
    protocol_sha256: Sha256
    seeds: list[int] = Field(min_length=1)
    feature_dtype: Literal["float16", "float32"]
    bootstrap: Bootstrap
    backbones: list[BackboneRecord] = Field(min_length=1)
    dims: list[RandomDims] = Field(min_length=1)
    categories: list[CategoryRecord] = Field(min_length=1)
    scores: list[Scores] = Field(min_length=1)
    table: list[TableRow] = Field(min_length=1)
    comparisons: list[Comparison]
    published: list[Published]
    protocol_moves: list[ProtocolMove]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        cells = sorted((cell.category, cell.backbone) for cell in self.scores)
        expected = sorted((c.category, b.name) for c in self.categories for b in self.backbones)
        if cells != expected:
            raise ValueError("scores must hold one entry per category and backbone")
        images = {record.category: len(record.images) for record in self.categories}
        for cell in self.scores:
            per_seed = [len(cell.statistics), *map(len, cell.metrics.values())]
            if any(length != len(self.seeds) for length in per_seed):
                raise ValueError(f"scores of {cell.category} must hold {len(self.seeds)} seeds")
            if len(cell.images) != images[cell.category]:
                raise ValueError(f"scores of {cell.category} must hold all of its images")
            if any(index >= len(cell.images) for index in cell.shown):
                raise ValueError(f"shown images of {cell.category} must be among its images")
        return self


class CellConfig(Model):
    """Everything that a cell's numbers depend on; its hash decides whether a cell is reused."""

    evaluator_version: str
    versions: dict[str, str]
    protocol: Protocol
    seeds: list[int]
    feature_dtype: Literal["float16", "float32"]
    device: str
    category_sha256: Sha256
    arch: str
    weights_sha256: Sha256
    mean: Rgb
    std: Rgb
    layers: list[str]
    dims: list[DimsOfSeed]
    learning_curve: list[int]
    shown: Count


class Cell(Model):
    """`cells/*.json`: a finished category of one backbone, so that a rerun need not repeat it."""

    format: Literal["semiformula-report-cell"]
    format_version: Literal[2]
    config_sha256: Sha256
    scores: Scores


class AuditOfCategory(Model):
    """`cells/audit--*.json`: what decoding every photograph of a category found."""

    format: Literal["semiformula-report-audit"]
    format_version: Literal[1]
    depends_on: list[str] = Field(description="hashes of category and protocol, versions")
    findings: list[Finding]
