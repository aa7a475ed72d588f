"""Inspection sets: folder -> categories with every file read once, hashed, and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from evaluator.errors import EvaluatorError
from evaluator.images import image_size, read_file
from evaluator.layouts import (
    LAYOUTS,
    Listing,
    TestImage,
    file_name,
    layouts_of,
    list_category,
    subfolders,
)
from evaluator.report import Finding

__all__ = ["LAYOUTS", "Category", "TestImage", "find_categories"]

MIN_TRAIN_IMAGES = 2  # a covariance with ddof 1 needs two
READERS = 4
AT_ONCE = 16  # files in memory
EXPECTED = {
    "mvtec": "train/good and test/",
    "btad": "train/ok and test/ko",
    "visa": "Data/Images, and split_csv/1cls.csv beside the categories",
    "loco": "train/good and test/logical_anomalies or test/structural_anomalies",
    "folders": "good/ and defective/",
}


@dataclass(frozen=True)
class Category:
    """One product: its files in a fixed order, and the SHA-256 over their names and bytes.

    `root` is its folder; `has_masks`: every defective photograph has one (False: none has, so
    image metrics only); `image_sha256` holds the hash of every photograph's file.
    """

    name: str
    root: Path
    layout: str
    train: tuple[Path, ...]
    test: tuple[TestImage, ...]
    has_masks: bool
    sha256: str
    image_sha256: dict[Path, str]
    defects: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def good(self) -> int:
        """How many test photographs show no defect."""
        return sum(not image.defective for image in self.test)


def find_categories(root: Path, names: list[str] | None, layout: str = "auto") -> list[Category]:
    """The categories below `root`, all or the named ones, with every file read once.

    Raises EvaluatorError for a wrong folder and for a category that cannot be scored by its
    counts; what is wrong with single files stands in the categories' findings.
    """
    if not root.is_dir():
        raise EvaluatorError(f"{root}: no such folder; --data wants the folder of the categories")
    if layout in ("folders", "auto") and layouts_of(root, root) == ["folders"]:
        itself = list_category(root, root, "folders")
        if names not in (None, [itself.name]):
            raise EvaluatorError(
                f"{root}: is itself a category, and --categories can only be {itself.name}"
            )
        return [_read_category(root, _checked(itself), "folders")]
    if layouts_of(root, root.parent):
        raise EvaluatorError(
            f"{root}: is itself a category; give the folder above it and --categories {root.name}"
        )
    layouts = {path.name: layouts_of(path, root) for path in subfolders(root)}
    present = [name for name, found in layouts.items() if found and layout in ("auto", *found)]
    if not present:
        raise EvaluatorError(
            f"{root}: no categories found; expected folders with {_wanted(layout)}"
        )
    for name in names or []:
        if name in layouts and name not in present:
            raise EvaluatorError(f"{root / name}: expected {_wanted(layout)}")
        if name not in present:
            raise EvaluatorError(
                f"{root}: no category {name!r}; --categories knows {', '.join(present)}"
            )
    listings = []
    for name in present if names is None else [name for name in present if name in names]:
        found = _only(root / name, layouts[name] if layout == "auto" else [layout])
        listings.append((_checked(list_category(root / name, root, found)), found))
    return [_read_category(root, listing, found) for listing, found in listings]


def _wanted(layout: str) -> str:
    """The folders of a category of this layout, of each layout for `auto`."""
    if layout != "auto":
        return f"{EXPECTED[layout]} (layout {layout})"
    return ", or ".join(f"{folders} ({name})" for name, folders in EXPECTED.items())


def _only(folder: Path, layouts: list[str]) -> str:
    """The layout of a category; EvaluatorError where it could be several or has no usable name."""
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise EvaluatorError(
            f"{file_name(folder, folder.parent)}: the category's name is not UTF-8; rename it"
        ) from None
    if len(layouts) > 1:
        found = " and ".join(f"{EXPECTED[name]} ({name})" for name in layouts)
        raise EvaluatorError(f"{folder}: has folders of {found}; say which with --layout")
    return layouts[0]


def _checked(listing: Listing) -> Listing:
    """The listing if its counts allow scoring; masks that are missing become findings."""
    folder = listing.root
    if len(listing.train) < MIN_TRAIN_IMAGES:
        raise EvaluatorError(
            f"{folder}: {len(listing.train)} normal photographs to fit on; PaDiM's covariance "
            f"needs at least {MIN_TRAIN_IMAGES}"
        )
    defective = [image for image in listing.test if image.defective]
    fatal = [finding for finding in listing.findings if finding.fatal]
    if not listing.test:
        raise EvaluatorError(f"{folder}: no test images; expected {_wanted('auto')}")
    if not fatal and (not defective or len(defective) == len(listing.test)):
        missing = "defective" if not defective else "good"
        raise EvaluatorError(
            f"{folder}: {len(listing.test)} test images, none of them {missing}; AUROC needs both "
            "kinds"
        )
    without = [image for image in defective if not image.masks]
    for image in without if len(without) < len(defective) else ():
        listing.note(
            "mask_missing",
            image.path,
            f"defective image without mask, though {len(defective) - len(without)} others of the "
            "category have theirs",
            fatal=True,
        )
    return listing


@dataclass(frozen=True)
class _File:
    """What one reading of a file gave."""

    sha256: str
    bytes: int
    size: tuple[int, int] | None
    fault: str


def _read_category(root: Path, listing: Listing, layout: str) -> Category:
    """Read every file once: hash, header and checksums; sizes of masks against their images."""
    photographs = [*listing.train, *(image.path for image in listing.test)]
    masks = [mask for image in listing.test for mask in image.masks]
    files = list(dict.fromkeys([*photographs, *masks]))
    found: dict[Path, _File] = {}
    progress = {"desc": f"checking {listing.name}", "unit": "img", "disable": None, "leave": False}
    with ThreadPoolExecutor(READERS) as pool, tqdm(total=len(files), **progress) as bar:
        for start in range(0, len(files), AT_ONCE):
            some = files[start : start + AT_ONCE]
            for path, (data, fault) in zip(some, pool.map(_read, some), strict=True):
                found[path] = _look(path, data, fault)
            bar.update(len(some))
    for path, file in found.items():
        if file.fault:
            listing.note("unreadable", path, file.fault, fatal=True)
    for image in listing.test:
        for mask in image.masks:
            _compare_sizes(listing, image.path, mask, lambda path: found[path].size)
    defects: dict[str, int] = {}
    for image in listing.test:
        if image.defective:
            defects[image.defect] = defects.get(image.defect, 0) + 1
    return Category(
        name=listing.name,
        root=listing.root,
        layout=layout,
        train=tuple(listing.train),
        test=tuple(listing.test),
        has_masks=bool(masks),
        sha256=_category_sha256(root, listing, found),
        image_sha256={path: found[path].sha256 for path in photographs},
        defects=defects,
        findings=tuple(listing.findings),
    )


def _category_sha256(root: Path, listing: Listing, found: Mapping[Path, _File]) -> str:
    """Over what each file is for, its name below `root`, its length and its hash, in order."""
    digest = hashlib.sha256()

    def add(role: str, path: Path) -> None:
        file = found[path]
        line = f"{role} {file_name(path, root)} {file.bytes} {file.sha256}\n"
        digest.update(line.encode(errors="backslashreplace"))

    for path in listing.train:
        add("train", path)
    for image in listing.test:
        add(image.defect, image.path)
        for mask in image.masks:
            add("mask", mask)
    return digest.hexdigest()


def _read(path: Path) -> tuple[bytes, str]:
    if path.exists() and not path.is_file():
        return b"", "is no file, though it has an image's suffix"  # a pipe would be read for ever
    try:
        return read_file(path), ""
    except EvaluatorError as error:
        return b"", error.message.removeprefix(f"{path}: ")


def _look(path: Path, data: bytes, fault: str) -> _File:
    """Hash and size; in the main thread, for `image_size` sets warning filters."""
    size = None
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        fault = "the name is not UTF-8; rename it"
    if not fault:
        try:
            size = image_size(path, data)
        except EvaluatorError as error:
            fault = error.message.removeprefix(f"{path}: ")
    return _File(hashlib.sha256(data).hexdigest(), len(data), size, fault)


def _compare_sizes(
    listing: Listing,
    image: Path,
    mask: Path,
    size_of: Callable[[Path], tuple[int, int] | None],
) -> None:
    size, mask_size = size_of(image), size_of(mask)
    if size is not None and mask_size is not None and size != mask_size:
        listing.note(
            "mask_size",
            mask,
            f"mask is {mask_size[0]} x {mask_size[1]} pixels, its image {image.name} "
            f"{size[0]} x {size[1]}; they must match",
            fatal=True,
        )
