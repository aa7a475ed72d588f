"""Status and finish: what a storage holds of its plan, and the index when that is all of it."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from builder.artifacts import readable_json
from builder.dataset import INDEX
from builder.errors import BuilderError
from builder.index import Commit, DatasetHead, ImageFormat, ShardRecord, ThetaFormat
from builder.plan import Plan, read_plan
from builder.progress import duration
from builder.recipe import SUFFIX
from builder.shards import KIND, commit_name
from builder.storage import Storage, is_temporary

RATE_WINDOW_SECONDS = 600.0  # the rate is that of the last ten minutes of work
MAX_FAULTS_SHOWN = 10

# One row a shard: 56 bytes, so that a million shards take no memory to speak of.
_ROW = np.dtype([("samples", "i8"), ("bytes", "i8"), ("time", "f8"), ("sha256", "S32")])


@dataclass(frozen=True)
class Survey:
    """What stands in a storage. `rows`: one a shard; samples 0 where it is not (rightly) there."""

    plan: Plan
    rows: npt.NDArray[np.void]
    faults: list[str]
    bad: int
    leftovers: list[str]  # of killed writers

    @property
    def done(self) -> int:
        """How many shards stand with a record that fits."""
        return int(np.count_nonzero(self.rows["samples"]))

    @property
    def missing(self) -> int:
        """How many shards nobody has committed, the bad ones left out."""
        return self.plan.shard_count - self.done - self.bad


def survey(storage: Storage) -> Survey:
    """List the storage and read the commit records; the shards' sizes are compared, not hashed.

    Raises BuilderError when there is no plan.
    """
    plan = read_plan(storage)
    rows = np.zeros(plan.shard_count, _ROW)
    sizes = np.full(plan.shard_count, -1, np.int64)
    pattern = re.compile(rf"{KIND[plan.contents]}-(\d+)-of-0*{plan.shard_count}\.(?:tar|json)")
    faults: list[str] = []
    leftovers: list[str] = []
    samples, shard_bytes, times, hashes = (rows[name] for name in _ROW.names or ())
    listed = np.zeros(plan.shard_count, bool)
    # Records first: a shard's tar stands before its record, so what is listed here is there then.
    for entry in storage.entries("records"):
        index = _index_of(entry.name, pattern, plan)
        if index is not None:
            listed[index] = True
            times[index] = entry.modified
        elif is_temporary(entry.name):
            leftovers.append(entry.name)
    for entry in storage.entries("data"):
        index = _index_of(entry.name, pattern, plan)
        if index is not None:
            sizes[index] = entry.bytes
        elif is_temporary(entry.name):
            leftovers.append(entry.name)
    bad = 0
    plan_sha256 = plan.sha256
    numbers = np.flatnonzero(listed)
    contents = storage.read_many(commit_name(plan.shard(int(i))) for i in numbers)
    for i, data in zip(numbers.tolist(), contents, strict=True):
        record, fault = _record_of(plan, plan_sha256, i, data, int(sizes[i]))
        if record is None:
            bad += 1
            if len(faults) < MAX_FAULTS_SHOWN:
                faults.append(f"{plan.shard(i)}: {fault}")
        else:
            samples[i], shard_bytes[i] = record.samples, record.bytes
            hashes[i] = bytes.fromhex(record.sha256)
    return Survey(plan, rows, faults, bad, leftovers)


def _index_of(name: str, pattern: re.Pattern[str], plan: Plan) -> int | None:
    match = pattern.fullmatch(name, name.rindex("/") + 1)
    index = int(match[1]) if match else plan.shard_count
    return index if index < plan.shard_count else None


def _record_of(
    plan: Plan, plan_sha256: str, index: int, data: bytes | None, size: int
) -> tuple[ShardRecord | None, str]:
    """The record of a shard that is as it should be, or why it is not."""
    try:
        commit = Commit.model_validate_json(data or b"")
    except ValidationError:
        return None, "its record is not readable"
    shard = commit.shard
    if commit.plan_sha256 != plan_sha256:
        return None, "its record is of another plan"
    if shard.name != plan.shard(index) or shard.samples != len(plan.samples_of(index)):
        return None, f"its record is of {shard.name} with {shard.samples} samples"
    if size < 0:
        return None, "recorded, but the file is missing"
    if size != shard.bytes:
        return None, f"expected {shard.bytes} bytes, found {size}"
    return shard, ""


@dataclass(frozen=True)
class Status:
    """How far a dataset is; rate in samples a second, None while nobody works."""

    shards: int
    done: int
    missing: int
    bad: int
    samples: int
    samples_done: int
    bytes_done: int
    finished: bool
    samples_per_second: float | None
    seconds_left: float | None
    seconds_since_last: float | None
    faults: list[str]

    def lines(self) -> str:
        """For people."""
        share = 100 * self.samples_done / self.samples
        lines = [
            f"shards: {self.done} done, {self.missing} missing, {self.bad} bad, {self.shards} in "
            "all",
            f"samples: {self.samples_done} of {self.samples} ({share:.1f} %), "
            f"{self.bytes_done / 1e9:.2f} GB",
        ]
        if self.finished:
            lines.append("finished: dataset.json stands")
        elif self.done == self.shards:
            lines.append("complete: run `builder finish`")
        elif self.samples_per_second is not None and self.seconds_left is not None:
            lines.append(
                f"rate: {self.samples_per_second:.0f} images/s, {duration(self.seconds_left)} left"
            )
        elif self.seconds_since_last is not None:
            lines.append(f"no shard came in the last {duration(self.seconds_since_last)}")
        lines += [f"bad: {fault}" for fault in self.faults]
        return "\n".join(lines)


def status_of(storage: Storage) -> Status:
    """Done, missing, bad, rate and time left, from the storage alone."""
    found = survey(storage)
    rows, plan = found.rows, found.plan
    done = rows["samples"] > 0
    samples_done = int(rows["samples"].sum())
    rate, since = _rate(rows["time"][done], rows["samples"][done])
    return Status(
        shards=plan.shard_count,
        done=found.done,
        missing=found.missing,
        bad=found.bad,
        samples=plan.recipe.samples,
        samples_done=samples_done,
        bytes_done=int(rows["bytes"].sum()),
        finished=storage.exists(INDEX),
        samples_per_second=rate,
        seconds_left=(plan.recipe.samples - samples_done) / rate if rate else None,
        seconds_since_last=since,
        faults=found.faults,
    )


def _rate(
    times: npt.NDArray[np.float64], samples: npt.NDArray[np.int64]
) -> tuple[float | None, float | None]:
    """Samples a second over the last window of work, and the seconds since the last shard."""
    if not len(times):
        return None, None
    now, last = time.time(), float(times.max())
    since = max(0.0, now - last)
    begin = max(float(times.min()), last - RATE_WINDOW_SECONDS)
    span = last - begin
    # The first shard of the window was begun before it, so it does not count.
    inside = int(samples[times > begin].sum())
    if since > RATE_WINDOW_SECONDS or span <= 0 or not inside:
        return None, since
    return inside / max(span, now - begin if since > 60 else span), since


def finish(storage: Storage) -> DatasetHead:
    """Write `dataset.json` when every shard's record verifies, and clear what was left over.

    Raises BuilderError that counts what is missing or bad.
    """
    found = survey(storage)
    plan, rows = found.plan, found.rows
    if found.done != plan.shard_count:
        more = "; ".join(found.faults)
        raise BuilderError(
            f"{storage.url}: {found.missing} of {plan.shard_count} shards are missing, "
            f"{found.bad} bad{f' ({more})' if more else ''}; run `builder work {storage.url}`"
        )
    _refuse_other_normals(storage, plan)
    digest = hashlib.sha256()
    for shard in plan.normals.shards:
        digest.update(f"{shard.sha256}  {shard.name}\n".encode())
    for i, sha256 in enumerate(_sha256s(rows)):
        digest.update(f"{sha256}  {plan.shard(i)}\n".encode())
    head = _head(plan, int(rows["samples"].sum()), digest.hexdigest())
    with storage.write(INDEX) as file:
        # As pydantic would write the whole model, without holding a million records.
        text = readable_json(head).decode().rstrip()
        file.write((text.removesuffix("}").rstrip() + ',\n "shards": [\n').encode())
        lines = _shard_lines(plan, rows)
        while part := list(islice(lines, 10_000)):
            file.write("".join(part).encode())
        file.write(b" ]\n}\n")
    clear_leftovers(storage, found.leftovers, ("", "normals"))
    return head


def _refuse_other_normals(storage: Storage, plan: Plan) -> None:
    sizes = {entry.name: entry.bytes for entry in storage.entries("normals")}
    for shard in plan.normals.shards:
        if sizes.get(shard.name) != shard.bytes:
            found = f"found {sizes[shard.name]}" if shard.name in sizes else "the file is missing"
            raise BuilderError(
                f"{storage.where(shard.name)}: expected {shard.bytes} bytes, {found}; "
                "plan again to mend it"
            )


def clear_leftovers(storage: Storage, leftovers: list[str], folders: Sequence[str]) -> None:
    """Remove what killed writers left half-written; one still at work finds its record.

    `leftovers` are known already; the `folders` are looked through.
    """
    for folder in folders:
        leftovers += [entry.name for entry in storage.entries(folder) if is_temporary(entry.name)]
    for name in leftovers:
        storage.delete(name)


def _shard_lines(plan: Plan, rows: npt.NDArray[np.void]) -> Iterator[str]:
    last = len(rows) - 1
    counts = zip(rows["samples"].tolist(), rows["bytes"].tolist(), _sha256s(rows), strict=True)
    for i, (samples, size, sha256) in enumerate(counts):
        yield (  # as json.dumps would, in a tenth of its time
            f'  {{"name": "{plan.shard(i)}", "samples": {samples}, "bytes": {size}, '
            f'"sha256": "{sha256}"}}{"," if i < last else ""}\n'
        )


def _sha256s(rows: npt.NDArray[np.void]) -> Iterator[str]:
    """The shards' hashes in hex; by way of the column's bytes, as NumPy drops zeros at an end."""
    for low in range(0, len(rows), 10_000):
        text = rows["sha256"][low : low + 10_000].tobytes().hex()
        yield from (text[i : i + 64] for i in range(0, len(text), 64))


def _head(plan: Plan, samples: int, content_sha256: str) -> DatasetHead:
    recipe = plan.recipe
    return DatasetHead(
        format="semiformula-shards",
        format_version=2,
        builder_version=plan.builder_version,
        environment=plan.environment,
        recipe=recipe,
        recipe_sha256=plan.recipe_sha256,
        content_sha256=content_sha256,
        contents=plan.contents,
        samples=samples,
        image=ImageFormat(
            size_px=recipe.size_px,
            channels=recipe.channels,
            codec=recipe.codec,
            suffix=SUFFIX[recipe.codec],
            lossless=recipe.codec != "jpeg",
        ),
        theta=ThetaFormat(
            components=recipe.components, channels=recipe.channels, length=recipe.theta_length
        ),
        normals=plan.normals,
    )
