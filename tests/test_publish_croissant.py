"""croissant.json, validated and read by mlcroissant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from builder.images import decode_pixels
from tests.publishing import published_copy
from tests.test_publish_hub import stored

READER = """
import json, sys
import mlcroissant, numpy

data = mlcroissant.Dataset(jsonld="croissant.json")
out = {"warnings": sorted(data.metadata.issues.warnings), "counts": {}}
for name in sys.argv[1:]:
    records = list(data.records(name))
    out["counts"][name] = len(records)
    if name == "parameters":
        out["theta"] = [[float(x) for x in one["parameters/theta"]] for one in records]
        out["normal"] = [one["parameters/normal"].decode() for one in records]
    if name == "samples":
        out["pixels"] = {
            one["samples/key"].decode(): numpy.asarray(one["samples/image"]).tolist()
            for one in records
        }
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def published(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_copy(dataset, tmp_path_factory.mktemp("croissant") / "small")


def in_a_process(folder: Path, cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the dataset's folder, mlcroissant's cache elsewhere."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"CROISSANT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_croissant_validates_without_a_warning(published, tmp_path):
    code = "from mlcroissant.scripts.validate import main; from absl import app; app.run(main)"
    run = in_a_process(published, tmp_path, "-c", code, "--jsonld", "croissant.json")
    assert run.returncode == 0, run.stderr
    assert "Done" in run.stderr
    assert "WARNING" not in run.stderr


def test_croissant_records_are_the_stored_samples(published, tmp_path):
    run = in_a_process(published, tmp_path, "-c", READER, "parameters", "samples", "normals")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    _, samples, theta = stored(published)
    assert found["warnings"] == []
    assert found["counts"] == {"parameters": 20, "samples": 20, "normals": 6}
    np.testing.assert_array_equal(np.array(found["theta"], np.float32), theta)
    normals = [json.loads(members["json"])["normal"] for _, members in samples]
    assert found["normal"] == normals
    for key, members in samples:
        assert np.array_equal(found["pixels"][key], decode_pixels(members["webp"], 3))


def test_croissant_states_provenance_and_hashes(published):
    stated = json.loads((published / "croissant.json").read_text("utf-8"))
    index, _, _ = stored(published)
    assert stated["conformsTo"][0] == "http://mlcommons.org/croissant/1.1"
    assert stated["license"] == "https://creativecommons.org/publicdomain/zero/1.0/"
    assert stated["datePublished"] == "2026-05-31"
    assert index.content_sha256 in stated["prov:wasGeneratedBy"]["description"]
    assert stated["prov:wasDerivedFrom"][0]["name"] == index.normals.source.name
    hashes = {one["@id"]: one.get("sha256") for one in stated["distribution"]}
    assert hashes["data/train-00002-of-00004.tar"] == index.shards[2].sha256
    assert sum(key.startswith("rai:") for key in stated) >= 12


def test_file_sets_name_their_own_tars(published):
    stated = json.loads((published / "croissant.json").read_text("utf-8"))
    sets = {one["@id"]: one for one in stated["distribution"] if one["@type"] == "cr:FileSet"}
    assert [tar["@id"] for tar in sets["images"]["containedIn"]] == [
        f"data/train-0000{i}-of-00004.tar" for i in range(4)
    ]
    assert [tar["@id"] for tar in sets["normal-images"]["containedIn"]] == [
        "normals/normals-00000-of-00001.tar"
    ]
