"""Labelled datasets from a bucket into a bucket, and trained on from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.class_folders import built, call, tree, write_folder
from tests.s3_service import Service, fresh_bucket, put_folder, running_service, s3fs
from trainer.cli import main as trainer_main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("service")]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as found:
        yield found


@pytest.fixture
def bucket() -> Iterator[str]:
    with fresh_bucket() as url:
        yield url


def test_labelled_dataset_lives_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "parts")
    put_folder(folder, f"{bucket}/parts")
    words = ["classes", f"{bucket}/parts", "--out", f"{bucket}/data", "--licence", "CC0-1.0"]
    words += ["--size", "16", "--samples-per-shard", "4", "--jobs", "1"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    built(folder, tmp_path / "local")
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.get(f"{bucket}/data".removeprefix("s3://"), str(tmp_path / "copy"), recursive=True)
    assert tree(tmp_path / "copy") == tree(tmp_path / "local")
    result = call(*words)
    assert "shards: 0 built, 2 verified as they stood" in result.output, result.output
    result = call("verify", f"{bucket}/data", "--jobs", "1")
    assert result.exit_code == 0, result.output

    run = ["pretrain", "--task", "classify", "--data", f"{bucket}/data", "--arch", "resnet18"]
    run += ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--workers", "0"]
    # At 16 px batch norm would work on three values, and a gradient may not be finite.
    run += ["--size", "64", "--precision", "fp32"]
    run += ["--batch-size", "3", "--steps", "2", "--device", "cpu", "--holdout", "1"]
    trained = CliRunner().invoke(trainer_main, run)
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "run/backbone.json").is_file()
