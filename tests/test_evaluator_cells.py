"""Cells: which maps are kept, and which images figure 6 and the page show."""

from pathlib import Path

from evaluator.cells import choose_shown
from evaluator.datasets import Category, TestImage
from evaluator.gallery import examples
from tests.reports_by_hand import make_report


def category_of(good: int, defective: int) -> Category:
    """A category with so many test images, good ones first."""
    test = [TestImage(Path("x.png"), "good") for _ in range(good)]
    test += [TestImage(Path("x.png"), "cut", (Path("x_mask.png"),)) for _ in range(defective)]
    return Category(
        name="bolt",
        root=Path("bolt"),
        layout="mvtec",
        train=(),
        test=tuple(test),
        has_masks=True,
        sha256="0" * 64,
        image_sha256={},
        defects={"cut": defective},
        findings=(),
    )


def record_of(areas: dict[str, list[int]]):
    """A category's record with one test image for each area (pixels) of each kind of defect."""
    record = make_report(categories=1, backbones=1).categories[0]
    image = record.images[-1]
    images = [
        image.model_copy(update={"defect": kind, "regions": [area]})
        for kind in areas
        for area in areas[kind]
    ]
    defects = {kind: len(of_kind) for kind, of_kind in areas.items()}
    return record.model_copy(update={"images": images, "defects": defects})


def test_all_defective_images_and_some_good_ones_are_kept():
    assert choose_shown(category_of(3, 2), 224) == [0, 1, 2, 3, 4]
    kept = choose_shown(category_of(100, 400), 224)
    assert len(kept) == 150
    assert len([index for index in kept if index < 100]) == 8


def test_large_maps_are_kept_of_fewer_images():
    assert len(choose_shown(category_of(100, 400), 4096)) == 3


def test_four_kinds_of_defect_are_all_shown_by_their_middle_one():
    areas = {"bent": [9, 1, 5], "cut": [7], "dent": [30, 20], "hole": [2, 4, 3]}
    assert examples(record_of(areas), range(9)) == [2, 3, 4, 8]


def test_few_kinds_of_defect_are_shown_in_turn():
    assert examples(record_of({"bent": [9, 1, 5], "cut": [7]}), range(4)) == [2, 3, 1, 0]
    assert examples(record_of({"cut": [7]}), range(1)) == [0]
