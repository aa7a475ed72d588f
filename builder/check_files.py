"""Check the small files of a dataset against each other, and that there is nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from builder.artifacts import parse_json, sha256_of
from builder.check import Kind, ShardCheck
from builder.dataset import INDEX
from builder.errors import BuilderError
from builder.index import Commit, Dataset, ShardRecord
from builder.place import PLAN
from builder.plan import Plan
from builder.publish import is_published
from builder.recipe import SUFFIX
from builder.shards import KIND, commit_name, shard_name
from builder.storage import Storage
from builder.verification import Fault

MAX_FAULTS_OF_A_KIND = 100  # beside the shards': surplus files, records


class Findings:
    """Faults and notes as they come; of each kind outside the shards only the first hundred."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.left_out = 0
        self._kinds: Counter[str] = Counter()

    def add(self, kind: Kind, name: str, message: str) -> None:
        """Keep a fault of a file; beyond the first hundred of a kind, their number alone."""
        self._kinds[kind] += 1
        if self._kinds[kind] > MAX_FAULTS_OF_A_KIND:
            self.left_out += 1
        else:
            self.faults.append(Fault(shard=name, key="", kind=kind, message=message))

    def of_shard(self, check: ShardCheck) -> None:
        """Keep what the check of a shard found."""
        self.left_out += check.left_out
        for kind, key, message in check.faults:
            self.faults.append(Fault(shard=check.record.name, key=key, kind=kind, message=message))


def check_index(found: Findings, dataset: Dataset) -> None:
    """Check what the model does not compare: the shards' names and sizes, and the image's codec."""
    recipe, image = dataset.recipe, dataset.image
    right = (recipe.codec, SUFFIX[recipe.codec], recipe.codec != "jpeg")
    if (image.codec, image.suffix, image.lossless) != right:
        found.add("index", INDEX, f"image is {image.codec}, the recipe says {recipe.codec}")
    if (dataset.theta.components, dataset.theta.channels) != (recipe.components, recipe.channels):
        found.add("index", INDEX, "theta's components or channels are not the recipe's")
    count = len(dataset.shards)
    if count != recipe.shard_count:
        found.add("index", INDEX, f"expected {recipe.shard_count} data shards, found {count}")
    for i, shard in enumerate(dataset.shards):
        full = recipe.samples_per_shard
        samples = min(full, recipe.samples - i * full)
        check_entry(found, shard, shard_name(KIND[dataset.contents], i, count), samples)
    normals = dataset.normals.shards
    for i, shard in enumerate(normals):
        check_entry(found, shard, shard_name("normals", i, len(normals)), shard.samples)


def check_entry(found: Findings, shard: ShardRecord, name: str, samples: int) -> None:
    """Compare an entry of the index with the name and the count that follow from the rest."""
    if (shard.name, shard.samples) != (name, samples):
        found.add(
            "index",
            INDEX,
            f"expected {name} with {samples} samples, found {shard.name} with {shard.samples}",
        )


def check_plan(found: Findings, storage: Storage, dataset: Dataset) -> Plan | None:
    """Compare plan.json, where there is one, with dataset.json; the plan if it can be read."""
    try:
        data = storage.read(PLAN)
    except FileNotFoundError:
        found.notes.append("no plan.json: records are compared with dataset.json alone")
        return None
    try:
        plan = parse_json(Plan, data, PLAN)
    except BuilderError as error:
        found.add("plan", PLAN, error.message.removeprefix(f"{PLAN}: "))
        return None
    count = len(dataset.shards)
    for field, planned, stated in (
        ("builder_version", plan.builder_version, dataset.builder_version),
        ("environment", plan.environment, dataset.environment),
        ("recipe", plan.recipe, dataset.recipe),
        ("recipe_sha256", plan.recipe_sha256, dataset.recipe_sha256),
        ("contents", plan.contents, dataset.contents),
        ("normals", plan.normals, dataset.normals),
        ("shard_count", plan.shard_count, count),
    ):
        if planned != stated:
            found.add("plan", PLAN, f"{field} is not that of dataset.json; of another dataset?")
    if plan.parameters_from is not None:
        found.notes.append(
            f"the plan takes the parameters of {plan.parameters_from}: they may differ from the "
            "recipe's draw"
        )
    return plan


def check_photographs(found: Findings, plan: Plan | None, normals: Sequence[ShardCheck]) -> None:
    """Compare the provenance of all normals, once it is whole, with what was planned."""
    if plan is None or any(check.faults for check in normals):
        return
    lines = "".join(line for check in normals for line in check.photographs)
    if sha256_of(lines.encode(errors="surrogatepass")) != plan.photographs_sha256:
        found.add(
            "plan", PLAN, "photographs_sha256 is not that of the normals' sha256, category and path"
        )


def check_surplus(
    found: Findings,
    storage: Storage,
    shards: Sequence[ShardRecord],
    normals: Sequence[ShardRecord] = (),
) -> None:
    """Find what is below the root and neither the index nor the builder's commands explain."""
    ours = {INDEX, PLAN}
    ours.update(shard.name for shard in normals)
    for shard in shards:
        ours.add(shard.name)
        ours.add(commit_name(shard.name))
    listed = False
    surplus = []
    try:
        for entry in storage.walk():
            listed = listed or entry.name == INDEX
            if entry.name not in ours and not is_published(entry.name):
                surplus.append(entry)
    except (BuilderError, FileNotFoundError, NotImplementedError):
        listed = False
    if not listed:  # it is there, for it was read: so this is no listing
        found.notes.append("surplus files were not looked for: this storage cannot be listed")
        return
    for name in sorted(set(storage.strangers()) - ours):
        found.add("surplus", name, "neither a plain file nor a folder: a link, a pipe, ...")
    for entry in sorted(surplus):
        size = f" ({entry.bytes} bytes)" if entry.bytes else ""  # a web server does not say
        found.add("surplus", entry.name, f"nothing names this file{size}")


def check_records(
    found: Findings, storage: Storage, shards: Sequence[ShardRecord], plan_sha256: str | None
) -> int:
    """Compare the commit records that are there; how many those are."""
    names = [commit_name(shard.name) for shard in shards]
    count = 0
    for shard, name, data in zip(shards, names, storage.read_many(names), strict=True):
        if data is None:
            continue
        count += 1
        try:
            commit = parse_json(Commit, data, name)
        except BuilderError as error:
            found.add("record", name, error.message.removeprefix(f"{name}: "))
            continue
        if plan_sha256 is not None and commit.plan_sha256 != plan_sha256:
            found.add("record", name, "is of another plan than plan.json")
        if commit.shard != shard:
            found.add("record", name, "is not what dataset.json states of the shard")
    if count < len(names):
        found.notes.append(f"{len(names) - count} of {len(names)} shards have no record")
    return count
