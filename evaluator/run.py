"""The evaluation as a whole: check everything, compute or reuse each cell, write the report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import torch
from tqdm import tqdm

from evaluator import __version__
from evaluator.artifacts import canonical_json, remove_leftovers, sha256_of, write_bytes, write_json
from evaluator.audited import checked_findings
from evaluator.backbones import LayersAndDims, WeightsDefaults, open_backbone, parse_spec
from evaluator.cells import (
    SHOWN,
    Resources,
    Truth,
    cell_path,
    cell_statistics,
    compute_cell,
    finished_cell,
    ground_truth,
)
from evaluator.compare import MEAN
from evaluator.datasets import Category, find_categories
from evaluator.errors import EvaluatorError
from evaluator.gallery import choose_panels
from evaluator.networks import Network
from evaluator.padim import draw_dims
from evaluator.page import write_page
from evaluator.plan import make_plan
from evaluator.protocols import PROTOCOLS, Protocol, protocol_sha256
from evaluator.published import published
from evaluator.records import category_record
from evaluator.report import (
    BackboneRecord,
    Bootstrap,
    CategoryRecord,
    Cell,
    CellConfig,
    DimsOfSeed,
    ProtocolMove,
    RandomDims,
    Report,
    Scores,
)
from evaluator.show import write_figure6
from evaluator.summary import summarise
from evaluator.table import csv_text, markdown, moves_text, table_rows

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "pillow")


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    root: Path
    layout: str
    specs: tuple[str, ...]
    categories: list[str] | None
    protocol: Protocol
    seeds: list[int]
    feature_dtype: str
    learning_curve: list[int]
    bootstrap: Bootstrap
    protocol_diff: bool
    weights_defaults: WeightsDefaults
    layers_and_dims: LayersAndDims
    device: torch.device
    resources: Resources


@dataclass(frozen=True)
class OpenedBackbone:
    """A backbone ready to run, its record, and its random dimensions."""

    network: Network
    record: BackboneRecord
    dims: RandomDims


def evaluate(options: Options) -> str:
    """Run everything and write the report's files; returns the tables as Markdown.

    Raises EvaluatorError before any network runs for whatever can be seen before.
    """
    out = options.resources.out
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / "cells")
    backbones = open_all(options, options.protocol)
    categories = find_categories(options.root, options.categories, options.layout)
    findings = checked_findings(categories, options.protocol, out / "cells")
    records = [category_record(category, options.protocol, findings) for category in categories]
    print_plans(options, categories, backbones)
    others = other_protocols(options, categories)
    _say_what_the_curve_leaves_out(options, categories)
    cells, reused = all_cells(options, options.protocol, categories, backbones)
    report = _report(options, backbones, records, [cell.scores for cell in cells])
    _write(report, categories, out)
    if others:  # after the report: whatever goes wrong there, it is not lost
        moves = protocol_moves(options, report, others)
        report = report.model_copy(update={"protocol_moves": moves})
        _write(report, categories, out)
    computed = len(cells) - reused
    click.echo(
        f"{len(categories)} categories × {len(backbones)} backbones = {len(cells)} cells of "
        f"{len(options.seeds)} seeds: {computed} computed, {reused} from an earlier run; "
        f"{options.resources.features.summary()}"
    )
    return markdown(report) + moves_text(report.protocol_moves)


def _write(report: Report, categories: Sequence[Category], out: Path) -> None:
    """All files of the report, report.json last."""
    write_bytes(out / "table.csv", csv_text(report.table).encode())
    write_bytes(out / "table.md", markdown(report).encode())
    panels = choose_panels(report, categories, out)
    write_figure6(out / "figure6.png", [b.name for b in report.backbones], panels.figure)
    write_page(out / "report.html", report, panels.page)
    write_json(out / "report.json", report)


def versions() -> dict[str, str]:
    """The libraries that the numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def open_all(options: Options, protocol: Protocol) -> list[OpenedBackbone]:
    """Every backbone, ready to run on photographs of this protocol's size."""
    specs = [parse_spec(text) for text in options.specs]
    for spec in specs:
        if sum(spec.name == other.name for other in specs) > 1:
            raise EvaluatorError(
                f"--backbone {spec.text}: the name {spec.name!r} is taken; give NAME=SPEC"
            )
    opened = []
    for spec in specs:
        network, record = open_backbone(
            spec,
            options.weights_defaults,
            options.layers_and_dims,
            protocol.size_px,
            options.device,
        )
        if record.ignored_keys and protocol == options.protocol:
            click.echo(f"{spec.name}: ignored keys {', '.join(record.ignored_keys)}", err=True)
        dims = _random_dims(network, record, options.seeds)
        opened.append(OpenedBackbone(network, record, dims))
    return opened


def _random_dims(network: Network, record: BackboneRecord, seeds: Sequence[int]) -> RandomDims:
    return RandomDims(
        arch=record.arch,
        layers=record.layers,
        channels=[channels for channels, _, _ in network.shapes],
        dims=record.dims,
        seeds=[
            DimsOfSeed(seed=seed, indices=draw_dims(network.channels, record.dims, seed))
            for seed in seeds
        ],
    )


def all_cells(
    options: Options,
    protocol: Protocol,
    categories: Sequence[Category],
    backbones: Sequence[OpenedBackbone],
) -> tuple[list[Cell], int]:
    """Every (category, backbone) in order, and how many were there before."""
    resources, used = options.resources, versions()
    total = sum(len(c.train) + len(c.test) for c in categories) * len(backbones)
    cells: list[tuple[Path, Cell]] = []
    computed: set[Path] = set()
    with tqdm(total=total, unit="img", disable=None, smoothing=0.1) as bar:
        for category in categories:
            truth: Truth | None = None  # read once, and only where a cell is missing
            for backbone in backbones:
                name = backbone.network.name
                bar.set_description(f"{category.name} · {name}")
                config = _cell_config(options, protocol, category, backbone, used)
                digest = sha256_of(canonical_json(config))
                path = cell_path(resources.out, category.name, backbone.record.arch, digest)
                cell = finished_cell(resources.out, path, config, name)
                if cell is None:
                    truth = truth or ground_truth(category, protocol)
                    try:
                        cell = compute_cell(
                            path, backbone.network, category, truth, config, resources, bar.update
                        )
                    except EvaluatorError as error:
                        raise EvaluatorError(
                            f"category {category.name}, backbone {name}, protocol "
                            f"{protocol.name}: {error.message}"
                        ) from None
                    computed.add(path)
                else:
                    bar.total -= len(category.train) + len(category.test)
                cells.append((path, cell))
    return [cell for _, cell in cells], sum(path not in computed for path, _ in cells)


def _cell_config(
    options: Options,
    protocol: Protocol,
    category: Category,
    backbone: OpenedBackbone,
    used: dict[str, str],
) -> CellConfig:
    return CellConfig(
        evaluator_version=__version__,
        versions=used,
        protocol=protocol,
        seeds=options.seeds,
        feature_dtype=options.feature_dtype,
        device=backbone.network.device.type,
        category_sha256=category.sha256,
        arch=backbone.record.arch,
        weights_sha256=backbone.record.weights_sha256,
        mean=backbone.record.mean,
        std=backbone.record.std,
        layers=backbone.record.layers,
        dims=backbone.dims.seeds,
        # Only under the report's own protocol: nothing shows the others' curves.
        learning_curve=options.learning_curve if protocol == options.protocol else [],
        shown=SHOWN,
    )


def print_plans(
    options: Options, categories: Sequence[Category], backbones: Sequence[OpenedBackbone]
) -> None:
    """Say what the scoring of the largest category will take; EvaluatorError when too much."""
    largest = max(categories, key=lambda category: len(category.train) + len(category.test))
    lines = {}
    for backbone in backbones:
        plan = make_plan(
            backbone.network.shapes,
            [draw.indices for draw in backbone.dims.seeds],
            len(largest.train),
            len(largest.test),
            options.resources.max_memory_bytes,
            options.resources.cores,
            split_seeds=1,
        )
        lines[backbone.record.arch, backbone.record.dims] = (
            f"{backbone.record.arch}, {backbone.record.dims} dimensions, {largest.name} "
            f"({len(largest.train)} + {len(largest.test)} images): {plan.form} form, "
            f"{plan.workers} tiles at once, {plan.peak_bytes / 2**30:.2f} GiB of "
            f"{options.resources.max_memory_bytes / 2**30:.2f} allowed"
        )
    for line in lines.values():
        click.echo(line, err=True)


def _report(
    options: Options,
    backbones: Sequence[OpenedBackbone],
    records: list[CategoryRecord],
    scores: list[Scores],
) -> Report:
    names = [backbone.network.name for backbone in backbones]
    report = Report(
        format="semiformula-report",
        format_version=2,
        evaluator_version=__version__,
        versions=versions(),
        data=str(options.root),
        protocol=options.protocol,
        protocol_sha256=protocol_sha256(options.protocol),
        seeds=options.seeds,
        feature_dtype=options.feature_dtype,
        bootstrap=options.bootstrap,
        backbones=[backbone.record for backbone in backbones],
        dims=_distinct_dims(backbones),
        categories=records,
        scores=scores,
        table=table_rows(records, names, scores),
        comparisons=[],
        published=published(
            [record.category for record in records], [b.record.arch for b in backbones]
        ),
        protocol_moves=[],
    )
    return summarise(report, lambda cell: cell_statistics(options.resources.out, cell))


def _distinct_dims(backbones: Sequence[OpenedBackbone]) -> list[RandomDims]:
    distinct: list[RandomDims] = []
    for backbone in backbones:
        if backbone.dims not in distinct:
            distinct.append(backbone.dims)
    return distinct


def other_protocols(
    options: Options, categories: Sequence[Category]
) -> list[tuple[Protocol, list[Category]]]:
    """With --protocol-diff: the other named protocols, each with the categories it can score.

    What cannot run under one of them is an EvaluatorError here, before any network runs. A
    category whose defects it loses is left out, and said so.
    """
    found = []
    own = protocol_sha256(options.protocol)
    for protocol in PROTOCOLS.values() if options.protocol_diff else ():
        if protocol_sha256(protocol) == own:
            continue
        usable = []
        for category in categories:
            regions = ground_truth(category, protocol).regions
            if regions is None or regions.any():
                usable.append(category)
            else:
                click.echo(
                    f"{category.name}: no defective pixel is left under protocol {protocol.name}; "
                    "left out there",
                    err=True,
                )
        if usable:
            print_plans(options, usable, open_all(options, protocol))
            found.append((protocol, usable))
    return found


def protocol_moves(
    options: Options, report: Report, others: Sequence[tuple[Protocol, list[Category]]]
) -> list[ProtocolMove]:
    """How far the same weights move under the other protocols."""
    moves: list[ProtocolMove] = []
    own = {(r.category, r.backbone, r.metric): r.mean for r in report.table if r.category != MEAN}
    for protocol, categories in others:
        backbones = open_all(options, protocol)
        cells, _ = all_cells(options, protocol, categories, backbones)
        usable = {category.name for category in categories}
        records = [record for record in report.categories if record.category in usable]
        names = [backbone.network.name for backbone in backbones]
        rows = table_rows(records, names, [cell.scores for cell in cells])
        moves += [
            ProtocolMove(
                protocol=protocol.name,
                protocol_sha256=protocol_sha256(protocol),
                category=row.category,
                backbone=row.backbone,
                metric=row.metric,
                mean=row.mean,
                difference=round(row.mean - own[row.category, row.backbone, row.metric], 4),
            )
            for row in rows
            if row.category != MEAN
        ]
    return moves


def _say_what_the_curve_leaves_out(options: Options, categories: Sequence[Category]) -> None:
    for category in categories:
        normals = len(category.train)
        beyond = [number for number in options.learning_curve if number >= normals]
        if beyond:
            click.echo(
                f"{category.name}: {normals} normal photographs; --learning-curve "
                f"{','.join(map(str, beyond))} left out",
                err=True,
            )
