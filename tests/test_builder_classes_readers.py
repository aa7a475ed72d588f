"""Labelled datasets of `builder classes`, loaded by webdataset and by Hugging Face's library."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset

from builder.images import decode_pixels
from tests.class_folders import built, members, write_folder

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    built(write_folder(folder / "parts"), folder / "out")
    return folder / "out"


def expected(folder: Path) -> list[tuple[str, np.ndarray, int, dict]]:
    """Key, pixels, label and provenance of each sample, by tarfile and json."""
    found = members(folder)
    return [
        (
            f"{i:09d}",
            decode_pixels(found[f"{i:09d}.webp"], 3),
            ["bad", "good"].index(json.loads(found[f"{i:09d}.json"])["category"]),
            json.loads(found[f"{i:09d}.json"]),
        )
        for i in range(7)
    ]


def check(found: list[tuple[str, object, object, dict]], folder: Path) -> None:
    right = expected(folder)
    assert [one[0] for one in found] == [one[0] for one in right]
    for (_, image, label, about), (_, pixels, right_label, right_about) in zip(
        found, right, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert (type(label), label) == (int, right_label)
        assert about == right_about


# webdataset leaves its files to the garbage collector
@pytest.mark.filterwarnings("ignore:.*train-0000:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_gives_images_and_integer_labels(labelled: Path):
    url = str(labelled / "data/train-{00000..00001}-of-00002.tar")
    pipeline = webdataset.WebDataset(url, shardshuffle=False).decode("pil")
    found = [(one["__key__"], one["webp"], one["cls"], one["json"]) for one in pipeline]
    check(found, labelled)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """`datasets.load_dataset`, offline, with its caches in the test's folder."""
    cache = str(tmp_path_factory.mktemp("cache"))
    before = dict(os.environ)
    os.environ.update(OFFLINE | {"HF_HOME": cache, "HF_DATASETS_CACHE": cache})
    import datasets  # reads the environment once

    def run(*words: str, **options):
        return datasets.load_dataset(*words, split="train", cache_dir=cache, **options)

    yield run
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_library_gives_images_and_integer_labels(labelled: Path, load, streaming: bool):
    files = {"train": str(labelled / "data/train-*.tar")}
    found = load("webdataset", data_files=files, streaming=streaming)
    check([(one["__key__"], one["webp"], one["cls"], one["json"]) for one in found], labelled)


def test_hub_library_finds_the_shards_of_the_folder(labelled: Path, load):
    found = load(str(labelled))
    check([(one["__key__"], one["webp"], one["cls"], one["json"]) for one in found], labelled)
