"""`builder classes`: labelled shards from folders and manifests, resumed and refused."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builder.artifacts import read_toml
from builder.classes.build import build_classes
from builder.classes.index import ClassPlan, ClassSet, shuffled
from builder.classes.sources import find_classes
from builder.errors import BuilderError
from builder.images import decode_pixels, prepare_normal
from builder.sources import Manifest
from tests.class_folders import SMALL, built, call, members, photograph, tree, write_folder

PAGE = (Path(__file__).parent.parent / "builder/CLASSES.md").read_text("utf-8")
MANIFESTS = Path(__file__).parent.parent / "data_manifests"

DAGM_LIKE = """
format = "semiformula-manifest"
format_version = 1
name = "textures"
title = "Textures"
licence = "CC0-1.0"
citation = "nobody"
homepage = "nowhere"
get = "make it"
[[classes]]
category = "normal"
folders = ["Class1/Train", "Class1/Test"]
expected = 3
skip_labelled = "Label/{stem}_label.PNG"
[[classes]]
category = "defective"
folders = ["Class1/Train", "Class1/Test"]
expected = 1
only_labelled = "Label/{stem}_label.PNG"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "parts")


def test_page_shows_the_formats_and_the_schema():
    index, plan, schema = (block.split("```")[0] for block in PAGE.split("```json\n")[1:])
    ClassSet.model_validate_json(index)
    ClassPlan.model_validate_json(plan)
    assert json.loads(schema) == ClassSet.model_json_schema()


def test_order_is_that_of_the_hashes_of_seed_and_number():
    # sha256sum of "0 0" is 9333…, of "0 1" 5cc3…, of "0 2" 545b…, of "0 3" dcbc…
    assert shuffled(4, 0) == [2, 1, 0, 3]
    assert sorted(shuffled(1000, 5)) == list(range(1000))
    assert shuffled(1000, 5) != shuffled(1000, 6)


def test_folder_of_class_folders_becomes_labelled_shards(folder: Path, tmp_path: Path):
    dataset = built(folder, tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == [
        "data/train-00000-of-00002.tar",
        "data/train-00001-of-00002.tar",
        "dataset.json",
        "plan.json",
        "records/train-00000-of-00002.json",
        "records/train-00001-of-00002.json",
    ]
    assert [(one.category, one.samples) for one in dataset.classes] == [("bad", 3), ("good", 4)]
    assert [shard.samples for shard in dataset.shards] == [4, 3]
    assert (dataset.source.licence, dataset.source.other_files) == ("CC0-1.0", 1)
    found = members(tmp_path / "out")
    assert list(found) == [f"{i:09d}.{end}" for i in range(7) for end in ("webp", "cls", "json")]
    listed = [f"bad/deeper/{i}.png" for i in range(3)] + [f"good/{i}.png" for i in range(4)]
    for i, place in enumerate(shuffled(7, 0)):
        path = folder / listed[place]
        about = json.loads(found[f"{i:09d}.json"])
        assert about == {
            "index": i,
            "category": listed[place].split("/")[0],
            "path": listed[place],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "licence": "CC0-1.0",
        }
        assert found[f"{i:09d}.cls"] == (b"0" if place < 3 else b"1")
        assert found[f"{i:09d}.webp"] == prepare_normal(path, 16, 3).encoded


def test_bytes_depend_on_photographs_and_options_alone(folder: Path, tmp_path: Path):
    built(folder, tmp_path / "a")
    shutil.copytree(folder, tmp_path / "elsewhere" / "parts")
    words = ["classes", tmp_path / "elsewhere" / "parts", "--out", tmp_path / "b", "--jobs", 2]
    result = call(*words, "--size", 16, "--samples-per-shard", 4, "--licence", "CC0-1.0")
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    built(folder, tmp_path / "c", SMALL._replace(seed=1))
    assert tree(tmp_path / "a") != tree(tmp_path / "c")


def test_jpeg_is_decodable_and_named_jpg(folder: Path, tmp_path: Path):
    dataset = built(folder, tmp_path / "out", SMALL._replace(codec="jpeg"))
    assert (dataset.image.suffix, dataset.image.lossless) == ("jpg", False)
    data = members(tmp_path / "out")["000000000.jpg"]
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (16, 16))
    assert call("verify", tmp_path / "out", "--jobs", 1).exit_code == 0


def test_command_counts_and_resumes(folder: Path, tmp_path: Path):
    (folder / "good/9.png").write_bytes(b"no image")
    words = ["classes", folder, "--out", tmp_path / "out", "--size", 16, "--jobs", 1]
    result = call(*words)
    assert result.exit_code == 1
    assert result.output.startswith("Error: source parts: not an image: good/9.png; mend it, or")
    assert not (tmp_path / "out/plan.json").exists()
    words += ["--allow-incomplete", "--samples-per-shard", 4]
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[:5] == [
        "class bad: 3 found, 3 kept",
        "class good: 5 found, 4 kept, 1 not an image",
        "class: 1 other files left out, no images by name",
        "went on without: not an image: good/9.png",
        "shards: 2 built, 0 verified as they stood, 2 in all",
    ]
    before = tree(tmp_path / "out")
    (tmp_path / "out/dataset.json").unlink()
    (tmp_path / "out/records/train-00000-of-00002.json").unlink()
    (tmp_path / "out/data/.train-00000-of-00002.tar.tmp-1-2").write_text("cut")
    with (tmp_path / "out/data/train-00001-of-00002.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"x")
    assert "shards: 2 built, 0 verified" in call(*words).output
    assert tree(tmp_path / "out") == before
    assert "shards: 0 built, 2 verified" in call(*words).output
    result = call("verify", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("write", [1, 2])  # of the plan; of the index, behind all shards
def test_killed_command_goes_on_to_the_same_bytes(write: int, folder: Path, tmp_path: Path):
    words = ["--out", str(tmp_path / "out"), "--size", "16", "--samples-per-shard", "2"]
    program = (
        "import os\n"
        "from builder import storage\n"
        f"real, left = storage.atomic_file, [{write}]\n"
        "def stopping(path):\n"
        "    left[0] -= 1\n"
        "    os._exit(9) if not left[0] else None\n"
        "    return real(path)\n"
        "storage.atomic_file = stopping\n"
        "from builder.cli import main\n"
        f"main(['classes', {str(folder)!r}, '--jobs', '1', *{words}])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert run.returncode == 9
    assert (tmp_path / "out/plan.json").exists() == (write == 2)
    assert not (tmp_path / "out/dataset.json").exists()
    result = call("classes", folder, *words, "--jobs", 1)
    assert result.exit_code == 0, result.output
    words[1] = str(tmp_path / "calm")
    call("classes", folder, *words, "--jobs", 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: photograph(f / "good/7.png", 77), "begun with list of photographs"),
        (lambda f: (f / "good/0.png").rename(f / "bad/0.png"), "begun with list of photographs"),
        (lambda f: photograph(f / "good/0.png", 99), "it changed since plan.json was written"),
    ],
    ids=["more", "moved", "other bytes"],
)
def test_photographs_that_changed_meanwhile_are_refused(
    change, message: str, folder: Path, tmp_path: Path
):
    built(folder, tmp_path / "out")
    for path in (tmp_path / "out/records").iterdir():
        path.unlink()
    change(folder)
    with pytest.raises(BuilderError, match=message):
        built(folder, tmp_path / "out")


def test_place_of_something_else_is_refused(folder: Path, dataset: Path, tmp_path: Path):
    built(folder, tmp_path / "out")
    with pytest.raises(BuilderError, match="begun with --size 16, this is 32"):
        built(folder, tmp_path / "out", SMALL._replace(size_px=32))
    with pytest.raises(BuilderError, match="format is 'semiformula-plan', this version reads"):
        built(folder, dataset)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").write_text("")
    with pytest.raises(BuilderError, match="not empty and not a dataset folder"):
        built(folder, tmp_path / "own")


def test_machine_with_another_codec_library_is_refused(folder: Path, tmp_path: Path):
    built(folder, tmp_path / "out")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    plan["environment"]["libwebp"] = "0.1"
    (tmp_path / "out/plan.json").write_text(json.dumps(plan))
    with pytest.raises(BuilderError, match=r"was begun with libwebp 0\.1, this is"):
        built(folder, tmp_path / "out")


def test_manifest_parts_labelled_images_from_the_rest(tmp_path: Path):
    (tmp_path / "textures.toml").write_text(DAGM_LIKE)
    root = tmp_path / "root/Class1"
    for i, name in enumerate(
        ("Train/0001.PNG", "Train/0002.PNG", "Test/0001.PNG", "Test/0002.PNG")
    ):
        photograph(root / name, 10 * i)
    photograph(root / "Test/Label/0001_label.PNG", 255)
    source = find_classes(str(tmp_path / "textures.toml"), str(tmp_path / "root"), None)
    assert [(p.name.removeprefix("Class1/"), p.category) for p in source.photographs] == [
        ("Train/0001.PNG", "normal"),
        ("Train/0002.PNG", "normal"),
        ("Test/0002.PNG", "normal"),
        ("Test/0001.PNG", "defective"),
    ]
    assert source.report.faults == []
    (root / "Train/0001.PNG").unlink()
    source = find_classes(str(tmp_path / "textures.toml"), str(tmp_path / "root"), None)
    assert source.report.faults == ["normal: expected 3 images, found 2"]
    dataset = build_classes(
        source, str(tmp_path / "out"), SMALL, jobs=1, allow_incomplete=True
    ).dataset
    assert [(one.category, one.samples) for one in dataset.classes] == [
        ("normal", 2),
        ("defective", 1),
    ]


# The paper: BTAD has 2,540 images and 6 classes, DAGM 6,900 and 12.
@pytest.mark.parametrize(("name", "classes", "images"), [("btad", 6, 2540), ("dagm2007", 12, 6900)])
def test_shipped_manifest_lists_the_paper_s_classes(name: str, classes: int, images: int):
    manifest = read_toml(Manifest, MANIFESTS / f"{name}.toml")
    assert len(manifest.classes) == classes
    assert sum(entry.expected or 0 for entry in manifest.classes) == images


def test_manifest_with_contradicting_tables_is_refused(tmp_path: Path):
    path = tmp_path / "textures.toml"
    path.write_text(DAGM_LIKE.replace("expected = 1\n", 'skip_labelled = "x"\n'))
    with pytest.raises(BuilderError, match="give one of skip_labelled and only_labelled"):
        find_classes(str(path), str(tmp_path), None)
    path.write_text(DAGM_LIKE.split("[[classes]]")[0])
    with pytest.raises(BuilderError, match=r"neither \[\[normals\]\] nor \[\[classes\]\]"):
        find_classes(str(path), str(tmp_path), None)
    with pytest.raises(BuilderError, match=r"manifest mvtec_ad: has no \[\[classes\]\]"):
        find_classes("mvtec_ad", str(tmp_path), None)


def test_same_image_in_two_classes_is_reported_and_left_out(folder: Path, tmp_path: Path):
    shutil.copy(folder / "good/1.png", folder / "bad/copy.png")
    with pytest.raises(BuilderError, match=r"in several classes \(also good/1\.png\): bad/copy"):
        built(folder, tmp_path / "out")
    dataset = built(folder, tmp_path / "out", allow_incomplete=True)
    assert [(one.category, one.samples) for one in dataset.classes] == [("bad", 3), ("good", 3)]
    assert dataset.source.categories[0].rejected == {"in several classes": 1}
    shutil.copy(folder / "good/2.png", folder / "good/twin.png")  # in one class it is no fault
    built(folder, tmp_path / "twin", allow_incomplete=True)


def test_class_of_which_nothing_can_be_used_is_refused(folder: Path, tmp_path: Path):
    for path in (folder / "bad/deeper").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BuilderError, match="class bad: no photograph of it can be used"):
        built(folder, tmp_path / "out", allow_incomplete=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "empty").mkdir(), "class folder 'empty' holds no image"),
        (lambda f: photograph(f / "1.png", 3), "1.png lies in no class folder"),
        (lambda f: photograph(f / "good/test/1.png", 3), "looks like an inspection set's 'test'"),
        (lambda f: (f / "bad").rename(f / "train"), "'train' looks like a split"),
        (lambda f: (f / "bad").rename(f / "b\nd"), r"class folder 'b\nd': rename it"),
        (lambda f: shutil.rmtree(f / "bad"), "at least two classes, one folder each, found 'good'"),
        (lambda f: shutil.rmtree(f), "neither a folder of class folders nor a manifest"),
    ],
)
def test_folder_that_is_none_of_classes_is_one_line(damage, message: str, folder: Path):
    damage(folder)
    result = call("classes", folder, "--out", folder.parent / "out")
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (folder.parent / "out").exists()


def test_hidden_folders_are_no_classes(folder: Path):
    photograph(folder / ".ipynb_checkpoints/1.png", 3)
    source = find_classes(str(folder), None, None)
    assert [one.category for one in source.report.categories] == ["bad", "good"]
    assert source.report.other_files == 2


def test_pixels_are_those_of_normals(folder: Path, tmp_path: Path):
    built(folder, tmp_path / "out")
    pixels = decode_pixels(members(tmp_path / "out")["000000000.webp"], 3)
    place = shuffled(7, 0)[0]
    value = 200 + place if place < 3 else 10 + place - 3
    np.testing.assert_array_equal(pixels, np.full((16, 16, 3), value))
