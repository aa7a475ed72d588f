"""Inspection sets: folder -> categories with every file read once, hashed, and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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
    layout_of,
    list_category,
    subfolders,
)
from evaluator.report import Finding

__all__ = ["LAYOUTS", "Category", "TestImage", "find_categories"]

MIN_TRAIN_IMAGES = 2  # a covariance with ddof 1 needs two
READERS = 4
AT_ONCE = 16  # files in memory
EXPECTED = (
    "train/good and test/ (MVTec AD, MVTec LOCO), train/ok and test/ko (BTAD), Data/Images beside "
    "split_csv/1cls.csv (VisA), or good/ and defective/"
)


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
    if layout in ("folders", "auto") and layout_of(root, root) == "folders":
        return [_read_category(root, _checked(list_category(root, root, "folders")), "folders")]
    if (root / "train").is_dir() and (root / "test").is_dir():
        raise EvaluatorError(
            f"{root}: is itself a category; give the folder above it and --categories {root.name}"
        )
    layouts = {path.name: layout_of(path, root) for path in subfolders(root)}
    present = [name for name, found in layouts.items() if found is not None]
    if not present:
        raise EvaluatorError(f"{root}: no categories found; expected folders with {EXPECTED}")
    for name in names or []:
        if name not in present:
            raise EvaluatorError(
                f"{root}: no category {name!r}; --categories knows {', '.join(present)}"
            )
    chosen = [name for name in present if names is None or name in names]
    listings = []
    for name in chosen:
        found = layouts[name] if layout == "auto" else layout
        assert found is not None
        listings.append((_checked(list_category(root / name, root, found)), found))
    return [_read_category(root, listing, found) for listing, found in listings]


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
        raise EvaluatorError(f"{folder}: no test images; expected {EXPECTED}")
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
    digest = hashlib.sha256()
    for path in files:
        relative = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        digest.update(f"{relative} {found[path].bytes}\n".encode(errors="backslashreplace"))
        digest.update(bytes.fromhex(found[path].sha256))
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
        sha256=digest.hexdigest(),
        image_sha256={path: found[path].sha256 for path in photographs},
        defects=defects,
        findings=tuple(listing.findings),
    )


def _read(path: Path) -> tuple[bytes, str]:
    try:
        return read_file(path), ""
    except EvaluatorError as error:
        return b"", error.message


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
