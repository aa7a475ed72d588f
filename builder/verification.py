"""The report of `builder verify`: what was checked, what was not, and every fault found."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from builder.artifacts import Model
from builder.check import Kind
from builder.recipe import Sha256


class Fault(Model):
    """One fault: in which file, of which sample (its key, or empty), of what kind."""

    shard: str
    key: str
    kind: Kind
    message: str

    def line(self) -> str:
        """For people."""
        return f"{self.kind}: {self.shard}{f' {self.key}' if self.key else ''}: {self.message}"


class Options(Model):
    """What was asked for."""

    rerender: int = Field(ge=0)
    rebuild: int = Field(ge=0)
    seed: int = Field(ge=0)
    jobs: int = Field(ge=1)


class Counts(Model):
    """How much was checked. Shards: `data_shards` + `normals_shards` = `shards_read` + `missing`.

    `samples` and `normals` were walked whole. `redrawn` samples were drawn again, `differing` of
    these are not the draw. `faults_left_out` are beyond those kept of each shard.
    """

    data_shards: int
    normals_shards: int
    shards_read: int
    shards_missing: int
    samples: int
    normals: int
    bytes: int
    records: int
    redrawn: int
    differing: int
    rerendered: int
    rebuilt: int
    faults_left_out: int


class Verification(Model):
    """`--report`: the whole result; `notes` say what was not looked for, and why."""

    format: Literal["semiformula-verification"]
    format_version: Literal[1]
    builder_version: str
    url: str
    content_sha256: Sha256
    options: Options
    counts: Counts
    notes: list[str]
    faults: list[Fault]
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    @property
    def is_rebuilt(self) -> bool:
        """Whether as many shards were built again as asked for, or as there are."""
        return self.counts.rebuilt >= min(self.options.rebuild, self.counts.data_shards)

    def lines(self) -> str:
        """For people: a line a fault, what was checked, the verdict."""
        counts = self.counts
        rate = counts.bytes / 1e6 / max(self.seconds, 1e-9)
        lines = [fault.line() for fault in self.faults]
        if counts.faults_left_out:
            lines.append(f"and {counts.faults_left_out} more faults in the same shards")
        lines += [f"note: {note}" for note in self.notes]
        lines += [
            f"shards: {counts.shards_read} read ({counts.data_shards} data + "
            f"{counts.normals_shards} normals - {counts.shards_missing} missing), "
            f"{counts.records} records",
            f"samples: {counts.samples}, normals: {counts.normals}, {counts.bytes / 1e6:.1f} MB in "
            f"{self.seconds:.1f} s: {rate:.0f} MB/s with {self.options.jobs} processes",
            f"drawn again: {counts.redrawn}, {counts.differing} differ; rendered again: "
            f"{counts.rerendered}; shards rebuilt: {counts.rebuilt}",
        ]
        found = len(self.faults) + counts.faults_left_out
        verdict = f"{found or 'no'} fault{'s' if found > 1 else ''}"
        lines.append(f"dataset {self.content_sha256[:16]}: {verdict}: {self.url}")
        return "\n".join(lines)
