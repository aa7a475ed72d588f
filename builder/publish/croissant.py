"""croissant.json: MLCommons Croissant 1.1 with provenance (PROV-O) and responsible-AI fields."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

from builder.index import ShardRecord
from builder.publish import PARAMETERS
from builder.publish.facts import METHOD, Facts
from builder.publish.licence import UNKNOWN

MAX_LISTED_SHARDS = 2000  # beyond, readers take long over the file: a glob stands for them
MEDIA_TYPE = {"webp": "image/webp", "png": "image/png", "jpg": "image/jpeg"}

_TERMS = (
    *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field"),
    *("fileProperty", "fileObject", "fileSet", "format", "includes", "isArray", "isLiveDataset"),
    *("jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
# The context of the Croissant 1.1 specification, then the vocabularies that we use beside it.
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{name: f"cr:{name}" for name in _TERMS},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}


def croissant(facts: Facts) -> bytes:
    """The JSON-LD document."""
    options = facts.options
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": [
            "http://mlcommons.org/croissant/1.1",
            "http://mlcommons.org/croissant/RAI/1.0",
        ],
        "name": facts.title,
        "description": facts.description,
        "version": options.version,
        "keywords": ["anomaly detection", "pre-training", "synthetic", "surface inspection"],
        "creator": [{"@type": "sc:Organization", "name": name} for name in facts.authors],
        "citeAs": METHOD,
        "isLiveDataset": False,
    }
    if facts.licence != UNKNOWN:
        document["license"] = facts.licence.url
    if facts.url:
        document["url"] = facts.url
    if options.date:
        document["datePublished"] = options.date
    document |= _provenance(facts) | _responsible(facts)
    document["distribution"] = _distribution(facts)
    document["recordSet"] = _record_sets(facts)
    return json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"


def _provenance(facts: Facts) -> dict[str, Any]:
    dataset, source = facts.dataset, facts.dataset.normals.source
    web = re.fullmatch(r"https?://[^\s<>\"{}|\\^`]+", source.homepage)
    origin: dict[str, Any] = {
        "@type": "prov:Entity",
        "@id": source.homepage if web else f"urn:semiformula:source:{quote(source.name)}",
        "name": source.name,
        "description": source.citation or f"Normal photographs of {source.name}.",
        "license": sorted(facts.licences),
    }
    return {
        "prov:wasDerivedFrom": [origin],
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "name": "painting of synthetic defects",
            "description": (
                f"Recipe {dataset.recipe.name}, seed {dataset.recipe.seed}, recipe SHA-256 "
                f"{dataset.recipe_sha256}; the result's content_sha256 is {dataset.content_sha256}."
            ),
            "prov:used": [{"@id": origin["@id"]}],
            "prov:wasAssociatedWith": {
                "@type": "prov:SoftwareAgent",
                "name": f"semiformula builder {dataset.builder_version}",
            },
        },
    }


def _responsible(facts: Facts) -> dict[str, Any]:
    visible = facts.statistics.visibility
    size = facts.dataset.image.size_px
    return {
        "rai:dataCollection": (
            f"Normal photographs of {facts.dataset.normals.source.name}; defects drawn by a "
            "pseudo-random generator from the prior in dataset.json and painted on them."
        ),
        "rai:dataCollectionType": ["Software Collection", "Secondary Data Analysis"],
        "rai:dataCollectionRawData": (
            "The photographs, whose paths and SHA-256 stand in the normals' shards."
        ),
        "rai:dataPreprocessingProtocol": [
            f"Photographs were turned upright, converted to 8 bit and resized to {size} x {size} "
            "pixels (Lanczos, aspect not kept)."
        ],
        "rai:dataManipulationProtocol": "A mixture of Gaussians is painted over each photograph.",
        "rai:dataAnnotationProtocol": [
            "The label is the parameter vector that the image was painted from; nobody annotated."
        ],
        "rai:machineAnnotationTools": [f"semiformula {facts.dataset.builder_version}"],
        "rai:annotationsPerItem": "1",
        "rai:dataUseCases": ["Pre-training of networks for surface anomaly detection."],
        "rai:dataLimitations": [
            "Mixtures of Gaussians stand for no product's defects: no sharp edges, no texture.",
            f"{visible.below_count} of {visible.samples} random samples change no pixel by "
            f"{visible.below_levels} grey levels or more.",
        ],
        "rai:dataBiases": [
            "Backgrounds are those of few kinds of product: "
            + ", ".join(f"{name} ({count})" for name, count in sorted(facts.categories.items()))
        ],
        "rai:dataSocialImpact": "None is known beyond that of automated inspection.",
        "rai:personalSensitiveInformation": [
            "None in the defects; nothing is recorded of people in the normal photographs."
        ],
        "rai:dataReleaseMaintenancePlan": (
            f"Version {facts.options.version}; a change of any byte is another version, with "
            "another content_sha256."
        ),
        "rai:hasSyntheticData": True,
    }


def _distribution(facts: Facts) -> list[dict[str, Any]]:
    dataset = facts.dataset
    normals = [_tar(shard) for shard in dataset.normals.shards]
    files = [*_shards(facts), *normals]
    if facts.images:
        files.append(
            _file_set("images", dataset.image.suffix, [shard["@id"] for shard in _shards(facts)])
        )
    files.append(
        _file_set("normal-images", dataset.normals.suffix, [shard["@id"] for shard in normals])
    )
    files.append(_file(facts, PARAMETERS, "application/x-parquet"))
    return files


def _shards(facts: Facts) -> list[dict[str, Any]]:
    shards = facts.dataset.shards
    if len(shards) <= MAX_LISTED_SHARDS:
        return [_tar(shard) for shard in shards]
    kind = shards[0].name.split("-", 1)[0]
    return [
        {
            "@type": "cr:FileSet",
            "@id": "data-shards",
            "name": "data-shards",
            "description": f"{len(shards)} tars; SHA256SUMS and dataset.json hold their hashes.",
            "encodingFormat": "application/x-tar",
            "includes": f"{kind}-*.tar",
        }
    ]


def _tar(shard: ShardRecord) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": shard.name,
        "name": shard.name,
        "contentUrl": shard.name,
        "contentSize": f"{shard.bytes} B",
        "encodingFormat": "application/x-tar",
        "sha256": shard.sha256,
    }


def _file(facts: Facts, name: str, encoding: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{facts.sizes[name]} B",
        "encodingFormat": encoding,
        "sha256": facts.sha256[name],
    }


def _file_set(name: str, suffix: str, tars: list[str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "containedIn": [{"@id": tar} for tar in tars],
        "encodingFormat": MEDIA_TYPE[suffix],
        "includes": f"*.{suffix}",
    }


def _record_sets(facts: Facts) -> list[dict[str, Any]]:
    table = {"fileObject": {"@id": PARAMETERS}}
    columns = {
        "index": ("cr:Int64", "The sample's index; its key is this number in nine digits."),
        "shard": ("sc:Text", "The tar of data/ that holds the sample."),
        "normal": ("sc:Text", "The key of the normal image that the sample is painted on."),
        "category": ("sc:Text", "The category of the normal image."),
    }
    fields = [
        _field(f"parameters/{name}", kind, about, {**table, "extract": {"column": name}})
        for name, (kind, about) in columns.items()
    ]
    vector = _field(
        "parameters/theta",
        "cr:Float32",
        f"{facts.dataset.theta.components} components of v, mu_x, mu_y, sigma_x, sigma_y, rho, pi; "
        "last the strength s.",
        {**table, "extract": {"column": "theta"}},
    )
    fields.append({**vector, "isArray": True, "arrayShape": str(facts.dataset.theta.length)})
    parameters = {
        "@type": "cr:RecordSet",
        "@id": "parameters",
        "name": "parameters",
        "description": "The label of every sample.",
        "key": {"@id": "parameters/index"},
        "field": fields,
    }
    sets = [parameters]
    if facts.images:
        sets.append(_pictures("samples", "images", "The painted images."))
    sets.append(_pictures("normals", "normal-images", "The images that were painted on."))
    return sets


def _pictures(name: str, file_set: str, about: str) -> dict[str, Any]:
    source = {"fileSet": {"@id": file_set}}
    key = {
        **source,
        "extract": {"fileProperty": "filename"},
        "transform": {"regex": r"^(\d{9})\."},
    }
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": about,
        "key": {"@id": f"{name}/key"},
        "field": [
            _field(f"{name}/key", "sc:Text", "The nine-digit key.", key),
            _field(
                f"{name}/image",
                "sc:ImageObject",
                about,
                {**source, "extract": {"fileProperty": "content"}},
            ),
        ],
    }


def _field(name: str, kind: str, about: str, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": name,
        "name": name,
        "description": about,
        "dataType": kind,
        "source": source,
    }
