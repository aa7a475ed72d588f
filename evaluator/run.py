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
from evaluator.backbones import LayersAndDims, WeightsDefaults, open_backbone, parse_spec
from evaluator.cells import (
    EXAMPLES,
    Resources,
    cell_path,
    compute_cell,
    finished_cell,
    ground_truth,
    heat_maps,
)
from evaluator.errors import EvaluatorError
from evaluator.inspection import Category, find_categories, load_image, load_mask
from evaluator.networks import Network
from evaluator.padim import draw_dims, plan_tiles
from evaluator.report import (
    BackboneRecord,
    CategoryRecord,
    Cell,
    CellConfig,
    DimsOfSeed,
    Protocol,
    RandomDims,
    Report,
)
from evaluator.show import Row, write_page
from evaluator.table import MEAN, csv_text, group_of, markdown, table_rows

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "pillow")


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    root: Path
    specs: tuple[str, ...]
    categories: list[str] | None
    protocol: Protocol
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
    """Run everything and write report.json, table.csv, table.md and figure6.png.

    Returns the Markdown table. Raises EvaluatorError before any network runs for whatever can be
    seen before.
    """
    out = options.resources.out
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / "cells")
    backbones = _open_all(options)
    categories = find_categories(options.root, options.categories)
    records = [_category_record(category, options.protocol) for category in categories]
    _check_memory(options, categories, backbones)
    cells, reused = _all_cells(options, categories, backbones)
    scores = [cell.scores for _, cell in cells]
    names = [backbone.network.name for backbone in backbones]
    report = Report(
        format="semiformula-report",
        format_version=1,
        evaluator_version=__version__,
        versions=_versions(),
        data=str(options.root),
        protocol=options.protocol,
        backbones=[backbone.record for backbone in backbones],
        dims=_distinct_dims(backbones),
        categories=records,
        scores=scores,
        table=table_rows(records, names, scores),
    )
    text = markdown(report)
    write_json(out / "report.json", report)
    write_bytes(out / "table.csv", csv_text(report.table).encode())
    write_bytes(out / "table.md", text.encode())
    write_page(out / "figure6.png", names, _page_rows(options, categories, cells))
    computed = len(cells) - reused
    click.echo(
        f"{len(categories)} categories × {len(backbones)} backbones = {len(cells)} cells of "
        f"{len(options.protocol.seeds)} seeds: {computed} computed, {reused} from an earlier run"
    )
    return text


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def _open_all(options: Options) -> list[OpenedBackbone]:
    specs = [parse_spec(text) for text in options.specs]
    for spec in specs:
        if sum(spec.name == other.name for other in specs) > 1:
            raise EvaluatorError(
                f"--backbone {spec.text}: the name {spec.name!r} is taken; give NAME=SPEC"
            )
    size_px = options.protocol.crop_px or options.protocol.resize_px
    opened = []
    for spec in specs:
        network, record = open_backbone(
            spec, options.weights_defaults, options.layers_and_dims, size_px, options.device
        )
        if record.ignored_keys:
            click.echo(f"{spec.name}: ignored keys {', '.join(record.ignored_keys)}", err=True)
        dims = _random_dims(network, record, options.protocol)
        opened.append(OpenedBackbone(network, record, dims))
    return opened


def _random_dims(network: Network, record: BackboneRecord, protocol: Protocol) -> RandomDims:
    return RandomDims(
        arch=record.arch,
        layers=record.layers,
        channels=[channels for channels, _, _ in network.shapes],
        dims=record.dims,
        seeds=[
            DimsOfSeed(seed=seed, indices=draw_dims(network.channels, record.dims, seed))
            for seed in protocol.seeds
        ],
    )


def _distinct_dims(backbones: Sequence[OpenedBackbone]) -> list[RandomDims]:
    distinct: list[RandomDims] = []
    for backbone in backbones:
        if backbone.dims not in distinct:
            distinct.append(backbone.dims)
    return distinct


def _category_record(category: Category, protocol: Protocol) -> CategoryRecord:
    if category.name == MEAN:
        raise EvaluatorError(f"category {MEAN!r}: the table uses this name; rename the folder")
    masks = ground_truth(category, protocol)
    if not masks.any():
        raise EvaluatorError(
            f"category {category.name!r}: no mask has a defective pixel in the {masks.shape[1]} px "
            "crop; pixel AUROC is undefined"
        )
    empty = sum(
        image.mask is not None and not mask.any()
        for image, mask in zip(category.test, masks, strict=True)
    )
    return CategoryRecord(
        category=category.name,
        group=group_of(category.name),
        train=len(category.train),
        test_good=category.good,
        test_defective=len(category.test) - category.good,
        defects=category.defects,
        masks_without_pixels=empty,
        defective_pixel_share=float(masks.mean()),
        sha256=category.sha256,
    )


def _check_memory(
    options: Options, categories: Sequence[Category], backbones: Sequence[OpenedBackbone]
) -> None:
    images = max(len(category.train) + len(category.test) for category in categories)
    for backbone in backbones:
        plan_tiles(images, backbone.record.dims, options.resources.max_memory_bytes, max_workers=1)


def _all_cells(
    options: Options, categories: Sequence[Category], backbones: Sequence[OpenedBackbone]
) -> tuple[list[tuple[Path, Cell]], int]:
    """Every (category, backbone) in order, as (path, cell), and how many were there before."""
    versions, resources = _versions(), options.resources
    total = sum(len(c.train) + len(c.test) for c in categories) * len(backbones)
    cells: list[tuple[Path, Cell]] = []
    reused = 0
    with tqdm(total=total, unit="img", disable=None, smoothing=0.1) as bar:
        for category in categories:
            for backbone in backbones:
                name = backbone.network.name
                bar.set_description(f"{category.name} · {name}")
                bar.set_postfix_str("features")
                config = _cell_config(options.protocol, category, backbone, versions)
                digest = sha256_of(canonical_json(config))
                path = cell_path(resources.out, category.name, backbone.record.arch, digest)
                cell = finished_cell(path, config, name)
                if cell is None:
                    cell = compute_cell(path, backbone.network, category, config, resources, bar)
                else:
                    reused += 1
                    bar.total -= cell.scores.images
                cells.append((path, cell))
    return cells, reused


def _cell_config(
    protocol: Protocol, category: Category, backbone: OpenedBackbone, versions: dict[str, str]
) -> CellConfig:
    return CellConfig(
        evaluator_version=__version__,
        versions=versions,
        protocol=protocol,
        category_sha256=category.sha256,
        arch=backbone.record.arch,
        weights_sha256=backbone.record.weights_sha256,
        mean=backbone.record.mean,
        std=backbone.record.std,
        layers=backbone.record.layers,
        dims=backbone.dims.seeds,
        examples=EXAMPLES,
    )


def _page_rows(
    options: Options, categories: Sequence[Category], cells: Sequence[tuple[Path, Cell]]
) -> list[Row]:
    """The example images of every category with their masks and one map per backbone."""
    protocol = options.protocol
    rows = []
    for category in categories:
        found = [(path, cell) for path, cell in cells if cell.scores.category == category.name]
        columns = [heat_maps(path, cell) for path, cell in found]
        # The same for every backbone: the choice depends on the masks and EXAMPLES alone.
        for index, test_index in enumerate(found[0][1].heat_maps.test_images):
            image = category.test[test_index]
            assert image.mask is not None, "examples are defective"
            rows.append(
                Row(
                    category=category.name,
                    label=f"{image.defect}/{image.path.name}",
                    image=load_image(image.path, protocol.resize_px, protocol.crop_px),
                    mask=load_mask(image.mask, protocol.resize_px, protocol.crop_px),
                    maps=[maps[index] for maps in columns],
                )
            )
    return rows
