"""The numbers of a report that its statistics do not hold: whether their form can be right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluator.artifacts import read_json
from evaluator.compare import MEAN
from evaluator.protocols import PROTOCOLS, protocol_sha256
from evaluator.report import Cell, Report, Scores

EXACT = 1e-9  # other machines add up in another order
SUM = 1e-6  # of shares that are rounded one by one

Fact = tuple[str, Any, Any, float]  # what, as it has to be, as it is stored, tolerance


def form_facts(folder: Path, report: Report) -> Iterator[Fact]:
    """Learning curves, layers' shares, other protocols; the cells' own files where they are."""
    numbers = sorted({point.train for cell in report.scores for point in cell.learning_curve})
    train = {record.category: record.train for record in report.categories}
    layers = {backbone.name: len(backbone.layers) for backbone in report.backbones}
    for cell in report.scores:
        where = f"{cell.category}, {cell.backbone}"
        wanted = [number for number in numbers if number < train[cell.category]]
        found = [point.train for point in cell.learning_curve]
        yield f"{where}: learning_curve, train", wanted, found, EXACT
        yield from _curve_facts(f"{where}: learning_curve", report, cell)
        for index, image in enumerate(cell.images):
            key, shares = f"{where}: images[{index}].layer_shares", image.layer_shares
            yield f"{key}, how many", layers[cell.backbone], len(shares), EXACT
            yield f"{key}, their sum", 1.0 if any(shares) else 0.0, math.fsum(shares), SUM
        yield from _kept_facts(folder, report, cell)
    yield from _move_facts(report)


def _curve_facts(where: str, report: Report, cell: Scores) -> Iterator[Fact]:
    for point in cell.learning_curve:
        names = f"{where}, {point.train}: names of the metrics"
        yield names, sorted(cell.metrics), sorted(point.metrics), EXACT
        for metric, values in point.metrics.items():
            key = f"{where}, {point.train}: number of {metric}"
            yield key, len(report.seeds), len(values), EXACT


def _kept_facts(folder: Path, report: Report, cell: Scores) -> Iterator[Fact]:
    """The same numbers in cells/*.json, which a copy of a report may lack."""
    name = cell.statistics[0].file.removesuffix(f".seed{report.seeds[0]}.npz") + ".json"
    if not (folder / name).is_file():
        return
    kept = read_json(Cell, folder / name).scores
    where = f"{cell.category}, {cell.backbone} beside {name}"
    yield f"{where}: learning_curve", kept.learning_curve, cell.learning_curve, EXACT
    shares = [image.layer_shares for image in kept.images]
    found = [image.layer_shares for image in cell.images]
    yield f"{where}: layer_shares", shares, found, EXACT


def _move_facts(report: Report) -> Iterator[Fact]:
    own = {(r.category, r.backbone, r.metric): r.mean for r in report.table if r.category != MEAN}
    there = dict.fromkeys((move.protocol, move.category) for move in report.protocol_moves)
    wanted = {(protocol, *key) for protocol, category in there for key in own if key[0] == category}
    found = [(m.protocol, m.category, m.backbone, m.metric) for m in report.protocol_moves]
    yield "protocol_moves: their lines", sorted(wanted), sorted(found), EXACT
    for index, move in enumerate(report.protocol_moves):
        where = f"protocol_moves[{index}]"
        named = PROTOCOLS.get(move.protocol)
        digest = None if named is None else protocol_sha256(named)
        yield f"{where}.protocol_sha256", digest, move.protocol_sha256, EXACT
        yield f"{where} is of another protocol", True, digest != report.protocol_sha256, EXACT
        difference = round(move.mean - own[move.category, move.backbone, move.metric], 4)
        yield f"{where}.difference", difference, move.difference, EXACT
