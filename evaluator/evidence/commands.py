"""From an arm to the command lines that make it: what a person would type, in order."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from evaluator.artifacts import sha256_of
from evaluator.errors import EvaluatorError
from evaluator.evidence.experiment import Arm, Data, recipe_path

SEEDS_OF_PADIM = 5
PRODUCTS = ("plank", "plate", "terrazzo")  # of `builder demo-data`, the procedural products


@dataclass(frozen=True)
class Place:
    """Where an evidence run reads and writes."""

    experiments: Path
    photographs: Path  # DATA: normals/, inspection/, weights/
    runs: Path

    @property
    def products(self) -> Path:
        """The procedural products."""
        return self.runs / "products"

    @property
    def inspection(self) -> Path:
        """Links to all categories that are evaluated, so that one report holds them."""
        return self.runs / "inspection"

    def textures(self, count: int) -> Path:
        """So many procedural textures."""
        return self.runs / "textures" / str(count)

    def normals(self, data: Data) -> Path:
        """Links to the folders of normal images of a dataset."""
        return self.runs / "normals" / _digest(data.normals, data.textures)

    def dataset(self, data: Data) -> Path:
        """The dataset; arms that train on the same one share it."""
        recipe = recipe_path(self.experiments, data).read_text(encoding="utf-8")
        digest = _digest(recipe, data.normals, data.textures, data.samples)
        return self.runs / "datasets" / f"{data.recipe}-{digest}"

    def run(self, arm: str, seed: int) -> Path:
        """A training run."""
        return self.runs / "arms" / arm / f"seed{seed}"

    def report(self, arm: str) -> Path:
        """PaDiM's report of an arm: one backbone a seed."""
        return self.runs / "arms" / arm / "report"

    def named(self, text: str) -> str:
        """A command or message with this machine's folders written RUNS, DATA and EXPERIMENTS."""
        folders = {
            str(self.runs): "RUNS",
            str(self.photographs): "DATA",
            str(self.experiments): "EXPERIMENTS",
        }
        for folder in sorted(folders, key=len, reverse=True):  # one may lie in another
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}(?=[/:\s]|$)", folders[folder], text)
        return text


def _digest(*what: object) -> str:
    return sha256_of(json.dumps(what).encode())[:8]


def inspection_links(place: Place) -> dict[str, Path]:
    """Every category that is evaluated, by name: the procedural products, and those of DATA.

    Raises EvaluatorError where DATA holds no `inspection`, or one with a product's name.
    """
    inspection = place.photographs / "inspection"
    if not inspection.is_dir():
        raise EvaluatorError(f"{inspection}: no such folder; give --data FOLDER, which holds it")
    links = {name: place.products / name for name in PRODUCTS}
    for path in sorted(inspection.iterdir()):
        if path.name in links:
            raise EvaluatorError(f"{path}: a procedural product has that name; rename the folder")
        if path.is_dir() and not path.name.startswith("."):
            links[path.name] = path
    return links


def normals_links(place: Place, data: Data) -> dict[str, Path]:
    """Every folder of normal images that a dataset is painted on, by name."""
    links = {name: place.photographs / "normals" / name for name in data.normals}
    if data.textures:
        links["textures"] = place.textures(data.textures)
    return links


def demo_data(place: Place) -> list[str]:
    """Draw the procedural products."""
    return ["builder", "demo-data", str(place.products)]


def textures(place: Place, count: int) -> list[str]:
    """Draw procedural textures, which resemble none of the products."""
    return ["builder", "textures", str(place.textures(count)), "--count", str(count)]


def build(place: Place, data: Data) -> list[str]:
    """Build a dataset."""
    return [
        *("builder", "build", str(recipe_path(place.experiments, data))),
        *("--normals", str(place.normals(data)), "--samples", str(data.samples)),
        *("--out", str(place.dataset(data))),
    ]


def pretrain(place: Place, arm: Arm, seed: int) -> list[str]:
    """Train an arm with one seed."""
    data, options = arm.experiment.data, arm.experiment.train
    assert data is not None
    assert options is not None
    return [
        *("trainer", "pretrain", "--data", str(place.dataset(data))),
        *("--out", str(place.run(arm.name, seed)), "--seed", str(seed), "--workers", "1"),
        *(option.format(data=place.photographs, seed=seed) for option in options),
    ]


def restate(place: Place, arm: Arm, seed: int) -> list[str]:
    """Take a training run's batch norm statistics anew."""
    experiment = arm.experiment
    assert experiment.runs is not None
    assert experiment.restate is not None
    assert experiment.data is not None
    return [
        *("trainer", "restate", str(place.run(experiment.runs, seed))),
        *("--data", str(place.dataset(experiment.data)), "--out", str(place.run(arm.name, seed))),
        *experiment.restate,
    ]


def spec(place: Place, arm: Arm, seed: int) -> str:
    """The backbone of an arm and a seed as `evaluator padim` takes it."""
    experiment = arm.experiment
    if experiment.backbone is not None:
        return experiment.backbone.format(data=place.photographs, seed=seed)
    if experiment.runs is not None and experiment.restate is None:
        return str(place.run(experiment.runs, seed))
    return str(place.run(arm.name, seed))


def padim(place: Place, arm: Arm) -> list[str]:
    """Evaluate an arm on all categories, one backbone a seed."""
    backbones = [
        part
        for seed in arm.experiment.seeds
        for part in ("--backbone", f"{arm.name}-{seed}={spec(place, arm, seed)}")
    ]
    return [
        *("evaluator", "padim", "--data", str(place.inspection), "--layout", "mvtec"),
        *("--out", str(place.report(arm.name)), "--seeds", str(SEEDS_OF_PADIM)),
        *("--features", str(place.runs / "features"), "--features-max", "8"),
        *("--bootstrap", "0", *backbones, *arm.experiment.padim),
    ]


def of_data(place: Place, data: Data) -> list[list[str]]:
    """All commands of a dataset, in order; the links of `normals_links` come before them."""
    drawn = [textures(place, data.textures)] if data.textures else []
    return [*drawn, build(place, data)]


def of_arm(place: Place, arm: Arm) -> list[list[str]]:
    """All commands of an arm whose dataset is there, in order; the last one evaluates."""
    made = []
    if arm.experiment.train is not None:
        made = [pretrain(place, arm, seed) for seed in arm.experiment.seeds]
    elif arm.experiment.restate is not None:
        made = [restate(place, arm, seed) for seed in arm.experiment.seeds]
    return [*made, padim(place, arm)]
