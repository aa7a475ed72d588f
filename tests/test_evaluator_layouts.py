"""Layouts of inspection sets that are unclear, incomplete, or hold more than is read."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator.datasets import Category, find_categories
from evaluator.errors import EvaluatorError
from evaluator.layouts import LAYOUTS
from tests.evaluator_inspection import (
    grey,
    save,
    square,
    write_btad,
    write_category,
    write_folders,
    write_visa,
)


def refused(root: Path, message: str, names: list[str] | None = None, layout: str = "auto") -> None:
    with pytest.raises(EvaluatorError) as caught:
        find_categories(root, names, layout)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def the_only(root: Path, layout: str = "auto") -> Category:
    (category,) = find_categories(root, None, layout)
    return category


def test_category_of_two_layouts_names_both(tmp_path):
    write_btad(write_category(tmp_path / "bolt"))
    refused(
        tmp_path,
        "bolt: has folders of train/ok and test/ko (btad) and train/good and test/ (mvtec); "
        "say which with --layout",
    )
    assert len(the_only(tmp_path, "btad").train) == 3
    assert len(the_only(tmp_path, "mvtec").train) == 5


def test_categories_of_no_layout_name_all_that_are_known(tmp_path):
    (tmp_path / "bolt" / "normal").mkdir(parents=True)
    refused(
        tmp_path,
        "no categories found; expected folders with train/good and test/ (mvtec), or train/ok and "
        "test/ko (btad), or Data/Images, and split_csv/1cls.csv beside the categories (visa), or ",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_that_is_not_there_names_its_folders(tmp_path, layout):
    write_folders(tmp_path / "part") if layout != "folders" else write_btad(tmp_path / "part")
    refused(tmp_path, f"(layout {layout})", layout=layout)


def test_named_category_of_no_layout_names_what_is_expected(tmp_path):
    write_category(tmp_path / "bolt")
    (tmp_path / "nut").mkdir()
    refused(tmp_path, "nut: expected train/good and test/ (mvtec), or ", ["nut"])


@pytest.mark.parametrize("write", [write_btad, write_category])
def test_category_given_as_the_root_names_the_folder_above(tmp_path, write):
    write(tmp_path / "01")
    refused(tmp_path / "01", "is itself a category; give the folder above it and --categories 01")


def test_category_of_visa_given_as_the_root_names_the_folder_above(tmp_path):
    refused(write_visa(tmp_path), "is itself a category")


def test_two_folders_are_no_other_category(tmp_path):
    write_folders(tmp_path / "part")
    refused(tmp_path / "part", "--categories can only be part", ["bolt"])
    assert [c.name for c in find_categories(tmp_path / "part", ["part"])] == ["part"]


@pytest.mark.parametrize("folder", ["train", "train/good"])
def test_two_folders_beside_train_are_not_split(tmp_path, folder):
    write_folders(tmp_path / "part")
    for i in range(3):
        save(tmp_path / "part" / folder / f"{i}.png", grey(50 + i))
    category = the_only(tmp_path)
    assert (category.layout, len(category.train), category.good) == ("folders", 3, 10)
    assert category.findings == ()


def test_visa_in_the_layout_of_mvtec_has_its_masks(tmp_path):
    for i in range(2):
        save(tmp_path / "candle" / "train" / "good" / f"{i}.JPG", grey(90 + i))
    save(tmp_path / "candle" / "test" / "good" / "2.JPG", grey(95))
    save(tmp_path / "candle" / "test" / "bad" / "000.JPG", grey(200))
    save(tmp_path / "candle" / "ground_truth" / "bad" / "000.png", square())
    category = the_only(tmp_path)
    assert (category.layout, category.has_masks, category.defects) == ("mvtec", True, {"bad": 1})


def test_files_that_are_no_images_are_counted(tmp_path):
    folder = write_category(tmp_path / "bolt") / "train" / "good"
    Image.fromarray(grey(90)).save(folder / "old.gif")
    for name in ("notes.txt", ".hidden", "Thumbs.db"):
        (folder / name).write_bytes(b"")
    (finding,) = the_only(tmp_path).findings
    assert (finding.kind, finding.file, finding.fatal) == ("count", "train/good", False)
    assert finding.message.startswith("2 files are no .png, .jpg,")
    assert finding.message.endswith("and are left out: notes.txt, old.gif")


def test_masks_of_good_photographs_are_counted(tmp_path):
    save(write_category(tmp_path / "bolt") / "ground_truth" / "good" / "000_mask.png", square(0))
    (finding,) = the_only(tmp_path).findings
    assert finding.message == "1 masks of good photographs, which are not read"
    assert not finding.fatal


def test_hash_depends_on_what_a_photograph_is_for(tmp_path):
    write_visa(tmp_path)
    before = the_only(tmp_path)
    split = tmp_path / "split_csv" / "1cls.csv"
    save(tmp_path / "candle/Data/Images/Normal/3.JPG", grey(97))
    lines = split.read_text()
    row = "candle,{},normal,candle/Data/Images/Normal/3.JPG,\n"
    hashes = {before.sha256}
    for role in ("train", "test"):
        split.write_text(lines + row.format(role))
        hashes.add(the_only(tmp_path).sha256)
    assert len(hashes) == 3


def test_category_whose_name_is_not_utf8_is_refused(tmp_path):
    write_category(tmp_path / "\udcff")
    for layout in ("auto", "mvtec"):
        refused(tmp_path, r"\udcff: the category's name is not UTF-8; rename it", layout=layout)


def test_links_out_of_the_root_are_followed_and_hashed(tmp_path):
    bolt = write_category(tmp_path / "data" / "bolt")
    before = the_only(tmp_path / "data")
    shutil.move(bolt / "train", tmp_path / "elsewhere")
    (bolt / "train").symlink_to(tmp_path / "elsewhere")
    assert the_only(tmp_path / "data").sha256 == before.sha256
    save(tmp_path / "elsewhere" / "good" / "000.png", np.zeros((64, 64, 3), np.uint8))
    assert the_only(tmp_path / "data").sha256 != before.sha256


def test_suffixes_in_capitals_are_images(tmp_path):
    good = write_category(tmp_path / "bolt") / "train" / "good"
    (good / "000.png").rename(good / "000.PNG")
    assert len(the_only(tmp_path).train) == 5


def test_names_of_images_that_are_no_files_are_fatal(tmp_path):
    good = write_category(tmp_path / "bolt") / "train" / "good"
    (good / "folder.png").mkdir()
    os.mkfifo(good / "pipe.png")
    (good / "broken_link.png").symlink_to("nowhere")
    found = {finding.file: finding.message for finding in the_only(tmp_path).findings}
    assert found == {
        "train/good/broken_link.png": "cannot be read (No such file or directory)",
        "train/good/folder.png": "is no file, though it has an image's suffix",
        "train/good/pipe.png": "is no file, though it has an image's suffix",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1cls.csv: no rows; expected object,split,label,image,mask, a line for each image"),
        ("object,split,label,image,mask\n", "1cls.csv: no rows"),
    ],
)
def test_split_of_visa_without_rows(tmp_path, text, message):
    write_visa(tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").write_text(text)
    refused(tmp_path, message)


def test_split_of_visa_that_names_an_image_twice(tmp_path):
    write_visa(tmp_path)
    split = tmp_path / "split_csv" / "1cls.csv"
    lines = split.read_text().splitlines()
    split.write_text("\n".join([*lines, lines[2].replace("train", "test")]))
    refused(tmp_path, "line 7: candle/Data/Images/Normal/0.JPG stands in line 3 too")


def test_split_of_visa_saved_by_a_spreadsheet(tmp_path):
    write_visa(tmp_path)
    split = tmp_path / "split_csv" / "1cls.csv"
    split.write_text(split.read_text().replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    assert len(the_only(tmp_path).train) == 2


def test_anomaly_in_visas_training_split_is_fatal(tmp_path):
    write_visa(tmp_path)
    path = tmp_path / "split_csv" / "1cls.csv"
    row = "candle,train,anomaly,candle/Data/Images/Anomaly/001.JPG,"
    save(tmp_path / "candle/Data/Images/Anomaly/001.JPG", grey(201))
    path.write_text(path.read_text() + row + "\n")
    (finding,) = [finding for finding in the_only(tmp_path).findings if finding.fatal]
    assert finding.file == "Data/Images/Anomaly/001.JPG"
    assert "anomaly into the training split" in finding.message
