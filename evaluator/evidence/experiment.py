"""An experiment: one arm of the evidence, read from a TOML file of `data_manifests/experiments`."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from evaluator.artifacts import Model, parse_model
from evaluator.errors import EvaluatorError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
FILE_NAME = re.compile(r"\d\d-([a-z0-9][a-z0-9-]{0,39})")


class Data(Model):
    """The dataset that an arm trains on."""

    recipe: Name = Field(description="a file of the folder `recipes` beside the experiments")
    normals: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]] = Field(
        description="folders of DATA/normals"
    )
    textures: int = Field(default=0, ge=0, description="procedural textures beside them")
    samples: int = Field(ge=1)

    @model_validator(mode="after")
    def _something_to_paint_on(self) -> Self:
        if not self.normals and not self.textures:
            raise ValueError("neither normals nor textures: what is painted on?")
        return self


class Experiment(Model):
    """One arm: what is trained on what, and how PaDiM sees it.

    Exactly one of `train` (options of `trainer pretrain`; `data` is its dataset), `backbone` (a
    SPEC of `evaluator padim`, where {data} is the folder of photographs and {seed} the seed) and
    `runs` (another arm, whose training runs are taken) is given.
    """

    format: Literal["semiformula-experiment"]
    format_version: Literal[1]
    question: Name
    title: str = Field(min_length=1, max_length=80)
    baseline: Name | None = Field(default=None, description="the arm it is compared with")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1], min_length=1)
    data: Data | None = None
    train: list[str] | None = None
    restate: list[str] | None = Field(
        default=None, description="options of `trainer restate` for the runs"
    )
    backbone: str | None = None
    runs: Name | None = None
    padim: list[str] = Field(default=[], description="more options of `evaluator padim`")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(x is not None for x in (self.train, self.backbone, self.runs)) != 1:
            raise ValueError("give exactly one of train, backbone and runs")
        if self.restate is not None and self.runs is None:
            raise ValueError("restate needs runs: whose are they?")
        if (self.train is None and self.restate is None) != (self.data is None):
            raise ValueError("train and restate need a [data] table, and only they do")
        return self

    def made_of(self) -> dict[str, object]:
        """What the arm's runs and scores follow from; question, title and baseline may change."""
        return self.model_dump(mode="json", exclude={"question", "title", "baseline"})


@dataclass(frozen=True)
class Arm:
    """An experiment with its name, and the question in its opening comment."""

    name: str
    path: Path
    comment: str
    experiment: Experiment


def read_arms(folder: Path) -> list[Arm]:
    """All experiments of a folder in the order of their files' names: `NN-name.toml`.

    Raises EvaluatorError for a file without an opening comment, an unknown key, or a name that
    stands for nothing.
    """
    arms = [_read(path) for path in sorted(folder.glob("*.toml")) if path.name[:2].isdigit()]
    if not arms:
        raise EvaluatorError(f"{folder}: holds no experiment (NN-name.toml)")
    known = {arm.name for arm in arms}
    if len(known) < len(arms):
        raise EvaluatorError(f"{folder}: two files for one arm; give each another name")
    for arm in arms:
        for key in ("baseline", "runs"):
            other = getattr(arm.experiment, key)
            if other is not None and other not in known - {arm.name}:
                raise EvaluatorError(f"{arm.path}: {key} is {other!r}, expected another arm's name")
        _check_placeholders(arm)
        _check_source(arm, arms)
        data = arm.experiment.data
        if data is not None and not recipe_path(folder, data).is_file():
            raise EvaluatorError(f"{arm.path}: no recipe {recipe_path(folder, data)}")
    return arms


def _check_placeholders(arm: Arm) -> None:
    texts = [*(arm.experiment.train or []), arm.experiment.backbone or ""]
    for text in texts:
        try:
            text.format(data="", seed=0)
        except (KeyError, IndexError, ValueError, AttributeError):
            raise EvaluatorError(
                f"{arm.path}: {text!r}: only {{data}} and {{seed}} may stand in braces"
            ) from None


def _check_source(arm: Arm, arms: list[Arm]) -> None:
    """The arm whose runs another takes must train them, with the same seeds."""
    source = next((one for one in arms if one.name == arm.experiment.runs), None)
    if source is None:
        return
    if source.experiment.train is None:
        raise EvaluatorError(f"{arm.path}: runs is {source.name!r}, which trains nothing")
    if source.path.name > arm.path.name:
        raise EvaluatorError(
            f"{arm.path}: runs is {source.name!r}, which comes later; give this a larger number"
        )
    missing = set(arm.experiment.seeds) - set(source.experiment.seeds)
    if missing:
        raise EvaluatorError(f"{arm.path}: seed {min(missing)} is none of {source.name!r}'s")


def recipe_path(folder: Path, data: Data) -> Path:
    """The recipe of an arm's dataset."""
    return folder / "recipes" / f"{data.recipe}.toml"


def _read(path: Path) -> Arm:
    name = FILE_NAME.fullmatch(path.stem)
    if name is None:
        raise EvaluatorError(f"{path}: expected a name like 10-direct.toml")
    try:
        text = path.read_text(encoding="utf-8")
        fields = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EvaluatorError(f"{path}: cannot be read as TOML ({error})") from None
    comment = opening_comment(text)
    if not comment:
        raise EvaluatorError(f"{path}: must open with a comment: question, command, minutes")
    return Arm(name[1], path, comment, parse_model(Experiment, fields, str(path)))


def opening_comment(text: str) -> str:
    """The comment lines that a file begins with, as one text."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return "\n".join(lines)
