"""From a folder of class folders, or a manifest's [[classes]], to labelled photographs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from builder.errors import BuilderError
from builder.index import CategoryCount, SourceReport
from builder.sources import (
    IMAGE_SUFFIXES,
    Photograph,
    Source,
    files_below,
    find_manifest,
    from_manifest,
    last_name,
    refuse_inspection_set,
    refuse_unwritable_names,
    shipped_manifests,
)
from builder.storage import is_remote

SPLITS = {"train", "val", "valid", "validation"}  # folders above classes, not classes


def find_classes(given: str, root: str | None, licence: str | None) -> Source:
    """The photographs of a folder of class folders, or of a manifest whose data lie in `root`.

    A photograph's category is its class; a class's label is its place in the report's categories:
    the manifest's order, or that of the folders' names. Faults (missing or surplus files against
    the manifest) stand in the report. Raises BuilderError where no two classes can be made of it.
    """
    manifest = find_manifest(given, licence)
    if manifest is not None:
        source = from_manifest(manifest, "classes", root)
    elif root is not None:
        raise BuilderError(f"--root {root}: only for a manifest; {given} is none")
    elif not is_remote(given) and (not given or not Path(given).is_dir()):
        raise BuilderError(
            f"{given}: neither a folder of class folders nor a manifest "
            f"({', '.join(shipped_manifests())} or a .toml file)"
        )
    else:
        source = _from_folder(given, licence)
    _refuse_too_few(given, source.report)
    return source


def _from_folder(folder: str, licence: str | None) -> Source:
    files = sorted(files_below(folder))
    seen = [path for path in files if not path.parts[0].startswith(".")]  # .ipynb_checkpoints
    images = [path for path in seen if path.suffix.lower() in IMAGE_SUFFIXES]
    for path in images:
        if len(path.parts) == 1:
            raise BuilderError(f"{folder}: {path} lies in no class folder; move it into one")
    refuse_inspection_set(folder, images)
    photographs = [Photograph(folder, path.as_posix(), path.parts[0]) for path in images]
    refuse_unwritable_names(photographs)
    found = Counter(photograph.category for photograph in photographs)
    for name in sorted({*found, *_folders_in(folder)}):
        if not found[name]:
            raise BuilderError(f"{folder}: class folder {name!r} holds no image; remove it")
        if not name.isprintable():
            raise BuilderError(f"{folder}: class folder {name!r}: rename it, this is no text")
        if name.lower() in SPLITS:
            raise BuilderError(
                f"{folder}: {name!r} looks like a split, not like a class; give the folder that "
                "holds one folder a class"
            )
    report = SourceReport(
        name=last_name(folder),
        licence=licence or "unknown",
        other_files=len(files) - len(images),
        categories=[CategoryCount(category=c, found=n, kept=n) for c, n in sorted(found.items())],
    )
    return Source(photographs, report)


def _folders_in(folder: str) -> list[str]:
    """The folders directly below; an object store has none beside those of its files."""
    if is_remote(folder):
        return []
    return [p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith(".")]


def _refuse_too_few(given: str, report: SourceReport) -> None:
    if len(report.categories) < 2:
        names = ", ".join(repr(one.category) for one in report.categories)
        raise BuilderError(
            f"{given}: expected at least two classes, one folder each, found {names or 'none'}"
        )
    for category in report.categories:
        if not category.found:
            raise BuilderError(f"{given}: class {category.category}: no image found")
