"""The work of `builder publish-files`: everything beside the shards, written in one order."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

from builder.artifacts import readable_json
from builder.dataset import INDEX, normals_of, read_index
from builder.errors import BuilderError
from builder.index import Dataset, ShardRecord
from builder.progress import Progress
from builder.publish import (
    CARD,
    CITATION,
    CROISSANT,
    DATASHEET,
    GALLERY,
    PARAMETERS,
    STATISTICS,
    SUMS,
)
from builder.publish.card import card
from builder.publish.citation import citation
from builder.publish.croissant import croissant
from builder.publish.facts import Facts, Options
from builder.publish.gallery import gallery
from builder.publish.licence import roll_up
from builder.publish.parameters import ParquetWriter, stored_parameters
from builder.publish.statistics import measure
from builder.publish.subsample import Subsample, choose, paint
from builder.publish.wording import fill, words
from builder.storage import Storage

PLAN = "plan.json"
MAX_PLAN_BYTES = 2**30


def publish_files(storage: Storage, options: Options, *, i_know: bool = False) -> Facts:
    """Write every file of `PUBLISHED` to a finished dataset; return what they state.

    The same dataset and options are the same bytes. Raises BuilderError when the dataset is
    unfinished, a shard is missing, or the licence of its photographs forbids or is unknown.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise BuilderError(
            "publish-files writes Parquet, which needs pyarrow: pip install 'semiformula[publish]'"
        )
    dataset = read_index(storage)
    _refuse_other_shards(storage, dataset)
    told = _normals(storage, dataset)
    licences = Counter(licence for _, licence in told)
    categories = [category for category, _ in told]
    name = dataset.normals.source.name
    sources = {f"normals {name}/{c} ({licence})": licence for c, licence in sorted(set(told))}
    licence = roll_up(sources, i_know=i_know)

    writer = _Writer(storage)
    subsample = choose(dataset)
    _write_parameters(writer, dataset, categories, subsample)
    painted = paint(storage, dataset, subsample)
    statistics = measure(dataset.recipe, dataset.content_sha256, subsample, painted)
    writer.write(STATISTICS, readable_json(statistics))
    facts = Facts(
        dataset=dataset,
        options=options,
        licence=licence,
        licences=dict(licences),
        categories=dict(Counter(categories)),
        statistics=statistics,
        sha256=writer.sha256,
        sizes=writer.sizes,
    )
    writer.write(GALLERY, gallery(facts, subsample, painted, categories).encode())
    writer.write(CITATION, citation(facts).encode())
    writer.write(DATASHEET, fill("datasheet.md", words(facts)).encode())
    writer.write(CARD, card(facts).encode())
    writer.write(CROISSANT, croissant(facts))
    _write_sums(writer, dataset)
    return facts


def _normals(storage: Storage, dataset: Dataset) -> list[tuple[str, str]]:
    """Category and licence of each normal image, in order."""
    try:
        told = [(str(one["category"]), str(one["licence"])) for one in normals_of(storage, dataset)]
    except (ValueError, KeyError, TypeError) as error:
        raise BuilderError(f"{storage.where('normals')}: not our normals ({error!r})") from None
    if len(told) != dataset.normals.count:
        raise BuilderError(
            f"{storage.where('normals')}: expected {dataset.normals.count} normal images, found "
            f"{len(told)}; see builder verify {storage.url}"
        )
    return told


class _Writer:
    """Writes files and remembers their hashes and sizes."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.sha256: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def write(self, name: str, data: bytes) -> None:
        with self.open(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        with self.storage.write(name) as file:
            hashing = _Hashing(file)
            yield hashing  # type: ignore[misc]
        self.sha256[name] = hashing.digest.hexdigest()
        self.sizes[name] = hashing.size


class _Hashing(io.RawIOBase):
    """A writable file that hashes what passes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = memoryview(data).nbytes
        self.size += written
        self._file.write(data)
        return written


def _shards(dataset: Dataset) -> list[ShardRecord]:
    return [*dataset.normals.shards, *dataset.shards]


def _refuse_other_shards(storage: Storage, dataset: Dataset) -> None:
    """A shard that is missing or of another size is named at once; hashes are verify's work."""
    found = {
        entry.name: entry.bytes
        for folder in ("normals", "data")
        for entry in storage.entries(folder)
    }
    for shard in _shards(dataset):
        if found.get(shard.name) != shard.bytes:
            size = found.get(shard.name)
            state = "missing" if size is None else f"of {size} bytes, expected {shard.bytes}"
            raise BuilderError(
                f"{storage.where(shard.name)}: {state}; see builder verify {storage.url}"
            )


def _write_parameters(
    writer: _Writer, dataset: Dataset, categories: list[str], subsample: Subsample
) -> None:
    with (
        writer.open(PARAMETERS) as file,
        Progress(dataset.samples, "parameters", "sample") as progress,
    ):
        table = ParquetWriter(file, dataset.theta.length, categories)
        for part in stored_parameters(writer.storage, dataset):
            table.write(part)
            subsample.take(part)
            progress.done(len(part.theta))
        table.close()


def _write_sums(writer: _Writer, dataset: Dataset) -> None:
    """`sha256sum -c` checks the whole dataset; the shards' hashes are those of the index."""
    sums = {shard.name: shard.sha256 for shard in _shards(dataset)} | writer.sha256
    for name in (INDEX, PLAN):
        with contextlib.suppress(FileNotFoundError):
            data = writer.storage.read(name, MAX_PLAN_BYTES)
            sums[name] = hashlib.sha256(data).hexdigest()
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    writer.write(SUMS, lines.encode())
