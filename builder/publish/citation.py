"""CITATION.cff of a dataset."""

from __future__ import annotations

from builder.publish.facts import Facts, quoted
from builder.publish.licence import UNKNOWN

_METHOD_TITLE = (
    "Anomaly Detection Based on Semi-Formula Driven Pre-training Dataset to Represent Subtle "
    "Difference and Anomaly Score"
)
_METHOD_AUTHORS = (
    ("Hiroki", "Kobayashi"),
    ("Naoki", "Murakami"),
    ("Naoto", "Hiramatsu"),
    ("Takahiro", "Suzuki"),
    ("Manabu", "Hashimoto"),
)


def citation(facts: Facts) -> str:
    """How to cite the dataset, with the method's paper as a reference."""
    options, dataset = facts.options, facts.dataset
    lines = [
        "cff-version: 1.2.0",
        'message: "If you use this dataset, please cite it and the sources of its photographs."',
        "type: dataset",
        f"title: {quoted(facts.title)}",
        f"abstract: {quoted(facts.description)}",
        f"version: {quoted(options.version)}",
    ]
    if options.date:
        lines.append(f"date-released: {options.date}")
    if facts.licence != UNKNOWN:
        lines.append(f"license: {facts.licence.spdx}")
    if facts.url:
        lines.append(f"url: {quoted(facts.url)}")
    lines += ["authors:", *(f"  - name: {quoted(name)}" for name in facts.authors)]
    lines += [
        "identifiers:",
        "  - type: other",
        f"    value: {quoted(f'content_sha256:{dataset.content_sha256}')}",
        '    description: "SHA-256 over the hashes of all shards"',
        "references:",
        "  - type: conference-paper",
        f"    title: {quoted(_METHOD_TITLE)}",
        "    authors:",
        *(f"      - {{given-names: {g}, family-names: {f}}}" for g, f in _METHOD_AUTHORS),
    ]
    source = dataset.normals.source
    if source.citation or source.homepage:
        lines += [
            "  - type: data",
            f"    title: {quoted(source.name)}",
            "    authors:",
            f"      - name: {quoted(f'The authors of {source.name}')}",
        ]
        lines += [f"    url: {quoted(source.homepage)}"] if source.homepage else []
        lines += [f"    notes: {quoted(source.citation)}"] if source.citation else []
    return "\n".join(lines) + "\n"
