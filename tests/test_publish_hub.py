"""The published dataset, loaded by the Hugging Face datasets library and by webdataset."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset

from builder.dataset import read_index, read_parameters
from builder.images import decode_pixels
from builder.shards import read_samples
from builder.storage import Folder
from tests.publishing import built, published_copy

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


@pytest.fixture(scope="module")
def published(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_copy(dataset, tmp_path_factory.mktemp("hub") / "small")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """`datasets.load_dataset`, offline, with its caches in the test's folder."""
    cache = str(tmp_path_factory.mktemp("cache"))
    before = dict(os.environ)
    os.environ.update(OFFLINE | {"HF_HOME": cache, "HF_DATASETS_CACHE": cache})
    import datasets  # reads the environment once

    def run(path: Path, *config: str, **options):
        return datasets.load_dataset(str(path), *config, split="train", cache_dir=cache, **options)

    yield run
    os.environ.clear()
    os.environ.update(before)


def stored(folder: Path):
    storage = Folder(folder)
    index = read_index(storage)
    samples = [pair for shard in index.shards for pair in read_samples(storage, shard.name)]
    theta = [read_parameters(storage, index, i)[1] for i in range(len(index.shards))]
    return index, samples, np.concatenate(theta)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_library_loads_images_vectors_and_counts(published, load, streaming):
    _, samples, theta = stored(published)
    found = list(load(published, streaming=streaming))
    assert [one["__key__"] for one in found] == [f"{i:09d}" for i in range(20)]
    np.testing.assert_array_equal(np.array([one["theta.npy"] for one in found], np.float32), theta)
    for one, (_, members) in zip(found, samples, strict=True):
        assert np.array_equal(np.asarray(one["webp"]), decode_pixels(members["webp"], 3))
    assert found[7]["json"].keys() == {"index", "normal", "category"}
    assert found[7]["json"]["index"] == 7


def test_hub_library_finds_the_declared_features(published, load):
    data = load(published)
    assert data.features["theta.npy"].length == 271
    assert data.features["theta.npy"].feature.dtype == "float32"
    assert data.features["json"]["normal"].dtype == "string"
    assert load(published, streaming=True).info.splits["train"].num_examples == 20


def test_hub_library_loads_the_normals(published, load):
    found = list(load(published, "normals"))
    assert [one["json"]["category"] for one in found] == ["steel"] * 3 + ["wood"] * 3
    assert found[0]["json"]["licence"] == "CC0-1.0"
    assert found[0]["webp"].size == (32, 32)


def test_hub_library_notices_a_missing_shard(dataset, load, tmp_path):
    from datasets.exceptions import NonMatchingSplitsSizesError

    short = published_copy(dataset, tmp_path / "short")
    (short / "data" / "train-00003-of-00004.tar").unlink()
    with pytest.raises(NonMatchingSplitsSizesError, match="num_examples=20"):
        load(short)


def test_hub_library_loads_a_dataset_without_images(parameters, load):
    found = load(parameters)
    _, _, theta = stored(parameters)
    assert found.num_rows == 20
    np.testing.assert_array_equal(np.array(found["theta"][:], np.float32), theta)


@pytest.fixture(scope="module")
def parameters(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parameters")
    bare = built(photographs, folder / "bare", "--images", "none", "--licence", "CC0-1.0")
    return published_copy(bare, folder / "published")


# webdataset leaves its files to the garbage collector
@pytest.mark.filterwarnings("ignore:.*train-0000:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_the_card_s_brace_expansion(published):
    card = (published / "README.md").read_text("utf-8")
    url = re.search(r'WebDataset\("([^"]+)"', card).group(1)
    assert url == "data/train-{00000..00003}-of-00004.tar"
    pipeline = webdataset.WebDataset(str(published / url), shardshuffle=False).decode("rgb8")
    found = list(pipeline)
    assert len(found) == 20
    assert found[3]["webp"].shape == (32, 32, 3)
    assert found[3]["theta.npy"].shape == (271,)
