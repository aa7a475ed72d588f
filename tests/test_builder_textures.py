"""Procedural textures: the same from the same numbers, kept where they are, painted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from builder.cli import main
from builder.demo import make_demo_data
from builder.errors import BuilderError
from builder.textures import FAMILIES, make_textures, texture


@pytest.mark.parametrize("number", range(len(FAMILIES)))
def test_texture_is_a_function_of_seed_and_number(number: int) -> None:
    one = texture(number, size_px=48, seed=0)
    assert one.shape == (48, 48, 3)
    assert one.dtype == np.uint8
    assert (one == texture(number, size_px=48, seed=0)).all()
    assert (one != texture(number, size_px=48, seed=1)).any()
    assert (one != texture(number + len(FAMILIES), size_px=48, seed=0)).any()


def test_textures_have_texture() -> None:
    spread = [texture(number, size_px=64, seed=0).std(axis=(0, 1)).max() for number in range(60)]
    assert np.median(spread) > 10
    assert min(spread) > 1


def test_interrupted_textures_are_finished_and_the_same(tmp_path: Path) -> None:
    make_textures(tmp_path / "a", count=9, size_px=32, jobs=1)
    make_textures(tmp_path / "b", count=4, size_px=32, jobs=1)
    said = make_textures(tmp_path / "b", count=9, size_px=32, jobs=1)
    assert "5 drawn" in said
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 11  # and licence and record
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_textures_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    make_textures(tmp_path / "a", count=17, size_px=32, jobs=1)
    make_textures(tmp_path / "b", count=17, size_px=32, jobs=2)
    for path in (tmp_path / "a").rglob("*.png"):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "holds textures of seed 0 and 32 px, asked for seed 1 and 32 px"),
        ({"size_px": 48}, "holds textures of seed 0 and 32 px, asked for seed 0 and 48 px"),
        ({"count": 3}, "holds 2 textures beyond --count 3"),
    ],
)
def test_textures_of_another_set_are_not_mixed(tmp_path: Path, change, said: str) -> None:
    make_textures(tmp_path, count=5, size_px=32, jobs=1)
    with pytest.raises(BuilderError, match=said):
        make_textures(tmp_path, **{"count": 5, "size_px": 32, "jobs": 1, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "textures: count must lie in [1, 1000000], found 0"),
        ({"size_px": 8}, "textures: size must lie in [16, 4096], found 8"),
        ({"seed": -1}, "textures: seed must lie in [0, 9223372036854775807], found -1"),
    ],
)
def test_textures_out_of_range_are_refused(tmp_path: Path, change, said: str) -> None:
    with pytest.raises(BuilderError) as caught:
        make_textures(tmp_path / "a", **{"count": 1, **change})
    assert caught.value.message == said
    assert not (tmp_path / "a").exists()


def test_command_draws_what_a_dataset_is_built_on(tmp_path: Path) -> None:
    words = ["textures", str(tmp_path / "textures"), "--count", "6", "--size", "32"]
    drawn = CliRunner().invoke(main, [*words, "--jobs", "1"])
    assert drawn.exit_code == 0, drawn.output
    with Image.open(tmp_path / "textures" / "weave" / "000000.png") as picture:
        assert picture.size == (32, 32)
    words = ["build", "demo", "--normals", str(tmp_path / "textures"), "--samples", "4"]
    built = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "data"), "--jobs", "1"])
    assert built.exit_code == 0, built.output


def test_textures_are_none_of_the_products(tmp_path: Path) -> None:
    # What is evaluated stays unseen: no texture is nearly equal to a normal part.
    make_demo_data(tmp_path, train=2, good=0, per_defect=0, size_px=48, jobs=1)
    parts = [np.asarray(Image.open(path), float) for path in tmp_path.rglob("train/good/*.png")]
    drawn = [texture(number, size_px=48, seed=0).astype(float) for number in range(60)]
    assert len(parts) == 6
    assert min(np.abs(a - b).mean() for a in parts for b in drawn) > 8


def test_folder_of_other_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metal").mkdir()
    (tmp_path / "metal" / "img_a.png").touch()
    with pytest.raises(BuilderError, match=r"is not empty and holds no textures\.json"):
        make_textures(tmp_path, count=4, size_px=32, jobs=1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["img_a.png", "metal"]
