"""`builder verify` on labelled datasets: made by hand, damaged, forged."""

import json
import shutil
from pathlib import Path

import pytest

from builder.classes.index import ClassSet
from tests.class_folders import built, call, write_folder
from tests.classes_by_hand import write_class_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "parts")


def test_files_made_by_hand_are_those_of_the_page(tmp_path: Path):
    write_class_set(tmp_path)
    ClassSet.model_validate_json((tmp_path / "dataset.json").read_bytes())
    result = call("verify", tmp_path, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert "no plan.json" in result.output


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("000000001.cls", b"2", "label: {shard} 000000001: cls is no number below 2"),
        ("000000001.cls", b"-1", "label: {shard} 000000001: cls is no number below 2"),
        ("000000001.cls", b"01", "label: {shard} 000000001: cls is no number below 2"),
        ("000000001.cls", "１".encode(), "label: {shard} 000000001: cls is no number below 2"),
        ("000000001.cls", b"\xff", "label: {shard} 000000001: cls is no number below 2"),
        ("000000001.cls", b"", "label: {shard} 000000001: cls is no number below 2"),
        ("000000001.cls", b"1" * 10, "tar: {shard} 000000001: 000000001.cls: 10 bytes, at most 9"),
        (
            "000000001.cls",
            b"0",
            "label: {shard} 000000001: cls 0 is 'dark', json says 'light'",
        ),
        ("000000001.json", b"[]", "label: {shard} 000000001: cls 1 is 'light', json says None"),
        ("000000002.webp", b"no image", "image: {shard} 000000002: not a WebP"),
    ],
)  # fmt: skip
def test_wrong_member_is_found_by_verify(name: str, data: bytes, message: str, tmp_path: Path):
    write_class_set(tmp_path, edit=lambda member, x: data if member == name else x)
    result = call("verify", tmp_path, "--jobs", 1)
    assert result.exit_code == 1
    assert message.format(shard="data/train-00000-of-00003.tar") in result.output
    assert "Traceback" not in result.output


def test_damage_is_found_by_verify(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    built(folder, out)
    with (out / "data/train-00000-of-00002.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"x")
    (out / "data/train-00001-of-00002.tar").unlink()
    (out / "more.txt").write_text("")
    result = call("verify", out, "--jobs", 1)
    assert result.exit_code == 1
    assert "sha256: data/train-00000-of-00002.tar: SHA-256 expected" in result.output
    assert "missing: data/train-00001-of-00002.tar: the file is missing" in result.output
    assert "surplus: more.txt: nothing names this file" in result.output


def test_samples_of_another_plan_are_found_by_verify(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    built(folder, out)
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps(plan | {"seed": 1}))
    shutil.rmtree(out / "records")
    result = call("verify", out, "--jobs", 1)
    assert "plan: plan.json: seed is not that of dataset.json" in result.output
    assert "plan: plan.json: the samples do not stand in the order of seed 1" in result.output
    plan["paths"][0] = "other.png"
    (out / "plan.json").write_text(json.dumps(plan))
    result = call("verify", out, "--jobs", 1)
    assert "the samples are not the photographs of the plan" in result.output


def test_index_that_contradicts_itself_is_one_line(tmp_path: Path):
    write_class_set(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    for key, value, message in (
        ("format_version", 2, "format_version is 2, this version reads 1 only"),
        ("samples", 11, "samples is 11, but the rest of the file says 10"),
        ("content_sha256", "0" * 64, "content_sha256 is 000"),
        ("classes", index["classes"][:1], "key 'classes'"),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps(index | {key: value}))
        result = call("verify", tmp_path)
        assert result.exit_code == 1
        assert message in result.output
        assert result.output.count("\n") == 1


def test_nothing_is_painted_again(tmp_path: Path):
    write_class_set(tmp_path)
    result = call("verify", tmp_path, "--rerender", 3)
    assert result.exit_code == 1
    assert "nothing in it was painted" in result.output
