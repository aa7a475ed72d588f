"""From a folder or a manifest to the list of normal photographs, each with its provenance."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from builder.artifacts import Model, read_toml
from builder.errors import BuilderError
from builder.images import (
    MAX_FILE_BYTES,
    Prepared,
    Unusable,
    examine_bytes,
    prepare_bytes,
    read_photograph,
)
from builder.index import CategoryCount, SourceReport
from builder.recipe import Codec
from builder.storage import TooLarge, is_remote, open_storage

IMAGE_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"}
TEST_FOLDERS = {"test", "ground_truth"}  # in a folder taken whole they mean an inspection set


def _inside(folder: str) -> str:
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ValueError("a folder must lie below --root")
    return folder


# Below --root, nowhere else.
Folder = Annotated[str, AfterValidator(_inside)]


class CategoryImages(Model):
    """Where a dataset keeps the images of one category, and how many there should be.

    `skip_labelled` leaves out an image beside which that file lies (`{stem}` stands for the
    image's name without suffix), `only_labelled` any other image: DAGM mixes normal and defective
    images in one folder.
    """

    category: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    folders: list[Folder] = Field(min_length=1)
    expected: int | None = Field(default=None, ge=1)
    skip_labelled: str | None = None
    only_labelled: str | None = None

    @model_validator(mode="after")
    def _labelled_or_not(self) -> Self:
        if self.skip_labelled is not None and self.only_labelled is not None:
            raise ValueError("give one of skip_labelled and only_labelled")
        return self


class Manifest(Model):
    """A public dataset: what it is, who may use it, where to get it, where its images lie.

    `normals` are the categories of normal images that `builder build` paints on; `classes` those
    that `builder classes` labels, in the order of their labels. Either may be absent.
    """

    format: Literal["semiformula-manifest"]
    format_version: Literal[1]
    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    get: str
    normals: list[CategoryImages] = Field(default_factory=list)
    classes: list[CategoryImages] = Field(default_factory=list)

    @model_validator(mode="after")
    def _each_category_once(self) -> Self:
        for table, entries in (("normals", self.normals), ("classes", self.classes)):
            names = [entry.category for entry in entries]
            if len(set(names)) != len(names):
                raise ValueError(f"a category stands twice; list its folders in one [[{table}]]")
        if not self.normals and not self.classes:
            raise ValueError("neither [[normals]] nor [[classes]]: which images are meant?")
        return self


@dataclass(frozen=True)
class Photograph:
    """A normal photograph: the folder or URL it lies in, its path below, its category."""

    root: str
    name: str
    category: str

    @property
    def path(self) -> Path:
        """Its file, where the root is a folder of this machine."""
        return Path(self.root) / self.name


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


def find_source(normals: str, root: str | Path | None, licence: str | None) -> Source:
    """The photographs of a folder, or of a manifest (by name or path) whose data lie in `root`.

    Both may be URLs of an object store; names and categories, and so the dataset, are the same.

    Faults (missing or surplus files against the manifest) stand in the report; whether they stop
    the build is the caller's decision. Raises BuilderError when there is nothing to build from.
    """
    manifest = find_manifest(normals, licence)
    if manifest is not None:
        return from_manifest(manifest, "normals", None if root is None else str(root))
    if root is not None:
        raise BuilderError(f"--root {root}: only for a manifest; --normals {normals} is none")
    if not is_remote(normals) and (not normals or not Path(normals).is_dir()):
        raise BuilderError(
            f"--normals {normals}: neither a folder nor a manifest "
            f"({', '.join(shipped_manifests())} or a .toml file)"
        )
    return _from_folder(normals, licence)


def find_manifest(name_or_path: str, licence: str | None) -> Manifest | None:
    """A shipped manifest by name, or the one in a TOML file; None for anything else."""
    path = Path(name_or_path)
    shipped = name_or_path in shipped_manifests()
    if not shipped and not (path.is_file() and path.suffix == ".toml"):
        return None
    if shipped:
        path = Path(str(resources.files("data_manifests").joinpath(f"{name_or_path}.toml")))
    if licence is not None:
        raise BuilderError(f"--licence: manifest {name_or_path} states the licence; leave it out")
    return read_toml(Manifest, path)


def _from_folder(folder: str, licence: str | None) -> Source:
    files = sorted(files_below(folder))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise BuilderError(
            f"--normals {folder}: no images found ({', '.join(sorted(IMAGE_SUFFIXES))}) "
            f"among {len(files)} files; give a folder of normal photographs"
        )
    refuse_inspection_set(f"--normals {folder}", images)
    own_name = last_name(folder)
    photographs = [
        Photograph(folder, path.as_posix(), _category(path, own_name)) for path in images
    ]
    refuse_unwritable_names(photographs)
    found = Counter(photograph.category for photograph in photographs)
    categories = [CategoryCount(category=c, found=n, kept=n) for c, n in sorted(found.items())]
    report = SourceReport(
        name=own_name,
        licence=licence or "unknown",
        other_files=len(files) - len(images),
        categories=categories,
    )
    return Source(photographs, report)


def refuse_inspection_set(given: str, images: Iterable[PurePosixPath]) -> None:
    """Raise BuilderError where a folder taken whole holds what a network is to be judged on."""
    for path in images:
        test = TEST_FOLDERS.intersection(path.parts[:-1])
        if test:
            raise BuilderError(
                f"{given}: holds {path}, which looks like an inspection set's {test.pop()!r} "
                "part; pre-training must not see it: name the folder of the photographs meant, or "
                "use a manifest"
            )


def refuse_unwritable_names(photographs: list[Photograph]) -> None:
    """BuilderError for the first name that JSON and tar cannot hold: one that is not UTF-8."""
    for photograph in photographs:
        try:
            photograph.name.encode()
        except UnicodeEncodeError:
            name = os.fsencode(photograph.name)
            raise BuilderError(f"{name!r}: a file name that is not UTF-8; rename it") from None


def last_name(root: str) -> str:
    """The last part of a folder's path or URL."""
    return root.rstrip("/").rsplit("/", 1)[-1] if is_remote(root) else Path(root).resolve().name


def files_below(root: str) -> Iterator[PurePosixPath]:
    """Every file's path below the root, on this machine also behind links to folders.

    Raises BuilderError for a link that leads in a circle.
    """
    if is_remote(root):
        yield from (PurePosixPath(entry.name) for entry in open_storage(root).walk())
        return
    for top, folders, files in os.walk(root, followlinks=True):
        above = {Path(top).resolve(), *Path(top).resolve().parents}
        for name in folders:
            if (Path(top) / name).resolve() in above:
                raise BuilderError(f"{Path(top) / name}: this link leads in a circle; remove it")
        below = PurePosixPath(Path(top).relative_to(root).as_posix())
        yield from (below / name for name in files)


def _files_in(root: str, folder: str) -> list[PurePosixPath] | None:
    """The paths below the root of what lies directly in a folder, None where it is missing."""
    if is_remote(root):
        found = [PurePosixPath(entry.name) for entry in open_storage(root).entries(folder)]
        return found or None
    place = Path(root) / folder
    if not place.is_dir():
        return None
    return [PurePosixPath(folder) / path.name for path in place.iterdir()]


def _category(path: PurePosixPath, own_name: str) -> str:
    name = path.parts[0] if len(path.parts) > 1 else own_name
    return re.sub(r"[^A-Za-z0-9_-]", "_", name) or "normal"


def from_manifest(
    manifest: Manifest, table: Literal["normals", "classes"], root: str | None
) -> Source:
    """What lies below `root` of one of a manifest's two tables, and its faults in the report."""
    entries: list[CategoryImages] = getattr(manifest, table)
    if not entries:
        raise BuilderError(f"manifest {manifest.name}: has no [[{table}]]")
    if root is None:
        raise BuilderError(
            f"manifest {manifest.name}: say where its data lie with --root DIR ({manifest.get}); "
            f"a folder of that name is ./{manifest.name}"
        )
    if not is_remote(root) and not Path(root).is_dir():
        raise BuilderError(f"--root {root}: no such folder ({manifest.get})")
    photographs: list[Photograph] = []
    categories: list[CategoryCount] = []
    faults: list[str] = []
    for entry in entries:
        found, missing = _find_images(entry, root)
        faults += missing
        if entry.expected is not None and len(found) != entry.expected:
            faults.append(f"{entry.category}: expected {entry.expected} images, found {len(found)}")
            surplus = _surplus(found, entry.expected)
            faults += [f"surplus: {path}" for path in surplus]
        photographs += [Photograph(root, str(path), entry.category) for path in found]
        count = CategoryCount(
            category=entry.category, found=len(found), kept=len(found), expected=entry.expected
        )
        categories.append(count)
    refuse_unwritable_names(photographs)
    if not photographs:
        raise BuilderError(
            f"--root {root}: no image of {manifest.name} found; expected "
            f"{entries[0].folders[0]}/* below it ({manifest.get})"
        )
    report = SourceReport(
        name=manifest.name,
        licence=manifest.licence,
        citation=manifest.citation,
        homepage=manifest.homepage,
        faults=list(dict.fromkeys(faults)),  # two classes may share a folder
        categories=categories,
    )
    return Source(photographs, report)


def _find_images(entry: CategoryImages, root: str) -> tuple[list[PurePosixPath], list[str]]:
    """The images of one category in order, and a line for each missing folder or number."""
    found: list[PurePosixPath] = []
    faults: list[str] = []
    for name in entry.folders:
        files = _files_in(root, name)
        if files is None:
            faults.append(f"missing: {name}/")
            continue
        images = sorted(p for p in files if p.suffix.lower() in IMAGE_SUFFIXES)
        faults += [f"missing: {name}/{gap}" for gap in _gaps(images)]
        label = entry.skip_labelled or entry.only_labelled
        if label is not None:
            labelled = _labelled(root, name, images, label)
            wanted = entry.only_labelled is not None
            images = [path for path in images if (path in labelled) == wanted]
        found += images
    return found, faults


def _labelled(
    root: str, folder: str, images: list[PurePosixPath], label: str
) -> set[PurePosixPath]:
    """The images beside which a label lies; a folder of labels is listed once."""
    listed: dict[PurePosixPath, set[PurePosixPath]] = {}
    labelled = set()
    for path in images:
        wanted = PurePosixPath(folder) / label.replace("{stem}", path.stem)
        if wanted.parent not in listed:
            listed[wanted.parent] = set(_files_in(root, str(wanted.parent)) or ())
        if wanted in listed[wanted.parent]:
            labelled.add(path)
    return labelled


def _surplus(found: list[PurePosixPath], expected: int) -> list[PurePosixPath]:
    """What is too much: among numbered files those without a number, else the last ones."""
    surplus = max(0, len(found) - expected)
    odd = [path for path in found if not path.stem.isdecimal()]
    return odd if 0 < len(odd) <= surplus else found[expected:]


def _gaps(images: list[PurePosixPath]) -> list[str]:
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


def prepare(photograph: Photograph, size_px: int, channels: int, codec: Codec = "webp") -> Prepared:
    """Read and make ready one photograph, from this machine or an object store."""
    try:
        return prepare_bytes(_bytes_of(photograph), size_px, channels, codec)
    except Unusable as fault:
        return Prepared("", b"", str(fault))


def examine(photograph: Photograph, channels: int) -> Prepared:
    """Hash one photograph and see whether it can be made ready."""
    try:
        return examine_bytes(_bytes_of(photograph), channels)
    except Unusable as fault:
        return Prepared("", b"", str(fault))


def _bytes_of(photograph: Photograph) -> bytes:
    if not is_remote(photograph.root):
        return read_photograph(photograph.path)
    try:
        return open_storage(photograph.root).read(photograph.name, MAX_FILE_BYTES)
    except TooLarge:
        raise Unusable("larger than 1 GiB") from None
    except FileNotFoundError:
        raise Unusable("gone since it was listed") from None
