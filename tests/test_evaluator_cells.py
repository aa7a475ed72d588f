"""Cells: which images the page of heat maps shows."""

from pathlib import Path

import numpy as np

from evaluator.cells import choose_examples
from evaluator.inspection import Category, TestImage


def category_of(areas: dict[str, list[int]]) -> tuple[Category, np.ndarray]:
    """A category with one test image for each area (pixels) of each kind of defect."""
    listed = [(kind, area) for kind in areas for area in areas[kind]]
    masks = np.zeros((len(listed), 10, 10), bool)
    for mask, (_, area) in zip(masks, listed, strict=True):
        mask.flat[:area] = True
    test = tuple(TestImage(Path("x.png"), kind, Path("x_mask.png")) for kind, _ in listed)
    defects = {kind: len(of_kind) for kind, of_kind in areas.items()}
    return Category("bolt", (), test, defects=defects), masks


def test_four_kinds_of_defect_are_all_shown_by_their_middle_one():
    areas = {"bent": [9, 1, 5], "cut": [7], "dent": [30, 20], "hole": [2, 4, 3]}
    assert choose_examples(*category_of(areas)) == [2, 3, 4, 8]


def test_few_kinds_of_defect_are_shown_in_turn():
    assert choose_examples(*category_of({"bent": [9, 1, 5], "cut": [7]})) == [2, 3, 1, 0]
    assert choose_examples(*category_of({"cut": [7]})) == [0]
