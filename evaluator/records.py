"""What report.json says of a category."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluator.cells import ground_truth
from evaluator.compare import MEAN
from evaluator.datasets import Category
from evaluator.errors import EvaluatorError
from evaluator.protocols import Protocol
from evaluator.report import CategoryRecord, Finding, TestImageRecord
from evaluator.table import group_of


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
