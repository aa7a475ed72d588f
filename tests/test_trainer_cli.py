"""The commands: quick help, one line for bad input, the figure."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from tests.shards_by_hand import cut, flip_byte, npy_bytes, write_dataset
from trainer.cache import DEFAULT_SHARE_OF_FREE
from trainer.choices import Arch
from trainer.cli import interruptible, main
from trainer.errors import TrainerError
from trainer.models import ARCHITECTURES

NAN = {0: float("nan")}


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def pretrain(data: Path, out: Path, *more: object) -> Result:
    options = ["--arch", "mobilenet_v2", "--batch-size", 4, "--workers", 0, *more]
    return run("pretrain", "--data", data, "--out", out, "--loss", "indirect", *options)


def test_defaults_are_the_papers() -> None:
    text = run("pretrain", "--help").output
    for default in ("[default: wide_resnet50_2]", "[default: 50]", "[default: 64;"):
        assert default in text


@pytest.mark.parametrize("more", [["--epochs", 1, "--steps", 1], ["--steps", 1, "--minutes", 1]])
def test_two_durations_are_a_usage_error(tmp_path: Path, more: list[object]) -> None:
    result = pretrain(tmp_path, tmp_path / "run", *more)
    assert result.exit_code == 2
    assert "give one of --epochs, --steps and --minutes" in result.output


@pytest.mark.parametrize("words", [["", "run"], ["data", " "]])
def test_empty_place_is_a_usage_error(words: list[str]) -> None:
    data, out = words
    result = run("pretrain", "--data", data, "--out", out, "--loss", "direct")
    assert result.exit_code == 2
    assert "is empty; give a folder or a URL" in result.output


def test_default_of_the_cache_is_the_one_told() -> None:
    share = f"[default: {DEFAULT_SHARE_OF_FREE:.0%}".replace("%", " %")
    assert share in run("pretrain", "--help").output


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *product(["--epochs", "--minutes", "--lr"], ["nan", "inf", "1e308", "0", "-1"]),
        *product(["--max-bad-ratio"], ["nan", "inf", "1.1", "-0.1"]),
    ],
)
def test_number_out_of_range_is_a_usage_error(tmp_path: Path, option: str, value: str) -> None:
    result = pretrain(tmp_path, tmp_path / "run", option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


def test_offered_architectures_are_the_known_ones() -> None:
    assert set(get_args(Arch)) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("allocate", "reason"),
    [
        (lambda: torch.empty(2**50), "DefaultCPUAllocator: can't allocate memory"),
        (lambda: np.empty(2**55), "Unable to allocate 256. PiB"),
        (lambda: bytearray(2**60), "MemoryError"),
    ],
)
def test_memory_that_does_not_suffice_is_one_line(
    allocate: Callable[[], object], reason: str
) -> None:
    with pytest.raises(TrainerError) as error, interruptible():
        allocate()
    assert error.value.message.startswith("out of memory (")
    assert reason in error.value.message
    assert error.value.message.endswith("; use a smaller --batch-size in a new --out")


def nan_theta(member: str, data: bytes) -> bytes:
    if member != "000000007.theta.npy":
        return data
    theta = np.load(io.BytesIO(data)).copy()
    theta[2] = np.nan
    return npy_bytes(theta)


def damaged(folder: Path, what: str) -> Path:
    data = folder / "data"
    if what != "no folder":
        write_dataset(data, edit=nan_theta if what == "theta with nan" else None)
    shard = data / "data/train-00001-of-00003.tar"
    if what == "cut shard":
        cut(shard, 1536)
    elif what == "flipped byte":
        flip_byte(shard, 600)
    elif what == "empty folder":
        data = folder / "empty"
        data.mkdir()
    return data


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("no folder", "no such folder; --data wants one written by `builder build`"),
        ("empty folder", "holds no dataset.json"),
        ("cut shard", "train-00001-of-00003.tar: 1536 bytes, dataset.json says"),
        ("flipped byte", "train-00001-of-00003.tar: SHA-256 differs from dataset.json"),
        ("theta with nan", "train-00001-of-00003.tar: 000000007: theta breaks the rule that every"),
    ],
)
def test_bad_dataset_is_one_line(tmp_path: Path, what: str, expected: str) -> None:
    result = pretrain(damaged(tmp_path, what), tmp_path / "run", "--steps", 1)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert expected in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(("loss", "holdout"), [("direct", 0), ("indirect", 1)])
def test_show_draws_figure_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, holdout: int
) -> None:
    write_dataset(tmp_path / "data", size_px=32)
    monkeypatch.chdir(tmp_path)
    more = ["--steps", 2, "--loss", loss, "--holdout", holdout]
    result = pretrain(Path("data"), Path("run"), *more)
    assert result.exit_code == 0, result.output
    assert "2 steps of 4, 8 samples" in result.output
    monkeypatch.chdir("/")  # the data's path in run.json holds from everywhere
    # Sample 9, the one held out, lies in the last shard: the others need not be read.
    flip_byte(tmp_path / "data/data/train-00001-of-00003.tar", 600)
    result = run("show", tmp_path / "run")
    if holdout == 0:
        assert "train-00001-of-00003.tar: SHA-256 differs" in result.output
        flip_byte(tmp_path / "data/data/train-00001-of-00003.tar", 600)
        result = run("show", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert ("training samples, error" if holdout == 0 else "held-out samples, error") in (
        result.output
    )
    with Image.open(tmp_path / "run" / "figure5.png") as image:
        rows = 6 if holdout == 0 else 1
        assert image.width > 500
        assert image.height == rows * 224 + (rows - 1) * 6 + 76  # cells, gaps, title and margin


def test_show_finds_moved_data(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", size_px=32)
    assert pretrain(tmp_path / "data", tmp_path / "run", "--steps", 1).exit_code == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    result = run("show", tmp_path / "run")
    assert result.exit_code == 1
    assert "data: no such folder" in result.output
    data = f"file://{tmp_path}/moved"
    result = run("show", f"file://{tmp_path}/run", "--data", data)
    assert result.output.startswith(f"{tmp_path}/run/figure5.png: ")
    assert result.exit_code == 0, result.output


def test_show_wants_a_png(tmp_path: Path) -> None:
    result = run("show", tmp_path, "--out", "figure.foo")
    assert result.exit_code == 2
    assert "--out figure.foo: the figure is a PNG, give a name that ends in .png" in result.output


def test_show_of_another_folder_is_one_line(tmp_path: Path) -> None:
    result = run("show", tmp_path)
    assert result.exit_code == 1
    assert "holds no run.json; expected a folder of `trainer pretrain`" in result.output
