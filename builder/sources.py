"""From a folder or a manifest to the list of normal photographs, each with its provenance."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from builder.artifacts import Model, read_toml
from builder.errors import BuilderError
from builder.index import CategoryCount, SourceReport

IMAGE_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"}
TEST_FOLDERS = {"test", "ground_truth"}  # in a folder taken whole they mean an inspection set


def _inside(folder: str) -> str:
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ValueError("a folder must lie below --root")
    return folder


# Below --root, nowhere else.
Folder = Annotated[str, AfterValidator(_inside)]


class NormalImages(Model):
    """Where a dataset keeps the normal images of one category, and how many there should be.

    `skip_labelled` leaves out an image beside which that file lies (`{stem}` stands for the
    image's name without suffix): DAGM mixes normal and defective images in one folder.
    """

    category: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    folders: list[Folder] = Field(min_length=1)
    expected: int | None = Field(default=None, ge=1)
    skip_labelled: str | None = None


class Manifest(Model):
    """A public dataset: what it is, who may use it, where to get it, where its normals lie."""

    format: Literal["semiformula-manifest"]
    format_version: Literal[1]
    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    get: str
    normals: list[NormalImages] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_category_once(self) -> Self:
        names = [entry.category for entry in self.normals]
        if len(set(names)) != len(names):
            raise ValueError("a category stands twice; list its folders in one [[normals]]")
        return self


@dataclass(frozen=True)
class Photograph:
    """A normal photograph: its file, its path as provenance states it, its category."""

    path: Path
    name: str
    category: str


@dataclass(frozen=True)
class Source:
    """The photographs found, and the report that the dataset will carry."""

    photographs: list[Photograph]
    report: SourceReport


def shipped_manifests() -> list[str]:
    """The names of the manifests in `data_manifests`."""
    return sorted(
        Path(file.name).stem
        for file in resources.files("data_manifests").iterdir()
        if file.name.endswith(".toml")
    )


def find_source(normals: str, root: Path | None, licence: str | None) -> Source:
    """The photographs of a folder, or of a manifest (by name or path) whose data lie in `root`.

    Faults (missing or surplus files against the manifest) stand in the report; whether they stop
    the build is the caller's decision. Raises BuilderError when there is nothing to build from.
    """
    path = Path(normals)
    shipped = normals in shipped_manifests()
    if shipped or (path.is_file() and path.suffix == ".toml"):
        if shipped:
            path = Path(str(resources.files("data_manifests").joinpath(f"{normals}.toml")))
        if licence is not None:
            raise BuilderError(f"--licence: manifest {normals} states the licence; leave it out")
        return _from_manifest(read_toml(Manifest, path), root)
    if root is not None:
        raise BuilderError(f"--root {root}: only for a manifest; --normals {normals} is none")
    if not normals or not path.is_dir():
        raise BuilderError(
            f"--normals {normals}: neither a folder nor a manifest "
            f"({', '.join(shipped_manifests())} or a .toml file)"
        )
    return _from_folder(path, licence)


def _from_folder(folder: Path, licence: str | None) -> Source:
    files = sorted(_files_below(folder))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise BuilderError(
            f"--normals {folder}: no images found ({', '.join(sorted(IMAGE_SUFFIXES))}) "
            f"among {len(files)} files; give a folder of normal photographs"
        )
    for path in images:
        test = TEST_FOLDERS.intersection(path.relative_to(folder).parts[:-1])
        if test:
            raise BuilderError(
                f"--normals {folder}: holds {path.relative_to(folder)}, which looks like an "
                f"inspection set's {test.pop()!r} part; pre-training must not see it: name the "
                "folder of normal photographs, or use a manifest"
            )
    photographs = [
        Photograph(path, path.relative_to(folder).as_posix(), _category(path, folder))
        for path in images
    ]
    _refuse_unwritable_names(photographs)
    found = Counter(photograph.category for photograph in photographs)
    categories = [CategoryCount(category=c, found=n, kept=n) for c, n in sorted(found.items())]
    report = SourceReport(
        name=folder.resolve().name,
        licence=licence or "unknown",
        other_files=len(files) - len(images),
        categories=categories,
    )
    return Source(photographs, report)


def _refuse_unwritable_names(photographs: list[Photograph]) -> None:
    for photograph in photographs:
        try:
            photograph.name.encode()
        except UnicodeEncodeError:
            name = os.fsencode(photograph.name)
            raise BuilderError(f"{name!r}: a file name that is not UTF-8; rename it") from None


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file, also behind links to folders; BuilderError for a link that leads in a circle."""
    for top, folders, files in os.walk(folder, followlinks=True):
        above = {Path(top).resolve(), *Path(top).resolve().parents}
        for name in folders:
            if (Path(top) / name).resolve() in above:
                raise BuilderError(f"{Path(top) / name}: this link leads in a circle; remove it")
        yield from (Path(top) / name for name in files)


def _category(path: Path, folder: Path) -> str:
    parts = path.relative_to(folder).parts
    name = parts[0] if len(parts) > 1 else folder.resolve().name
    return re.sub(r"[^A-Za-z0-9_-]", "_", name) or "normal"


def _from_manifest(manifest: Manifest, root: Path | None) -> Source:
    if root is None:
        raise BuilderError(
            f"manifest {manifest.name}: say where its data lie with --root DIR ({manifest.get}); "
            f"a folder of that name is ./{manifest.name}"
        )
    if not root.is_dir():
        raise BuilderError(f"--root {root}: no such folder ({manifest.get})")
    photographs: list[Photograph] = []
    categories: list[CategoryCount] = []
    faults: list[str] = []
    for entry in manifest.normals:
        found, missing = _find_images(entry, root)
        faults += missing
        if entry.expected is not None and len(found) != entry.expected:
            faults.append(f"{entry.category}: expected {entry.expected} images, found {len(found)}")
            surplus = _surplus(found, entry.expected)
            faults += [f"surplus: {path.relative_to(root).as_posix()}" for path in surplus]
        photographs += [
            Photograph(path, path.relative_to(root).as_posix(), entry.category) for path in found
        ]
        categories.append(
            CategoryCount(
                category=entry.category,
                found=len(found),
                kept=len(found),
                expected=entry.expected,
            )
        )
    _refuse_unwritable_names(photographs)
    if not photographs:
        raise BuilderError(
            f"--root {root}: no image of {manifest.name} found; expected "
            f"{manifest.normals[0].folders[0]}/* below it ({manifest.get})"
        )
    report = SourceReport(
        name=manifest.name,
        licence=manifest.licence,
        citation=manifest.citation,
        homepage=manifest.homepage,
        faults=faults,
        categories=categories,
    )
    return Source(photographs, report)


def _find_images(entry: NormalImages, root: Path) -> tuple[list[Path], list[str]]:
    """The images of one category in order, and a line for each missing folder or number."""
    found: list[Path] = []
    faults: list[str] = []
    for name in entry.folders:
        folder = root / name
        if not folder.is_dir():
            faults.append(f"missing: {name}/")
            continue
        images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        faults += [f"missing: {name}/{gap}" for gap in _gaps(images)]
        if entry.skip_labelled is not None:
            label = entry.skip_labelled
            images = [p for p in images if not (folder / label.replace("{stem}", p.stem)).exists()]
        found += images
    return found, faults


def _surplus(found: list[Path], expected: int) -> list[Path]:
    """What is too much: among numbered files those without a number, else the last ones."""
    surplus = max(0, len(found) - expected)
    odd = [path for path in found if not path.stem.isdecimal()]
    return odd if 0 < len(odd) <= surplus else found[expected:]


def _gaps(images: list[Path]) -> list[str]:
    """The names missing from a folder of numbered files, between its first and last number."""
    if not images or not all(path.stem.isdecimal() for path in images):
        return []
    last = images[-1]
    present = {int(path.stem) for path in images}
    start = min(present)
    if max(present) - start > 10 * len(images):
        return []  # not a numbering
    return [
        f"{number:0{len(last.stem)}d}{last.suffix}"
        for number in range(start, max(present))
        if number not in present
    ]


def count_kept(report: SourceReport, rejected: Iterable[tuple[Photograph, str]]) -> SourceReport:
    """The report after preparation: kept and rejected by reason, so that the counts add up."""
    reasons = {category.category: Counter[str]() for category in report.categories}
    faults = list(report.faults)
    for photograph, fault in rejected:
        reasons[photograph.category][fault.split(" (")[0]] += 1
        faults.append(f"{fault}: {photograph.name}")
    categories = [
        category.model_copy(
            update={
                "kept": category.found - reasons[category.category].total(),
                "rejected": dict(reasons[category.category]),
            }
        )
        for category in report.categories
    ]
    return report.model_copy(
        update={"categories": categories, "faults": faults, "incomplete": bool(faults)}
    )
