"""README.md: the dataset card of the Hugging Face hub, and a README anywhere else."""

from __future__ import annotations

from builder.publish import PARAMETERS
from builder.publish.facts import Facts, quoted
from builder.publish.licence import hub_licence
from builder.publish.wording import fill, words

_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)


def card(facts: Facts) -> str:
    """The card: YAML that loaders read and verify, then the text for people."""
    said = words(facts)
    load = fill("load_images.md" if facts.images else "load_parameters.md", said)
    return f"---\n{front_matter(facts)}---\n\n" + fill("card.md", {**said, "load": load.rstrip()})


def front_matter(facts: Facts) -> str:
    """The YAML: licence, tags, one config for the data and one for the normals, with counts.

    A config's features and counts are declared so that the loader infers no type from the first
    samples, and itself verifies how many there are.
    """
    lines = [f"{key}: {quoted(value)}" for key, value in hub_licence(facts.licence)]
    loader = "webdataset" if facts.images else "parquet"
    tags = (loader, "image", "synthetic", "anomaly-detection", "pre-training", "croissant")
    lines += [
        f"pretty_name: {quoted(facts.title)}",
        "task_categories:",
        "- image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "size_categories:",
        f"- {next((n for limit, n in _SIZES if facts.dataset.samples < limit), '1B<n<10B')}",
    ]
    configs = _configs(facts)
    lines.append("configs:")
    for name, path, *_ in configs:
        lines += [
            f"- config_name: {name}",
            "  data_files:",
            "  - split: train",
            f"    path: {path}",
        ]
    lines.append("dataset_info:")
    for name, _, features, count, size in configs:
        lines += [f"- config_name: {name}", "  features:"]
        lines += [f"  {line}" for line in features]
        lines += ["  splits:", "  - name: train"]
        lines += [f"    num_bytes: {size}", f"    num_examples: {count}"]
        lines += [f"  download_size: {size}", f"  dataset_size: {size}"]
    return "\n".join(lines) + "\n"


def _configs(facts: Facts) -> list[tuple[str, str, list[str], int, int]]:
    """(name, glob, features, examples, bytes); all of one kind of file, as the loader demands."""
    dataset = facts.dataset
    vector = ["  sequence: float32", f"  length: {dataset.theta.length}"]
    if not facts.images:
        features = _scalars(index="int64", shard="string", normal="string", category="string")
        features += ["- name: theta", *vector]
        return [("default", PARAMETERS, features, dataset.samples, facts.sizes[PARAMETERS])]
    keys = _scalars(__key__="string", __url__="string")
    data = [f"- name: {dataset.image.suffix}", "  dtype: image", "- name: theta.npy", *vector]
    data += [*_struct(index="int64", normal="string", category="string"), *keys]
    told = _struct(
        index="int64", category="string", path="string", sha256="string", licence="string"
    )
    normals = [f"- name: {dataset.normals.suffix}", "  dtype: image", *told, *keys]
    return [
        ("default", "data/train-*.tar", data, dataset.samples, facts.data_bytes),
        ("normals", "normals/normals-*.tar", normals, dataset.normals.count, facts.normals_bytes),
    ]


def _scalars(**fields: str) -> list[str]:
    pairs = ((f"- name: {name}", f"  dtype: {kind}") for name, kind in fields.items())
    return [line for pair in pairs for line in pair]


def _struct(**fields: str) -> list[str]:
    return ["- name: json", "  struct:", *(f"  {line}" for line in _scalars(**fields))]
