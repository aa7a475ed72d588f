"""CHECKPOINT.md says what the code reads and writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import trainer
from trainer.checkpoint import Checkpoints
from trainer.export import Backbone
from trainer.ledger import LedgerFile, digest, expected_sums
from trainer.run import Run

PAGE = (Path(trainer.__file__).parent / "CHECKPOINT.md").read_text(encoding="utf-8")
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]

MODELS = [(0, Run), (1, Checkpoints), (2, LedgerFile), (3, Backbone)]


@pytest.mark.parametrize(("number", "model"), MODELS)
def test_page_example_is_valid(number: int, model: type[BaseModel]) -> None:
    assert model.model_validate(BLOCKS[number]).model_dump(mode="json") == BLOCKS[number]


@pytest.mark.parametrize(("number", "model"), MODELS)
def test_page_schema_is_the_models(number: int, model: type[BaseModel]) -> None:
    assert model.model_json_schema() == BLOCKS[4 + number]


def test_page_has_no_other_json() -> None:
    assert len(BLOCKS) == 8


def test_page_ledger_is_that_of_its_epoch() -> None:
    line = BLOCKS[2]["epochs"][0]
    assert line["digest"] == line["expected_digest"] == digest(expected_sums(19488)[1:])
    assert line["samples"] == BLOCKS[2]["samples_per_epoch"] == 19488
