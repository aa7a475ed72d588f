"""What the published texts state: gathered once, from dataset.json and from measurements."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from builder.index import Dataset
from builder.publish.licence import Licence
from builder.publish.statistics import Statistics

METHOD = (
    "H. Kobayashi, N. Murakami, N. Hiramatsu, T. Suzuki, M. Hashimoto: Anomaly Detection Based on "
    "Semi-Formula Driven Pre-training Dataset to Represent Subtle Difference and Anomaly Score"
)
DEFAULT_AUTHOR = "The publisher of this dataset"


@dataclass(frozen=True)
class Options:
    """What only the publisher knows; everything else comes from the dataset."""

    title: str = ""
    authors: tuple[str, ...] = ()
    repo: str = ""  # USER/NAME on the Hugging Face hub
    homepage: str = ""
    version: str = "1.0.0"
    date: str = ""  # YYYY-MM-DD; no date is made up


@dataclass(frozen=True)
class Facts:
    """A dataset, its licence, its normals by licence and category, and what was measured."""

    dataset: Dataset
    options: Options
    licence: Licence
    licences: dict[str, int]
    categories: dict[str, int]
    statistics: Statistics
    sha256: dict[str, str] = field(default_factory=dict)  # of the files written so far
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The dataset's name for people."""
        return self.options.title or f"semiformula {self.dataset.recipe.name}"

    @property
    def authors(self) -> tuple[str, ...]:
        """Who publishes."""
        return self.options.authors or (DEFAULT_AUTHOR,)

    @property
    def repo(self) -> str:
        """The hub repository, or a placeholder."""
        return self.options.repo or "USER/NAME"

    @property
    def url(self) -> str:
        """Where the dataset can be found, or an empty string."""
        hub = f"https://huggingface.co/datasets/{self.options.repo}" if self.options.repo else ""
        return self.options.homepage or hub

    @property
    def images(self) -> bool:
        """Whether painted images are stored, not parameters alone."""
        return self.dataset.contents == "images"

    @property
    def data_bytes(self) -> int:
        """Bytes of the data shards."""
        return sum(shard.bytes for shard in self.dataset.shards)

    @property
    def normals_bytes(self) -> int:
        """Bytes of the normals' shards."""
        return sum(shard.bytes for shard in self.dataset.normals.shards)

    @property
    def description(self) -> str:
        """The dataset in one sentence or two."""
        dataset = self.dataset
        size, k = dataset.image.size_px, dataset.theta.components
        what = "images" if self.images else "parameter vectors of images"
        return (
            f"{dataset.samples:,} synthetic {what} ({size} x {size} pixels, "
            f"{'RGB' if dataset.image.channels == 3 else 'grey'}) of surface defects: each is one "
            f"of {dataset.normals.count:,} normal photographs, painted with a mixture of {k} "
            f"Gaussian components whose {dataset.theta.length} parameters are its label. For "
            "pre-training networks for surface anomaly detection."
        )


def brace_names(facts: Facts) -> str:
    """The data shards' names as a brace expansion."""
    names = [shard.name for shard in facts.dataset.shards]
    head, _, count = names[0].rpartition("-of-")
    stem, _, first = head.rpartition("-")
    if len(names) == 1:
        return names[0]
    last = names[-1].rpartition("-of-")[0].rpartition("-")[2]
    return f"{stem}-{{{first}..{last}}}-of-{count}"


def gigabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def quoted(value: str) -> str:
    """A string as a YAML (and JSON) scalar in quotes; control characters escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\u2028", " ").replace("\u2029", " ")


_HARMLESS = str.maketrans({c: f"&#{ord(c)};" for c in "&<>|[]`*\\"})


def prose(value: str) -> str:
    """A free text (a citation, a name) made harmless in Markdown: one line, no markup."""
    return " ".join(value.split()).translate(_HARMLESS)


def p_value(value: float | None) -> str:
    """A p-value for people."""
    if value is None:
        return "–"
    return f"{value:.2g}" if value < 0.01 else f"{value:.2f}"
