"""Looks at every pixel of an inspection set before it is scored, and says what would distort it.

What can be told from names and headers alone is found while listing (datasets.py, layouts.py).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.resources
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from evaluator.datasets import Category, TestImage
from evaluator.errors import EvaluatorError
from evaluator.images import centre_crop, load_pixels, mask_values, resize_mask
from evaluator.layouts import file_name
from evaluator.protocols import Protocol
from evaluator.report import Finding

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
MAX_THREADS = 16  # Pillow decodes without the interpreter lock
AT_ONCE = 4  # tasks queued for each thread, so that ctrl-C waits for a few only
# Grey values are codes there: of the saturation threshold (LOCO), of the kind of defect (VisA).
CODED = ("loco", "visa")
DATASETS = {  # and how they are spread; VisA's own script rewrites it like MVTec AD
    "MVTec AD": ("mvtec",),
    "BTAD": ("btad",),
    "VisA": ("visa", "mvtec"),
    "MVTec LOCO AD": ("loco",),
}
SHOWN = 3
SHOWN_FATAL = 20  # each of these must be mended


def audit(categories: Sequence[Category], protocol: Protocol) -> list[Finding]:
    """Everything found in the categories, those of the listing first.

    Decodes each photograph and mask once, a few at a time. What a defect loses depends on the
    protocol's resize and crop; the worst cases come first.
    """
    found: list[Finding] = []
    total = sum(len(_distinct(c)) + len(_masked(c)) for c in categories)
    progress = {"desc": "auditing", "unit": "img", "disable": None, "leave": False}
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    step = threads * AT_ONCE
    with ThreadPoolExecutor(threads) as pool, tqdm(total=total, **progress) as bar:

        def each(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
            for start in range(0, len(items), step):
                some = items[start : start + step]
                yield from pool.map(function, some)
                bar.update(len(some))

        for category in categories:
            found += category.findings
            looks = each(functools.partial(_look_at_masks, category, protocol), _masked(category))
            lost = [pair for pairs in looks for pair in pairs]
            found += [finding for _, finding in sorted(lost, key=lambda pair: -pair[0])]
            distinct = _distinct(category)
            decoded = zip(distinct, each(_pixels, list(distinct.values())), strict=True)
            found += _duplicates(category, dict(decoded))
            found += _counts(category)
    return found


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings for a terminal: the first few of each category and kind, and how many more."""
    lines = []
    categories = list(dict.fromkeys(finding.category for finding in findings))
    ranked = sorted(findings, key=lambda f: (categories.index(f.category), not f.fatal, f.kind))
    for category, of_category in groupby(ranked, key=lambda finding: finding.category):
        lines.append(category)
        for (fatal, kind), group in groupby(of_category, key=lambda f: (f.fatal, f.kind)):
            members = list(group)
            shown = SHOWN_FATAL if fatal else SHOWN
            prevents = ", prevents scoring" if fatal else ""
            lines.append(f"  {kind.replace('_', ' ')} ({len(members)}{prevents})")
            lines += [f"    {finding.file}: {finding.message}" for finding in members[:shown]]
            if len(members) > shown:
                lines.append(f"    ... and {len(members) - shown} more")
    return "\n".join(lines)


def _finding(
    category: Category, kind: str, path: Path, message: str, *, fatal: bool = False
) -> Finding:
    entry: dict[str, Any] = {"category": category.name, "kind": kind, "message": message}
    return Finding(**entry, file=file_name(path, category.root), fatal=fatal)


def _unreadable(category: Category) -> set[str]:
    """The names of the files that the listing could not read: said once is enough."""
    return {finding.file for finding in category.findings if finding.kind == "unreadable"}


def _masked(category: Category) -> list[TestImage]:
    """The defective images whose masks can be read."""
    skip = _unreadable(category)
    return [
        image
        for image in category.test
        if image.masks and not any(file_name(mask, category.root) in skip for mask in image.masks)
    ]


def _look_at_masks(
    category: Category, protocol: Protocol, image: TestImage
) -> list[tuple[float, Finding]]:
    """What is wrong with the ground truth of one image, each with a weight to sort by."""
    found = []
    marked = 0
    resized = np.zeros((protocol.resize_px, protocol.resize_px), np.bool_)
    for mask in image.masks:
        try:
            values = mask_values(mask).max(axis=-1)
        except EvaluatorError as error:
            message = error.message.removeprefix(f"{mask}: ")
            return [(1.0, _finding(category, "unreadable", mask, message, fatal=True))]
        marked += int(np.count_nonzero(values))
        resized |= resize_mask(values > 0, protocol)
        message = "" if category.layout in CODED else _grey_levels(values)
        if message:
            found.append((1.0, _finding(category, "mask_grey_levels", mask, message)))
    lost = _lost(marked, resized, protocol)
    if lost is not None:
        weight, kind, message = lost
        found.append((weight, _finding(category, kind, image.path, message)))
    return found


def _grey_levels(values: npt.NDArray[np.uint8]) -> str:
    """What is unclear in a mask [height, width] that should hold 0 and one other value."""
    counts = np.bincount(values.ravel(), minlength=256)
    levels = np.flatnonzero(counts)
    if counts[0] == 0:
        return f"no pixel is 0 (the lowest is {levels[0]}), so the whole photograph is defective"
    if len(levels) <= 2:
        return ""
    half = int(levels[-1]) // 2 + 1
    share = counts[1:half].sum() / counts[1:].sum()
    return (
        f"{len(levels)} grey levels; all above 0 count as defective, {100 * share:.1f} % of them "
        f"below {half}"
    )


def _lost(
    marked: int, resized: npt.NDArray[np.bool_], protocol: Protocol
) -> tuple[float, str, str] | None:
    """How much of a defect of `marked` pixels the protocol loses: weight, kind, message."""
    if marked == 0:
        message = "the mask has no pixel above 0, so no defect can be found here"
        return 1.0, "mask_empty", message
    pixels = int(resized.sum())
    side = protocol.resize_px
    if pixels == 0:
        message = f"the defect ({marked} px) vanishes when the mask is resized to {side} x {side}"
        return 1.0, "defect_lost", message
    outside = pixels - int(centre_crop(resized, protocol.crop_px).sum())
    if outside == 0:
        return None
    crop = f"the centre crop of {protocol.crop_px} of {side} px"
    if outside == pixels:
        message = f"the defect ({pixels} px) lies outside {crop}; the image counts as defective"
        return 1.0, "defect_lost", message
    share = outside / pixels
    message = f"{100 * share:.1f} % of the defect ({outside} of {pixels} px) lies outside {crop}"
    return share, "defect_cropped", message


@dataclass(frozen=True)
class _Photograph:
    path: Path
    tested: bool
    defective: bool
    sha256: str


def _photographs(category: Category) -> list[_Photograph]:
    """All that the listing could read, the training set first."""
    skip = _unreadable(category)
    labelled = [(path, False, False) for path in category.train]
    labelled += [(image.path, True, image.defective) for image in category.test]
    return [
        _Photograph(path, tested, defective, category.image_sha256[path])
        for path, tested, defective in labelled
        if file_name(path, category.root) not in skip
    ]


def _distinct(category: Category) -> dict[str, Path]:
    """The first photograph with each hash of the file: copies are not decoded again."""
    return {photograph.sha256: photograph.path for photograph in _photographs(category)[::-1]}


def _duplicates(category: Category, decoded: Mapping[str, tuple[str, str]]) -> list[Finding]:
    """Photographs with the same pixels, and those that cannot be decoded.

    `decoded`: what `_pixels` found, by the hash of the file.
    """
    found = []
    first: dict[str, _Photograph] = {}
    for photograph in _photographs(category):
        pixels, fault = decoded[photograph.sha256]
        if fault:
            found.append(_finding(category, "unreadable", photograph.path, fault, fatal=True))
            continue
        earlier = first.setdefault(pixels, photograph)
        if earlier is not photograph:
            message = _same(photograph, earlier, file_name(earlier.path, category.root))
            found.append(_finding(category, "duplicate", photograph.path, message))
    return found


def _pixels(path: Path) -> tuple[str, str]:
    """A hash of the decoded pixels and their shape, or why there are none."""
    try:
        pixels = load_pixels(path)
    except EvaluatorError as error:
        return "", error.message.removeprefix(f"{path}: ")
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest(), ""


def _same(photograph: _Photograph, earlier: _Photograph, name: str) -> str:
    same = f"same file as {name}"
    if photograph.sha256 != earlier.sha256:
        same = f"same pixels as {name} in another file"
    if not photograph.tested:
        return f"{same}; it weighs twice in the fit"
    if not earlier.tested:
        return f"{same}, which the model is fitted on: no score of an unseen part"
    if photograph.defective != earlier.defective:
        return f"{same}; one is labelled good, the other defective"
    return f"{same}; it counts twice in the test"


@functools.cache
def _published_counts() -> dict[tuple[str, str], tuple[str, tuple[int, int, int]]]:
    """(layout, category) -> dataset and its training, good and defective test photographs."""
    text = (importlib.resources.files("data_manifests") / "inspection_counts.csv").read_text(
        "utf-8"
    )
    counts = ("train", "test_good", "test_defective")
    return {
        (layout, row["category"]): (
            row["dataset"],
            (int(row[counts[0]]), int(row[counts[1]]), int(row[counts[2]])),
        )
        for row in csv.DictReader(io.StringIO(text))
        for layout in DATASETS[row["dataset"]]
    }


def _counts(category: Category) -> list[Finding]:
    """Where a category of a known dataset has more or fewer photographs than published."""
    known = _published_counts().get((category.layout, category.name))
    if known is None:
        return []
    dataset, expected = known
    here = (len(category.train), category.good, len(category.test) - category.good)
    names = (
        "photographs to fit on",
        "good photographs to score",
        "defective photographs to score",
    )
    folders = ("train", "test", "test") if category.layout != "visa" else ("Data",) * 3
    return [
        _finding(
            category,
            "count",
            category.root / folder,
            f"{count} {name}; {dataset}'s {category.name} has {published}",
        )
        for folder, name, count, published in zip(folders, names, here, expected, strict=True)
        if count != published
    ]
