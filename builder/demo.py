"""Writes the project's own inspection set: procedural photographs of three products, with defects.

Layout (that of MVTec AD): PRODUCT/train/good, PRODUCT/test/good, PRODUCT/test/DEFECT,
PRODUCT/ground_truth/DEFECT, and demo.json, written last, which says that the set is complete.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from PIL import Image
from pydantic import ConfigDict, Field
from tqdm import tqdm

from builder.artifacts import Model, atomic_file, read_json, sha256_of, sha256_of_file, write_json
from builder.demo_defects import KINDS
from builder.demo_render import PRODUCTS, render_defect, render_normal
from builder.errors import BuilderError
from builder.workers import results, usable_cores, worker_pool

RECORD = "demo.json"
PNG_LEVEL = 3  # fixed, so that a rerun writes the same bytes
LICENSE = """\
The pictures and masks in this folder were drawn by a program from random numbers.
They are dedicated to the public domain under CC0 1.0 Universal:
https://creativecommons.org/publicdomain/zero/1.0/
"""
README = """\
Inspection set drawn by `builder demo-data` of semiformula: no photographs, licence CC0 1.0.
Layout of MVTec AD; masks (0 or 255) in PRODUCT/ground_truth/KIND/NNN_mask.png.
demo.json holds the seed, the counts and the digest of all files; it is written last.
"""

Count = Annotated[int, Field(ge=0, le=10_000)]


class DemoRecord(Model):
    """demo.json: what the set is; `sha256` is that of the lines `DIGEST  PATH` sorted by path."""

    model_config = ConfigDict(strict=False)  # JSON has lists, not tuples

    format: Literal["semiformula-demo-data"] = "semiformula-demo-data"
    format_version: Literal[1] = 1
    licence: str = "CC0-1.0"
    seed: Annotated[int, Field(ge=0)]
    size_px: Annotated[int, Field(ge=48, le=1024)]
    products: tuple[str, ...]
    kinds: tuple[str, ...]
    train: Annotated[int, Field(ge=1, le=10_000)]
    good: Count
    per_defect: Count
    files: int
    bytes: int
    sha256: str


class DemoSummary(NamedTuple):
    """What `make_demo_data` did; `written` is 0 when the set was there already."""

    record: DemoRecord
    images: int
    masks: int
    written: int
    seconds: float

    def __str__(self) -> str:
        record = self.record
        defects = record.per_defect * len(record.kinds)
        each = record.train + record.good + defects
        done = f"written in {self.seconds:.1f} s" if self.written else "complete already"
        return (
            f"products: {len(record.products)} ({', '.join(record.products)}), each {each} images: "
            f"{record.train} train, {record.good} test good, {defects} test with defects "
            f"({record.per_defect} each of {', '.join(record.kinds)})\n"
            f"files: {record.files} ({self.images} images, {self.masks} masks, LICENSE.txt, "
            f"README.md), {record.bytes / 1e6:.1f} MB, {done}"
        )


class Task(NamedTuple):
    """One picture to draw, and with a defect its mask."""

    out: Path
    product: str
    split: str
    kind: str
    number: int
    size_px: int
    seed: int


def make_demo_data(
    out: Path,
    *,
    train: int = 60,
    good: int = 15,
    per_defect: int = 8,
    size_px: int = 256,
    seed: int = 0,
    jobs: int | None = None,
    products: Sequence[str] = ("plank", "plate", "terrazzo"),
) -> DemoSummary:
    """Write the demo set into the folder `out`, or find that it is there already.

    Per product `train` and `good` pictures without defect for training and test, and `per_defect`
    of each of the four kinds of defect with masks; RGB PNG of `size_px`. An interrupted call is
    finished by the same call. Raises BuilderError for parameters out of range, and for a folder
    that holds anything else.
    """
    started = time.monotonic()
    _check(train, good, per_defect, size_px, seed, products)
    wanted = {
        "seed": seed, "size_px": size_px, "products": tuple(products), "kinds": KINDS,
        "train": train, "good": good, "per_defect": per_defect,
    }  # fmt: skip
    tasks = [
        Task(out, product, split, kind, index, size_px, seed)
        for product in products
        for split, kind, count in _plan(train, good, per_defect)
        for index in range(count)
    ]
    names = sorted(["LICENSE.txt", "README.md", *(n for task in tasks for n in _names(task))])
    masks = sum(task.kind != "good" for task in tasks)
    found = _inspect(out, wanted, names)
    if found is not None:
        return DemoSummary(found, len(tasks), masks, 0, time.monotonic() - started)
    (out / RECORD).unlink(missing_ok=True)  # while files change, the set is not complete
    digests, sizes = {}, {}
    for name, text in (("README.md", README), ("LICENSE.txt", LICENSE)):
        digests[name], sizes[name] = _write(out / name, text.encode())
    for name, digest, size in tqdm(
        _render_all(tasks, jobs), total=len(tasks) + masks, unit="file", disable=None
    ):
        digests[name], sizes[name] = digest, size
    record = DemoRecord(
        **wanted, files=len(names), bytes=sum(sizes.values()), sha256=_set_digest(digests)
    )
    write_json(out / RECORD, record)
    return DemoSummary(record, len(tasks), masks, len(names), time.monotonic() - started)


def _check(
    train: int, good: int, per_defect: int, size_px: int, seed: int, products: Sequence[str]
) -> None:
    for name, value, low, high in (
        ("train", train, 1, 10_000), ("good", good, 0, 10_000),
        ("per_defect", per_defect, 0, 10_000), ("size_px", size_px, 48, 1024),
        ("seed", seed, 0, 2**63 - 1),
    ):  # fmt: skip
        if not low <= value <= high:
            raise BuilderError(f"demo data: {name} must lie in [{low}, {high}], found {value}")
    unknown = [product for product in products if product not in PRODUCTS]
    if unknown or not products or len(set(products)) != len(products):
        raise BuilderError(
            f"demo data: products must be some of {', '.join(PRODUCTS)}, each once; "
            f"found {', '.join(products) or 'none'}"
        )


def _plan(train: int, good: int, per_defect: int) -> Iterator[tuple[str, str, int]]:
    yield "train", "good", train
    yield "test", "good", good
    for kind in KINDS:
        yield "test", kind, per_defect


def _names(task: Task) -> list[str]:
    """The files of a task, relative to the folder."""
    image = f"{task.product}/{task.split}/{task.kind}/{task.number:03d}.png"
    if task.kind == "good":
        return [image]
    return [image, f"{task.product}/ground_truth/{task.kind}/{task.number:03d}_mask.png"]


def _inspect(out: Path, wanted: dict[str, object], names: list[str]) -> DemoRecord | None:
    """Look before writing: the record if the set is complete, None if it is to be written."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise BuilderError(f"{out}: is a file; name a folder for the demo data")
    present, halves, foreign = _scan(out, {*names, RECORD})
    if not present and foreign is None:
        for path in halves:
            path.unlink()
        return None
    ours = (out / "README.md").is_file() and (out / "README.md").read_bytes() == README.encode()
    if (out / RECORD).exists():
        record = read_json(DemoRecord, out / RECORD)
        for key, value in wanted.items():
            if getattr(record, key) != value:
                raise BuilderError(
                    f"{out}: holds a demo set with {key} {getattr(record, key)!r}, asked for "
                    f"{value!r}; delete the folder or name another one"
                )
    if foreign is not None or not ours:
        raise BuilderError(
            f"{out}: holds {foreign or min(present)}, which is not part of the demo set; "
            "name an empty or new folder"
        )
    for path in halves:
        path.unlink()
    if present != {*names, RECORD}:
        return None
    digests = {name: sha256_of_file(out / name) for name in names}
    return record if _set_digest(digests) == record.sha256 else None


def _scan(out: Path, known: set[str]) -> tuple[set[str], list[Path], str | None]:
    """Our files in the folder, what a killed writer left of them, and the first foreign file."""
    present, halves = set(), []
    for path in out.rglob("*"):
        if path.is_dir():
            continue
        name = path.relative_to(out).as_posix()
        target = path.with_name(path.name[1:].split(".tmp-")[0]).relative_to(out).as_posix()
        if name in known:
            present.add(name)
        elif path.name.startswith(".") and ".tmp-" in path.name and target in known:
            halves.append(path)
        else:
            return present, halves, name
    return present, halves, None


def _set_digest(digests: dict[str, str]) -> str:
    return sha256_of("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode())


def _write(path: Path, data: bytes) -> tuple[str, int]:
    with atomic_file(path) as file:
        file.write(data)
    return sha256_of(data), len(data)


def _render_all(tasks: list[Task], jobs: int | None) -> Iterator[tuple[str, str, int]]:
    """Draw and write every task; name, digest and size of each file as it is done."""
    jobs = min(jobs or usable_cores(), max(1, len(tasks) // 8))  # a worker's start costs pictures
    if jobs == 1:
        for task in tasks:
            yield from _draw(task)
        return
    with worker_pool(jobs) as pool:
        for _, files in results(pool, [partial(_draw, task) for task in tasks]):
            yield from files


def _draw(task: Task) -> list[tuple[str, str, int]]:
    _, product, split, kind, number, size_px, seed = task
    if kind == "good":
        pictures = [render_normal(product, split, number, size_px=size_px, seed=seed)]
    else:
        pictures = list(render_defect(product, kind, number, size_px=size_px, seed=seed))
    done = []
    for name, picture in zip(_names(task), pictures, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", compress_level=PNG_LEVEL)
        done.append((name, *_write(task.out / name, buffer.getvalue())))
    return done
