"""Published numbers: complete tables whose means are the ones that their authors print."""

import pytest

from evaluator.published import published

MVTEC_AD = [
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
]


@pytest.mark.parametrize(
    ("source", "arch", "metric", "mean"),
    [
        ("PaDiM paper", "wide_resnet50_2", "pixel_auroc", 97.5),
        ("PaDiM paper", "wide_resnet50_2", "aupro_30", 92.1),
        ("xiahaifeng1995/PaDiM", "resnet18", "pixel_auroc", 96.5),
        ("xiahaifeng1995/PaDiM", "resnet18", "image_auroc", 90.5),
        ("xiahaifeng1995/PaDiM", "wide_resnet50_2", "pixel_auroc", 97.3),
        ("xiahaifeng1995/PaDiM", "wide_resnet50_2", "image_auroc", 95.5),
        ("anomalib README", "resnet18", "pixel_auroc", 96.8),
        ("anomalib README", "resnet18", "image_auroc", 89.1),
        ("anomalib README", "wide_resnet50_2", "pixel_auroc", 97.9),
        ("anomalib README", "wide_resnet50_2", "image_auroc", 95.0),
    ],
)
def test_mean_over_the_categories_is_the_printed_one(source, arch, metric, mean):
    rows = [
        row for row in published(MVTEC_AD, [arch]) if (row.source, row.metric) == (source, metric)
    ]
    assert sorted(row.category for row in rows) == MVTEC_AD
    assert sum(row.value for row in rows) / len(rows) == pytest.approx(mean, abs=0.051)


def test_single_numbers_are_the_printed_ones():
    rows = {(row.source, row.metric): row.value for row in published(["cable"], ["resnet18"])}
    assert rows["xiahaifeng1995/PaDiM", "pixel_auroc"] == 94.9
    assert rows["anomalib README", "pixel_auroc"] == 96.5
    assert rows["anomalib README", "image_auroc"] == 84.4


def test_only_the_categories_and_networks_asked_for():
    rows = published(["bottle", "bolt"], ["wide_resnet50_2", "mobilenet_v2"])
    assert {(row.category, row.arch) for row in rows} == {("bottle", "wide_resnet50_2")}
    assert published(["bolt"], ["resnet18"]) == []
    assert published(["bottle"], ["mobilenet_v2"]) == []


def test_no_number_stands_there_twice():
    rows = published(MVTEC_AD, ["resnet18", "wide_resnet50_2"])
    keys = {(row.source, row.arch, row.category, row.metric) for row in rows}
    assert len(keys) == len(rows)
