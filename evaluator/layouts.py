"""How inspection sets lie in folders: one lister for each layout, which reads no image.

mvtec    CATEGORY/train/good/*, test/good/*, test/<defect>/*, ground_truth/<defect>/<stem>_mask.png
btad     CATEGORY/train/ok/*, test/ok/*, test/ko/*, ground_truth/ko/<stem>.png or .bmp
visa     CATEGORY/Data/Images/{Normal,Anomaly}/*, Data/Masks/Anomaly/<stem>.png,
         and split_csv/1cls.csv beside the categories
loco     CATEGORY/train/good/*, test/{good,logical_anomalies,structural_anomalies}/*,
         ground_truth/<defect>/<stem>/000.png, 001.png, ...
folders  CATEGORY/good/*, defective/*, where wished masks/<stem>.png or <stem>_mask.png, and
         train/*: without it, a fixed fifth of good/ is for the test, the others to fit on
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from evaluator.errors import EvaluatorError
from evaluator.images import SUFFIXES
from evaluator.report import Finding

LAYOUTS = ("mvtec", "btad", "visa", "loco", "folders")
VISA_SPLIT = Path("split_csv") / "1cls.csv"
LOCO_DEFECTS = ("logical_anomalies", "structural_anomalies")
TEST_SHARE = 5  # `folders`: one good photograph in so many is for the test
MAX_CSV_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TestImage:
    """A photograph to score; `defect` is `good` on a good one, which has no masks."""

    __test__ = False  # not a pytest class

    path: Path
    defect: str
    masks: tuple[Path, ...] = ()

    @property
    def defective(self) -> bool:
        """Whether it shows a defect."""
        return self.defect != "good"


@dataclass
class Listing:
    """The files of one category, before any is read."""

    name: str
    root: Path
    train: list[Path] = field(default_factory=list)
    test: list[TestImage] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def note(self, kind: str, path: Path, message: str, fatal: bool) -> None:
        """Add a finding; `path` lies below the category's root, or beside it."""
        self.findings.append(
            Finding.model_validate(
                {
                    "category": self.name,
                    "kind": kind,
                    "file": file_name(path, self.root),
                    "message": message.encode(errors="backslashreplace").decode(),
                    "fatal": fatal,
                }
            )
        )


def file_name(path: Path, root: Path) -> str:
    """How findings name a file: from the category's root, printable even if it is not UTF-8."""
    file = path.relative_to(root) if path.is_relative_to(root) else path
    return file.as_posix().encode(errors="backslashreplace").decode()


def layouts_of(folder: Path, root: Path) -> list[str]:
    """The layouts that a category's folder looks like: one, where it is clear."""

    def has(*names: str) -> bool:
        return any((folder / name).is_dir() for name in names)

    found = []
    if has("train/ok", "test/ok", "test/ko"):
        found.append("btad")
    if has("Data/Images") and (root / VISA_SPLIT).is_file():
        found.append("visa")
    if has(*(f"test/{defect}" for defect in LOCO_DEFECTS)):
        found.append("loco")
    elif has("train/good", "test/good") and not (has("good") and not has("test")):
        found.append("mvtec")
    if has("good") and has("defective"):
        found.append("folders")
    # A category that lacks half of its folders is told what is missing.
    return found or (["mvtec"] if has("train", "test") else [])


def list_category(folder: Path, root: Path, layout: str) -> Listing:
    """List one category; EvaluatorError where the layout's own files cannot be read."""
    listing = Listing(folder.name or folder.resolve().name, folder)
    _LISTERS[layout](listing, root)
    if layout != "visa":  # whose table names every file
        _note_other_files(listing)
    return listing


def _note_other_files(listing: Listing) -> None:
    """What lies among the photographs and is not looked at, but for hidden files."""
    photographs = [*listing.train, *(image.path for image in listing.test)]
    for folder in dict.fromkeys(path.parent for path in photographs):
        others = sorted(path.name for path in folder.iterdir() if _is_other_file(path))
        if others:
            listing.note(
                "count",
                folder,
                f"{len(others)} files are no {', '.join(SUFFIXES)} and are left out: "
                f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}",
                fatal=False,
            )


def _is_other_file(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini")
    return path.suffix.lower() not in SUFFIXES and not hidden and path.is_file()


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder` that are not hidden, by name."""
    found = (path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else iter(())
    return sorted(path for path in found if not path.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """The image files in `folder`, by name; hidden ones are not."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted(
        path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def _mvtec(listing: Listing, root: Path) -> None:
    _split(listing, good="good")


def _btad(listing: Listing, root: Path) -> None:
    _split(listing, good="ok")


def _split(listing: Listing, good: str) -> None:
    """train/<good>, test/<good>, test/<defect> with ground_truth/<defect>."""
    folder = listing.root
    listing.train += images_in(folder / "train" / good)
    truth = folder / "ground_truth"
    # Both sides, so that a lost folder of images shows by the masks it left behind.
    kinds = {path.name for path in [*subfolders(folder / "test"), *subfolders(truth)]}
    for kind in sorted(kinds):
        images = images_in(folder / "test" / kind)
        if kind == good:
            listing.test += [TestImage(path, "good") for path in images]
            if masks := images_in(truth / kind):
                text = f"{len(masks)} masks of good photographs, which are not read"
                listing.note("mask_without_image", truth / kind, text, fatal=False)
        else:
            _with_masks(listing, kind, images, truth / kind, folder / "test" / kind)


def _with_masks(
    listing: Listing, defect: str, images: Iterable[Path], masks: Path, beside: Path
) -> None:
    """Add defective images with the masks of their stems, `<stem>_mask.*` or `<stem>.*`."""
    by_stem: dict[str, list[Path]] = {}
    for mask in images_in(masks):
        by_stem.setdefault(mask.stem.removesuffix("_mask"), []).append(mask)
    taken: dict[str, Path] = {}
    for path in images:
        found = by_stem.get(path.stem, [])
        if found and path.stem in taken:
            listing.note(
                "mask_missing",
                path,
                f"has the same mask {found[0].name} as {taken[path.stem].name}; rename one of the "
                "images, and give it a mask of its own",
                fatal=True,
            )
        if len(found) > 1:
            listing.note(
                "mask_without_image",
                found[1],
                f"a second mask of {path.name} beside {found[0].name}; remove one",
                fatal=True,
            )
        taken[path.stem] = path
        listing.test.append(TestImage(path, defect, tuple(found[:1])))
    for stem, surplus in by_stem.items():
        if stem not in taken:
            listing.note(
                "mask_without_image",
                surplus[0],
                f"mask without image; expected {(beside / stem).relative_to(listing.root)}.*",
                fatal=True,
            )


def _loco(listing: Listing, root: Path) -> None:
    folder = listing.root
    listing.train += images_in(folder / "train" / "good")
    listing.test += [TestImage(path, "good") for path in images_in(folder / "test" / "good")]
    truth = folder / "ground_truth"
    kinds = {path.name for path in [*subfolders(folder / "test"), *subfolders(truth)]}
    for kind in sorted(kinds - {"good"}):
        images = images_in(folder / "test" / kind)
        stems = {path.stem for path in images}
        for path in images:
            masks = images_in(truth / kind / path.stem)
            listing.test.append(TestImage(path, kind, tuple(masks)))
        for surplus in subfolders(truth / kind):
            if surplus.name not in stems:
                listing.note(
                    "mask_without_image",
                    surplus,
                    f"masks without image; expected test/{kind}/{surplus.name}.png",
                    fatal=True,
                )


def _visa(listing: Listing, root: Path) -> None:
    """The rows of split_csv/1cls.csv: object, split, label, image, mask (paths from the root)."""
    name = listing.name
    for row in _visa_rows(root / VISA_SPLIT):
        if row["object"] != name:
            continue
        path = root / row["image"]
        if not row["image"] or not path.is_file():
            listing.note("unreadable", path, f"named by {VISA_SPLIT}, but not there", fatal=True)
            continue
        if row["split"] == "train" and row["label"] == "anomaly":
            listing.note(
                "count", path, f"{VISA_SPLIT} puts an anomaly into the training split", fatal=True
            )
        elif row["split"] == "train":
            listing.train.append(path)
        elif row["label"] == "normal":
            listing.test.append(TestImage(path, "good"))
        else:
            mask = root / row["mask"]
            masks = (mask,) if row["mask"] and mask.is_file() else ()
            listing.test.append(TestImage(path, "anomaly", masks))


def _visa_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of the split; EvaluatorError for other columns and paths that leave the root."""
    columns = ["object", "split", "label", "image", "mask"]
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise EvaluatorError(f"{path}: larger than {MAX_CSV_BYTES} bytes, refused")
        reader = csv.DictReader(path.read_text("utf-8-sig").splitlines())  # Excel's mark or none
        rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise EvaluatorError(f"{path}: not readable as CSV ({error})") from None
    if not rows:
        raise EvaluatorError(
            f"{path}: no rows; expected {','.join(columns)}, a line for each image"
        )
    lines: dict[str, int] = {}
    for number, row in enumerate(rows, 2):
        if list(row) != columns or None in row.values():
            raise EvaluatorError(
                f"{path}, line {number}: expected the columns {','.join(columns)} and nothing else"
            )
        for key in ("image", "mask"):
            parts = Path(row[key]).parts
            if parts and (parts[0] != row["object"] or ".." in parts):
                raise EvaluatorError(
                    f"{path}, line {number}: {row[key]!r} does not lie below {row['object']!r}"
                )
        known = {"split": ("train", "test"), "label": ("normal", "anomaly")}
        for key, values in known.items():
            if row[key] not in values:
                raise EvaluatorError(
                    f"{path}, line {number}: {key} is {row[key]!r}, expected {' or '.join(values)}"
                )
        if lines.setdefault(row["image"], number) != number:
            raise EvaluatorError(
                f"{path}, line {number}: {row['image']} stands in line {lines[row['image']]} too"
            )
        yield row


def _folders(listing: Listing, root: Path) -> None:
    """good/ and defective/; without train/, a fixed fifth of the good ones is for the test."""
    folder = listing.root
    good = images_in(folder / "good")
    if (folder / "train").is_dir():
        listing.train += [*images_in(folder / "train"), *images_in(folder / "train" / "good")]
        tested = set(good)
    else:
        ranked = sorted(good, key=_name_sha256)
        tested = set(ranked[: max(1, len(good) // TEST_SHARE)])
        listing.train += [path for path in good if path not in tested]
        listing.note(
            "count",
            folder / "good",
            f"{len(listing.train)} good photographs to fit on, {len(tested)} to score: a fixed "
            "fifth, chosen by the hash of the names",
            fatal=False,
        )
    listing.test += [TestImage(path, "good") for path in good if path in tested]
    defective = images_in(folder / "defective")
    _with_masks(listing, "defective", defective, folder / "masks", folder / "defective")


def _name_sha256(path: Path) -> bytes:
    return hashlib.sha256(path.name.encode(errors="backslashreplace")).digest()


_LISTERS: dict[str, Callable[[Listing, Path], None]] = {
    "mvtec": _mvtec,
    "btad": _btad,
    "visa": _visa,
    "loco": _loco,
    "folders": _folders,
}
