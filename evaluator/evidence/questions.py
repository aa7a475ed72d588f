"""The questions that the arms answer, and what people wrote about them: `questions.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field

from evaluator.artifacts import Model, parse_model
from evaluator.errors import EvaluatorError
from evaluator.evidence.experiment import Arm, Name


class Question(Model):
    """One question, and its paragraph: what was asked, seen and changed."""

    name: Name
    title: str
    asked: str
    saw: str
    changed: str


class Questions(Model):
    """`questions.toml`; `untouched` are the categories that no recipe was chosen by."""

    format: Literal["semiformula-questions"]
    format_version: Literal[1]
    introduction: str
    photographs: str | None = Field(
        default=None, description="as the page names the photographs that `saw` is written about"
    )
    untouched: list[str]
    products: list[str] = Field(
        description="the procedural categories, whose pictures may be shown"
    )
    shown: list[Name] = Field(description="arms of figure 6 and of the curves")
    pictured: Name = Field(description="the arm whose run figure 5 is drawn from")
    questions: list[Question] = Field(min_length=1)


def read_questions(folder: Path, arms: list[Arm]) -> Questions:
    """The questions beside the experiments; EvaluatorError unless each arm answers one of them."""
    path = folder / "questions.toml"
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EvaluatorError(f"{path}: cannot be read as TOML ({error})") from None
    questions = parse_model(Questions, fields, str(path))
    known = {question.name for question in questions.questions}
    for arm in arms:
        if arm.experiment.question not in known:
            raise EvaluatorError(
                f"{arm.path}: question {arm.experiment.question!r} is not in {path} "
                f"({', '.join(sorted(known))})"
            )
    names = {arm.name for arm in arms}
    for name in (*questions.shown, questions.pictured):
        if name not in names:
            raise EvaluatorError(f"{path}: no arm is called {name!r}")
    data = next(arm.experiment.data for arm in arms if arm.name == questions.pictured)
    if data is not None and data.normals:
        raise EvaluatorError(
            f"{path}: pictured is {questions.pictured!r}, which is painted on photographs; name an "
            "arm of textures alone, whose pictures anyone may see"
        )
    return questions
