"""The commands: quick help, one line for bad input, the figure."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.shards_by_hand import cut, flip_byte, npy_bytes, write_dataset
from trainer.cli import main

NAN = {0: float("nan")}


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def pretrain(data: Path, out: Path, *more: object) -> Result:
    options = ["--arch", "mobilenet_v2", "--batch-size", 4, "--workers", 0, *more]
    return run("pretrain", "--data", data, "--out", out, "--loss", "indirect", *options)


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; from trainer.cli import main; main(['--help'], standalone_mode=False);"
    code += "sys.exit(bool({'torch', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)))"
    started = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
    assert time.perf_counter() - started < 2  # 0.1 s on an idle machine; others may run beside us


def test_defaults_are_the_papers() -> None:
    text = run("pretrain", "--help").output
    for default in ("[default: wide_resnet50_2]", "[default: 50]", "[default: 64;"):
        assert default in text


@pytest.mark.parametrize("more", [["--epochs", 1, "--steps", 1], ["--steps", 1, "--minutes", 1]])
def test_two_durations_are_a_usage_error(tmp_path: Path, more: list[object]) -> None:
    result = pretrain(tmp_path, tmp_path / "run", *more)
    assert result.exit_code == 2
    assert "give one of --epochs, --steps and --minutes" in result.output


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


@pytest.mark.parametrize("loss", ["direct", "indirect"])
def test_show_draws_figure_5(tmp_path: Path, loss: str) -> None:
    write_dataset(tmp_path / "data", size_px=32)
    result = pretrain(tmp_path / "data", tmp_path / "run", "--steps", 2, "--loss", loss)
    assert result.exit_code == 0, result.output
    assert "2 steps x 4 = 8 samples" in result.output
    (tmp_path / "data").rename(tmp_path / "moved")
    result = run("show", tmp_path / "run")
    assert result.exit_code == 1
    assert "data: no such folder" in result.output
    result = run("show", tmp_path / "run", "--data", tmp_path / "moved")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "run" / "figure5.png") as image:
        assert image.width > 500


def test_show_of_another_folder_is_one_line(tmp_path: Path) -> None:
    result = run("show", tmp_path)
    assert result.exit_code == 1
    assert "holds no run.json; expected a folder of `trainer pretrain`" in result.output
