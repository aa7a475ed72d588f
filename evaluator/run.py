"""The evaluation as a whole: check everything, compute or reuse each cell, write the report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from evaluator import __version__
from evaluator.artifacts import canonical_json, remove_leftovers, sha256_of, write_bytes, write_json
from evaluator.audited import checked_findings
from evaluator.backbones import LayersAndDims, WeightsDefaults, open_backbone, parse_spec
from evaluator.cells import (
    SHOWN,
    Resources,
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
from evaluator.report import (
    BackboneRecord,
    Bootstrap,
    CategoryRecord,
    Cell,
    CellConfig,
    DimsOfSeed,
    Finding,
    ProtocolMove,
    RandomDims,
    Report,
    Scores,
    TestImageRecord,
)
from evaluator.show import write_figure6
from evaluator.summary import summarise
from evaluator.table import csv_text, group_of, markdown, moves_text, table_rows

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
    """Run everything and write the report's files; returns the Markdown table.

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
    cells, reused = all_cells(options, options.protocol, categories, backbones)
    report = _report(options, backbones, records, [cell.scores for cell in cells])
    report = report.model_copy(
        update={"protocol_moves": protocol_moves(options, report, categories)}
    )
    text = markdown(report) + moves_text(report.protocol_moves)
    write_bytes(out / "table.csv", csv_text(report.table).encode())
    write_bytes(out / "table.md", markdown(report).encode())
    panels = choose_panels(report, categories, out)
    write_figure6(out / "figure6.png", [b.name for b in report.backbones], panels.figure)
    write_page(out / "report.html", report, panels.page)
    write_json(out / "report.json", report)
    computed = len(cells) - reused
    click.echo(
        f"{len(categories)} categories × {len(backbones)} backbones = {len(cells)} cells of "
        f"{len(options.seeds)} seeds: {computed} computed, {reused} from an earlier run; "
        f"{options.resources.features.summary()}"
    )
    return text


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


def category_record(
    category: Category, protocol: Protocol, findings: Sequence[Finding]
) -> CategoryRecord:
    """What report.json says of a category; EvaluatorError where no pixel is defective."""
    if category.name == MEAN:
        raise EvaluatorError(f"category {MEAN!r}: the table uses this name; rename the folder")
    truth = ground_truth(category, protocol)
    share = None
    sizes: list[list[int]] = [[] for _ in category.test]
    if truth.regions is not None:
        share = float((truth.regions > 0).mean())
        if share == 0:
            raise EvaluatorError(
                f"category {category.name!r}: no mask has a defective pixel in the "
                f"{protocol.size_px} px crop; pixel AUROC is undefined"
            )
        for index, regions in enumerate(truth.regions):
            counts = np.bincount(regions[regions > 0])
            sizes[index] = counts[counts > 0].tolist()
    return CategoryRecord(
        category=category.name,
        group=group_of(category.name),
        layout=category.layout,
        train=len(category.train),
        test_good=category.good,
        test_defective=len(category.test) - category.good,
        defects=category.defects,
        masks=category.has_masks,
        defective_pixel_share=share,
        images=[
            TestImageRecord(
                file=image.path.relative_to(category.root).as_posix(),
                defect=image.defect,
                regions=regions,
            )
            for image, regions in zip(category.test, sizes, strict=True)
        ],
        findings=[finding for finding in findings if finding.category == category.name],
        sha256=category.sha256,
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
    cells: list[Cell] = []
    reused = 0
    with tqdm(total=total, unit="img", disable=None, smoothing=0.1) as bar:
        for category in categories:
            for backbone in backbones:
                name = backbone.network.name
                bar.set_description(f"{category.name} · {name}")
                config = _cell_config(options, protocol, category, backbone, used)
                digest = sha256_of(canonical_json(config))
                path = cell_path(resources.out, category.name, backbone.record.arch, digest)
                cell = finished_cell(resources.out, path, config, name)
                if cell is None:
                    cell = compute_cell(
                        path, backbone.network, category, config, resources, bar.update
                    )
                else:
                    reused += 1
                    bar.total -= len(category.train) + len(category.test)
                cells.append(cell)
    return cells, reused


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
        category_sha256=category.sha256,
        arch=backbone.record.arch,
        weights_sha256=backbone.record.weights_sha256,
        mean=backbone.record.mean,
        std=backbone.record.std,
        layers=backbone.record.layers,
        dims=backbone.dims.seeds,
        learning_curve=options.learning_curve,
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


def protocol_moves(
    options: Options, report: Report, categories: Sequence[Category]
) -> list[ProtocolMove]:
    """With --protocol-diff: the same weights under the other named protocols."""
    moves: list[ProtocolMove] = []
    own = {(r.category, r.backbone, r.metric): r.mean for r in report.table if r.category != MEAN}
    for protocol in PROTOCOLS.values() if options.protocol_diff else ():
        digest = protocol_sha256(protocol)
        if digest == report.protocol_sha256:
            continue
        backbones = open_all(options, protocol)
        cells, _ = all_cells(options, protocol, categories, backbones)
        names = [backbone.network.name for backbone in backbones]
        rows = table_rows(report.categories, names, [cell.scores for cell in cells])
        moves += [
            ProtocolMove(
                protocol=protocol.name,
                protocol_sha256=digest,
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
