"""The report: its spec page, its rows, and the table with the paper's columns."""

import json
from pathlib import Path

import pytest

import evaluator
from evaluator.artifacts import parse_model, readable_json
from evaluator.errors import EvaluatorError
from evaluator.report import Published, Report, TableRow
from evaluator.table import TITLES, csv_text, group_of, markdown, notes, paper_table, table_rows

PAGE = Path(evaluator.__file__).with_name("REPORT.md").read_text(encoding="utf-8")
EXAMPLE, SCHEMA = (json.loads(part.split("```")[0]) for part in PAGE.split("```json\n")[1:])


METRICS = {metric: [0.5, 0.5] for metric in TITLES}


def report_with(**changes: object) -> Report:
    return parse_model(Report, EXAMPLE | changes, "report.json")


def scored(**changes: object) -> dict[str, object]:
    """The example's scores with the first changed."""
    first, *others = EXAMPLE["scores"]
    return {"scores": [first | changes, *others]}


def stored(**changes: object) -> dict[str, object]:
    return scored(maps=EXAMPLE["scores"][0]["maps"] | changes)


def two_categories() -> Report:
    """bottle (in the paper) and bolt (not), one backbone, seeds that go up and down."""
    category, score = EXAMPLE["categories"][0], EXAMPLE["scores"][0]
    bottle = METRICS | {"pixel_auroc": [0.9, 0.8], "image_auroc": [1.0, 1.0]}
    bolt = METRICS | {"pixel_auroc": [0.6, 0.7], "image_auroc": [0.5, 0.7]}
    return report_with(
        backbones=EXAMPLE["backbones"][:1],
        categories=[
            category | {"category": "bottle", "group": "other"},
            category | {"category": "bolt", "group": "own"},
        ],
        seeds=[0, 1],
        scores=[
            score | {"category": "bottle", "metrics": bottle},
            score | {"category": "bolt", "metrics": bolt},
        ],
        comparisons=[],
        published=[],
    )


def rows_of(report: Report) -> list[TableRow]:
    names = [backbone.name for backbone in report.backbones]
    return table_rows(report.categories, names, report.scores)


def test_page_shows_the_schema_of_the_model():
    assert Report.model_json_schema() == SCHEMA


def test_page_shows_a_valid_report():
    report = report_with()
    assert json.loads(readable_json(report.model_dump(mode="json"))) == EXAMPLE


def test_rows_of_the_page_follow_from_its_scores():
    means = [(r.category, r.backbone, r.metric, r.mean, r.sd) for r in rows_of(report_with())]
    shown = [(r.category, r.backbone, r.metric, r.mean, r.sd) for r in report_with().table]
    assert means == shown


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"format_version": 1}, "format_version is 1, this version reads 2 only"),
        ({"format": "other"}, "format is 'other'"),
        ({"scored": []}, "unknown key 'scored'; did you mean 'scores'"),
        ({"scores": EXAMPLE["scores"][:1]}, "one entry per category and backbone"),
        ({"data": 3}, "key 'data'.*found 3"),
        ({"bootstrap": EXAMPLE["bootstrap"] | {"draws": 10**12}}, "key 'bootstrap.draws'"),
        *(
            (stored(file=name), "scores.0.maps.file")
            for name in ("cells/..", "cells/a\0b.png", "x")
        ),
        (stored(bytes=10**30), "scores.0.maps.bytes"),
        (scored(statistics=EXAMPLE["scores"][0]["statistics"] * 2), "must hold . seeds"),
        (scored(images=EXAMPLE["scores"][0]["images"][:1]), "must hold all of its images"),
        (scored(shown=[99]), "must be among its images"),
    ],
)
def test_report_that_is_wrong_is_refused(change, pattern):
    with pytest.raises(EvaluatorError, match=pattern):
        report_with(**change)


def test_group_means_average_categories_before_seeds():
    rows = {(r.group, r.category, r.metric): r for r in rows_of(two_categories())}
    # Per seed (0.9 + 0.6) / 2 = 0.75 and (0.8 + 0.7) / 2 = 0.75: no spread is left.
    mean = rows["all", "mean", "pixel_auroc"]
    assert (mean.mean, mean.sd, mean.n_seeds) == (75.0, 0.0, 2)
    own = rows["own", "bolt", "image_auroc"]
    assert (own.mean, own.sd) == (60.0, 14.1421)  # 20 / sqrt 2
    assert {key[0] for key in rows} == {"other", "own", "all"}


def test_csv_leaves_the_sd_of_one_seed_empty():
    row = TableRow(
        group="own", category="bolt", backbone="a, b", metric="pixel_auroc", mean=97.5, n_seeds=1
    )
    assert csv_text([row]) == (
        "group,category,backbone,metric,mean,sd,low,high,n_seeds\n"
        'own,bolt,"a, b",pixel_auroc,97.5000,,,,1\n'
    )


def test_paper_table_is_the_printed_one():
    table = paper_table()
    assert len(table.values) == 15
    assert table.columns[0] == "ImageNet"
    assert table.values["tile"] == (84.9, 72.3, 76.8, 80.5, 90.6, 91.0)
    assert [name for name, group in table.group.items() if group == "low"] == [
        "metal_nut",
        "pill",
        "tile",
        "wood",
    ]
    assert (group_of("wood"), group_of("zipper"), group_of("bolt")) == ("low", "other", "own")


def test_markdown_puts_the_paper_beside_matching_categories():
    report = two_categories()
    text = markdown(report.model_copy(update={"table": rows_of(report)}))
    pixel, image = text.split("**AUPRO")
    lines = [[cell.strip() for cell in line.split("|")] for line in pixel.splitlines()]
    bottle = next(line for line in lines if line[1:2] == ["bottle"])
    assert bottle[2:] == ["85.0 ± 7.1", "98.1", "90.4", "95.1", "94.4", "97.1", "96.6", ""]
    bolt = next(line for line in lines if line[1:2] == ["bolt"])
    assert bolt[2:4] == ["65.0 ± 7.1", "–"]
    assert "mean of 2: all" in pixel
    assert "paper" not in image


def test_markdown_marks_what_is_not_told_apart_from_the_best():
    report = report_with()
    names = [backbone.name for backbone in report.backbones]
    assert len(names) == 2
    for distinct, marks in ((True, 0), (False, 1)):
        pairs = [pair.model_copy(update={"distinct": distinct}) for pair in report.comparisons]
        table = markdown(report.model_copy(update={"comparisons": pairs})).split("\n\n")[1]
        lines = [
            line for line in table.splitlines() if EXAMPLE["categories"][0]["category"] in line
        ]
        assert lines[0].count("≈") == marks


def test_markdown_puts_published_numbers_into_a_table_below():
    report = two_categories()
    entry = {"source": "somewhere", "arch": "resnet18", "category": "bottle", "value": 98.25}
    published = [Published(**entry, metric="pixel_auroc"), Published(**entry, metric="aupro_30")]
    text = markdown(report.model_copy(update={"table": rows_of(report), "published": published}))
    parts = text.split("\n\n")
    assert [part for part in parts if part.startswith("**")] == [
        "**Pixel AUROC, % (mean ± sd of 2 seeds)**",
        "**Pixel AUROC, % (printed elsewhere, not measured here)**",
        "**AUPRO up to 30 % false positives, % (mean ± sd of 2 seeds)**",
        "**AUPRO up to 30 % false positives, % (printed elsewhere, not measured here)**",
        "**Image AUROC, % (mean ± sd of 2 seeds)**",
    ]
    assert parts[3] == (
        "| category | somewhere, resnet18 |\n"
        "| -------- | ------------------: |\n"
        "| bottle   |                98.2 |"
    )
    assert "somewhere" not in parts[1]


def test_markdown_tells_what_limits_the_comparisons():
    report = report_with()
    few = report.bootstrap.model_copy(update={"draws": 10})
    text = markdown(report.model_copy(update={"bootstrap": few}))
    assert "\n10 draws cannot tell anything apart among " in text
    record = report.categories[0]
    images = {"test_good": 9, "test_defective": 10}
    categories = [record.model_copy(update={"category": f"part{i}", **images}) for i in range(7)]
    assert notes(report.model_copy(update={"categories": categories})) == [
        "Fewer than 10 test images of a kind: part0 (9 good, 10 defective), "
        "part1 (9 good, 10 defective), part2 (9 good, 10 defective), "
        "part3 (9 good, 10 defective), part4 (9 good, 10 defective) and 2 more. "
        "There the p-values allow for it, but the intervals are too narrow."
    ]
    assert notes(report.model_copy(update={"comparisons": []})) == []
