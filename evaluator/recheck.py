"""Works out the numbers of a report again, from the stored statistics and without images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evaluator.artifacts import read_json
from evaluator.bootstrap import holm
from evaluator.cells import cell_statistics, choose_shown, image_scores, shown_levels
from evaluator.compare import MEAN
from evaluator.curve import by_metric
from evaluator.datasets import Category, TestImage
from evaluator.errors import EvaluatorError
from evaluator.metrics import CURVE_FPR, curves, measure
from evaluator.padim import draw_dims
from evaluator.protocols import OWN, PROTOCOLS, protocol_sha256
from evaluator.published import published
from evaluator.recheck_form import EXACT, Fact, form_facts
from evaluator.report import CategoryRecord, Comparison, RandomDims, Report, Scores
from evaluator.statistics import Statistics
from evaluator.summary import summarise
from evaluator.table import csv_text, group_of, markdown

PERCENT = 1.5e-4  # four decimals, of which another machine may round the last one differently
MOST_CHANNELS = 10**6  # of all layers of a network
P_DRAWS = 4  # so many draws may lie on the other side of 0 on another machine


def recheck(folder: Path) -> str:
    """Compare report.json, table.csv, table.md and the maps with the statistics; one line.

    Raises EvaluatorError with the first value that differs, and for files that are missing or
    damaged.
    """
    report = read_json(Report, folder / "report.json")
    worked_out = _compare(folder, _report_facts(report))
    worked_out += sum(_compare(folder, _cell_facts(folder, report, cell)) for cell in report.scores)
    again = summarise(report, lambda cell: cell_statistics(folder, cell))
    worked_out += _compare(folder, _summary_facts(report, again))
    for name, text in (("table.csv", csv_text(report.table)), ("table.md", markdown(report))):
        if _text(folder / name) != text:
            raise EvaluatorError(f"{folder / name}: not what report.json says; evaluate again")
    form = _compare(folder, form_facts(folder, report))
    return (
        f"{folder}: {len(report.scores)} cells, {worked_out} values worked out again, all equal; "
        "table.csv and table.md agree with report.json. "
        f"{form} values checked for form only (layer_shares, learning_curve, protocol_moves)"
    )


def _report_facts(report: Report) -> Iterator[Fact]:
    """What follows from the report's own settings and from the package."""
    protocol = report.protocol
    yield "protocol_sha256", protocol_sha256(protocol), report.protocol_sha256, EXACT
    if protocol.name != OWN:
        named = PROTOCOLS.get(protocol.name)
        yield f"protocol {protocol.name!r}", named, protocol, EXACT
    possible = all(0 <= seed < 2**64 for seed in report.seeds)
    yield "seeds are of 64 bits", True, possible, EXACT
    for what, names in (
        ("seeds", report.seeds),
        ("names of the backbones", [backbone.name for backbone in report.backbones]),
        ("names of the categories", [record.category for record in report.categories]),
    ):
        yield f"{what}: how many different ones", len(set(names)), len(names), EXACT
    wanted = dict.fromkeys((b.arch, tuple(b.layers), b.dims) for b in report.backbones)
    found = [(one.arch, tuple(one.layers), one.dims) for one in report.dims]
    yield "dims: network, layers and number", list(wanted), found, EXACT
    for index, one in enumerate(report.dims):
        yield from _dims_facts(f"dims[{index}]", report.seeds, one)
    archs = [backbone.arch for backbone in report.backbones]
    categories = [record.category for record in report.categories]
    yield "published", published(categories, archs), report.published, EXACT


def _dims_facts(where: str, seeds: Sequence[int], one: RandomDims) -> Iterator[Fact]:
    channels = sum(one.channels)
    possible = min(one.channels) > 0 and one.dims <= channels <= MOST_CHANNELS
    yield f"{where}: number of channels is possible", True, possible, EXACT
    yield f"{where}: layers with channels", len(one.layers), len(one.channels), EXACT
    yield f"{where}: seeds", list(seeds), [draw.seed for draw in one.seeds], EXACT
    for draw in one.seeds:
        drawn = draw_dims(channels, one.dims, draw.seed)
        yield f"{where}: indices of seed {draw.seed}", drawn, draw.indices, EXACT


def _cell_facts(folder: Path, report: Report, cell: Scores) -> Iterator[Fact]:
    """What a cell's statistics and maps determine, of the cell and of its category."""
    (record,) = (one for one in report.categories if one.category == cell.category)
    statistics = cell_statistics(folder, cell)
    where = f"{cell.category}, {cell.backbone}"
    yield f"{where}: number of statistics", len(report.seeds), len(statistics), EXACT
    for one in statistics:
        yield from _truth_facts(record, one, report.protocol.size_px)
    for key, found, stored, tolerance in _score_facts(cell, statistics):
        yield f"{where}: {key}", found, stored, tolerance
    size_px = report.protocol.size_px
    yield f"{where}: shown", choose_shown(_listed(record), size_px), cell.shown, EXACT
    try:
        maps = shown_levels(folder, cell)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluatorError(f"{folder / cell.maps.file}: not readable as PNG ({error})") from None
    yield f"{where}: shape of the maps", (len(cell.shown), size_px, size_px), maps.shape, EXACT


def _truth_facts(record: CategoryRecord, one: Statistics, size_px: int) -> Iterator[Fact]:
    """The ground truth that every statistics file of a category repeats."""
    where, images = record.category, len(one.image_defective)
    defective = one.image_defective.tolist()
    yield f"{where}: number of images", images, len(record.images), EXACT
    yield f"{where}: test_defective", sum(defective), record.test_defective, EXACT
    yield f"{where}: test_good", images - sum(defective), record.test_good, EXACT
    yield f"{where}: group", group_of(record.category), record.group, EXACT
    yield f"{where}: masks", one.has_masks, record.masks, EXACT
    pixels = one.positives + one.negatives
    wanted = images * size_px**2 if one.has_masks else 0
    yield f"{where}: pixels of all images", wanted, pixels, EXACT
    share = one.positives / pixels if one.has_masks else None
    yield f"{where}: defective_pixel_share", share, record.defective_pixel_share, EXACT
    defects = Counter(image.defect for image in record.images if image.defect != "good")
    yield f"{where}: defects", dict(defects), record.defects, EXACT
    regions: list[list[int]] = [[] for _ in range(images)]
    for image, size in zip(one.region_image.tolist(), one.region_pixels.tolist(), strict=True):
        regions[image].append(size)
    for index, image in enumerate(record.images):
        key = f"{where}: images[{index}]"
        yield f"{key} is defective", defective[index], image.defect != "good", EXACT
        yield f"{key}.regions", regions[index], image.regions, EXACT


def _score_facts(cell: Scores, statistics: Sequence[Statistics]) -> Iterator[Fact]:
    metrics = by_metric([measure(one) for one in statistics])
    yield "names of the metrics", sorted(metrics), sorted(cell.metrics), EXACT
    for metric, values in metrics.items():
        for seed, value in enumerate(values):
            yield f"{metric}, seed {seed}", value, cell.metrics[metric][seed], EXACT
    first = statistics[0]
    yield "curves: whether there are any", first.has_masks, cell.curves is not None, EXACT
    if cell.curves is not None:
        tpr, pro = curves(first, CURVE_FPR)
        yield "curves.fpr", list(CURVE_FPR), cell.curves.fpr, EXACT
        yield "curves.tpr", tpr.tolist(), cell.curves.tpr, EXACT
        yield "curves.pro", pro.tolist(), cell.curves.pro, EXACT
    images = image_scores(statistics, first.region_image)
    yield "number of images", len(images), len(cell.images), EXACT
    for index, (mine, theirs) in enumerate(zip(images, cell.images, strict=True)):
        for key in ("score", "pixel_auroc", "regions_aupro_30"):
            yield f"images[{index}].{key}", getattr(mine, key), getattr(theirs, key), EXACT


def _listed(record: CategoryRecord) -> Category:
    """The category as far as the choice of the maps looks at it."""
    return Category(
        name=record.category,
        root=Path(),
        layout=record.layout,
        train=(),
        test=tuple(TestImage(Path(image.file), image.defect) for image in record.images),
        has_masks=record.masks,
        sha256=record.sha256,
        image_sha256={},
        defects=record.defects,
        findings=(),
    )


def _summary_facts(report: Report, again: Report) -> Iterator[Fact]:
    """Table, intervals and comparisons against those of `again`."""
    yield "number of rows in table", len(again.table), len(report.table), EXACT
    for index, (row, stored) in enumerate(zip(again.table, report.table, strict=True)):
        for key, value in row.model_dump().items():
            yield f"table[{index}].{key}", value, getattr(stored, key), PERCENT
    mine, theirs = again.comparisons, report.comparisons
    yield "number of rows in comparisons", len(mine), len(theirs), EXACT
    corrected = _corrected(theirs)
    for index, (pair, found) in enumerate(zip(theirs, mine, strict=True)):
        where = f"comparisons[{index}]"
        for key in ("group", "category", "metric", "a", "b", "difference", "low", "high"):
            yield f"{where}.{key}", getattr(found, key), getattr(pair, key), PERCENT
        one_draw = 2 / (1 + report.bootstrap.draws)
        yield f"{where}.p", found.p, pair.p, P_DRAWS * one_draw
        yield f"{where}.p", max(pair.p, one_draw), pair.p, EXACT  # never less than one draw
        # Of the stored p: what several draws more or less multiply to cannot hide anything here.
        yield f"{where}.p_holm", corrected[index], pair.p_holm, EXACT
        distinct = pair.p_holm < 1 - report.bootstrap.level
        yield f"{where}.distinct", distinct, pair.distinct, EXACT


def _corrected(pairs: Sequence[Comparison]) -> list[float]:
    """Holm's correction of the stored p, each family of tests on its own."""
    families: dict[tuple[str, bool], list[int]] = {}
    for index, pair in enumerate(pairs):
        families.setdefault((pair.metric, pair.category == MEAN), []).append(index)
    corrected = [0.0] * len(pairs)
    for members in families.values():
        values = holm([pairs[index].p for index in members])
        for index, value in zip(members, values, strict=True):
            corrected[index] = value
    return corrected


def _compare(folder: Path, facts: Iterator[Fact]) -> int:
    """How many values were compared; EvaluatorError with the first that differs."""
    compared = 0
    for where, found, stored, tolerance in facts:
        if not _equal(found, stored, tolerance):
            raise EvaluatorError(
                f"{folder / 'report.json'}: {where} is {_short(stored)}, worked out again it is "
                f"{_short(found)}; evaluate again"
            )
        compared += len(found) if isinstance(found, list) else 1
    return compared


def _short(value: Any) -> str:
    return f"{value!r:.60}"


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(*pair, tolerance) for pair in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=EXACT, abs_tol=tolerance)
    return bool(a == b)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluatorError(f"{path}: cannot be read ({error})") from None
