"""Inspection photographs: what is read, and one line for each thing that is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator.datasets import Category, find_categories
from evaluator.errors import EvaluatorError
from evaluator.layouts import LAYOUTS
from tests.evaluator_inspection import (
    save,
    write_btad,
    write_category,
    write_folders,
    write_loco,
    write_visa,
)


@pytest.fixture
def bolt(tmp_path: Path) -> Path:
    return write_category(tmp_path / "bolt")


def refused(root: Path, pattern: str, names: list[str] | None = None) -> None:
    with pytest.raises(EvaluatorError, match=pattern) as caught:
        find_categories(root, names)
    assert "\n" not in caught.value.message


def fatal(root: Path, kind: str, file: str, message: str) -> None:
    """The only fatal finding of the only category is this one."""
    (category,) = find_categories(root, None)
    (finding,) = [finding for finding in category.findings if finding.fatal]
    assert (finding.kind, finding.file) == (kind, file)
    assert message in finding.message
    assert "\n" not in finding.message


def test_category_lists_files_in_order(bolt):
    (category,) = find_categories(bolt.parent, None)
    assert category.name == "bolt"
    assert [path.name for path in category.train] == [f"{i:03d}.png" for i in range(5)]
    assert [image.defect for image in category.test] == ["dark", "dark", "good", "good", "light"]
    assert category.good == 2
    assert category.defects == {"dark": 2, "light": 1}
    assert category.test[0].masks == (bolt / "ground_truth" / "dark" / "000_mask.png",)


def test_category_hash_depends_on_every_byte(bolt):
    (before,) = find_categories(bolt.parent, None)
    save(bolt / "ground_truth" / "light" / "000_mask.png", np.ones((64, 64), np.uint8))
    (after,) = find_categories(bolt.parent, None)
    assert before.sha256 != after.sha256


def test_categories_can_be_chosen(bolt):
    write_category(bolt.parent / "nut")
    assert [c.name for c in find_categories(bolt.parent, ["nut"])] == ["nut"]
    assert [c.name for c in find_categories(bolt.parent, None)] == ["bolt", "nut"]


def test_unknown_category_names_the_known(bolt):
    refused(bolt.parent, "no category 'nut'; --categories knows bolt", ["nut"])


def test_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder")


def test_folder_without_categories(tmp_path):
    refused(tmp_path, "no categories found")


def test_folder_that_is_itself_a_category(bolt):
    refused(bolt, "is itself a category")


def test_category_without_training_images(bolt):
    shutil.rmtree(bolt / "train")
    refused(bolt.parent, "bolt: 0 normal photographs to fit on")


def test_category_with_a_single_training_image(bolt):
    for path in sorted((bolt / "train" / "good").iterdir())[1:]:
        path.unlink()
    refused(bolt.parent, "bolt: 1 normal photographs to fit on; .* at least 2")


def test_category_without_test_images(bolt):
    shutil.rmtree(bolt / "test")
    shutil.rmtree(bolt / "ground_truth")
    refused(bolt.parent, "bolt: no test images")


def test_category_without_defective_images(bolt):
    shutil.rmtree(bolt / "test" / "dark")
    shutil.rmtree(bolt / "test" / "light")
    shutil.rmtree(bolt / "ground_truth")
    refused(bolt.parent, "none of them defective; AUROC needs both")


def test_category_without_good_test_images(bolt):
    shutil.rmtree(bolt / "test" / "good")
    refused(bolt.parent, "none of them good")


def test_missing_mask_names_the_expected_file(bolt):
    (bolt / "ground_truth" / "dark" / "001_mask.png").unlink()
    fatal(bolt.parent, "mask_missing", "test/dark/001.png", "though 2 others")


def test_surplus_mask_is_refused(bolt):
    (bolt / "test" / "dark" / "001.png").unlink()
    file = "ground_truth/dark/001_mask.png"
    fatal(bolt.parent, "mask_without_image", file, "mask without image")


@pytest.mark.parametrize("lost", ["folder", "files"])
def test_lost_images_show_by_their_masks(bolt, lost):
    for path in (bolt / "test" / "light").iterdir():
        path.unlink()
    if lost == "folder":
        (bolt / "test" / "light").rmdir()
    file = "ground_truth/light/000_mask.png"
    fatal(bolt.parent, "mask_without_image", file, "expected test/light/000.*")


def test_two_images_with_one_mask_are_refused(bolt):
    Image.new("RGB", (64, 64)).save(bolt / "test" / "dark" / "000.jpg")
    fatal(bolt.parent, "mask_missing", "test/dark/000.png", "same mask 000_mask.png as 000.jpg")


def test_mask_of_another_size_names_both_sizes(bolt):
    save(bolt / "ground_truth" / "light" / "000_mask.png", np.ones((32, 64), np.uint8))
    file = "ground_truth/light/000_mask.png"
    fatal(bolt.parent, "mask_size", file, "mask is 64 x 32 pixels, its image 000.png 64 x 64")


@pytest.mark.parametrize("keep_bytes", [0, 20, 1000])
def test_cut_image_is_refused(bolt, keep_bytes):
    path = bolt / "train" / "good" / "002.png"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    fatal(bolt.parent, "unreadable", "train/good/002.png", "not a readable image")


def test_flipped_byte_in_a_png_is_refused(bolt):
    path = bolt / "test" / "good" / "000.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fatal(bolt.parent, "unreadable", "test/good/000.png", "not a readable image")


def test_name_that_is_not_utf8_is_refused(bolt):
    (bolt / "test" / "good" / "000.png").rename(bolt / "test" / "good" / "\udcff.png")
    fatal(bolt.parent, "unreadable", r"test/good/\udcff.png", "the name is not UTF-8; rename it")


def test_sixteen_bit_image_is_refused(bolt):
    save(bolt / "train" / "good" / "000.png", np.full((64, 64), 40_000, np.uint16))
    fatal(bolt.parent, "unreadable", "train/good/000.png", "more than 8 bit")


def test_image_of_too_many_pixels_is_refused(bolt):
    Image.new("1", (10_000, 9_000)).save(bolt / "train" / "good" / "000.png")
    fatal(bolt.parent, "unreadable", "train/good/000.png", "exceeds limit")


def test_all_faults_are_found_not_the_first_alone(bolt):
    (bolt / "ground_truth" / "dark" / "001_mask.png").unlink()
    for name in ("000.png", "001.png"):
        (bolt / "train" / "good" / name).write_bytes(b"no image")
    (category,) = find_categories(bolt.parent, None)
    kinds = sorted(finding.kind for finding in category.findings if finding.fatal)
    assert kinds == ["mask_missing", "unreadable", "unreadable"]


def test_without_any_masks_there_are_image_metrics_only(bolt):
    shutil.rmtree(bolt / "ground_truth")
    (category,) = find_categories(bolt.parent, None)
    assert not category.has_masks
    assert category.findings == ()


def test_masks_may_have_their_images_own_name(bolt):
    for path in (bolt / "ground_truth").glob("*/*.png"):
        path.rename(path.with_name(path.name.replace("_mask", "")))
    (category,) = find_categories(bolt.parent, None)
    assert category.has_masks
    assert category.findings == ()


def test_second_mask_of_an_image_is_refused(bolt):
    masks = bolt / "ground_truth" / "light"
    shutil.copy(masks / "000_mask.png", masks / "000.png")
    file = "ground_truth/light/000_mask.png"
    fatal(bolt.parent, "mask_without_image", file, "a second mask of 000.png beside 000.png")


def counts(category: Category) -> tuple[int, int, int, int]:
    """Photographs to fit on, good and defective ones to score, masks."""
    masks = sum(len(image.masks) for image in category.test)
    return len(category.train), category.good, len(category.test) - category.good, masks


@pytest.mark.parametrize(
    ("write", "layout", "expected"),
    [
        (lambda root: write_category(root / "bolt"), "mvtec", (5, 2, 3, 3)),
        (lambda root: write_btad(root / "01"), "btad", (3, 1, 2, 2)),
        (lambda root: write_visa(root), "visa", (2, 1, 1, 1)),
        (lambda root: write_loco(root / "juice"), "loco", (3, 1, 2, 3)),
        (lambda root: write_folders(root / "part"), "folders", (8, 2, 2, 2)),
    ],
    ids=LAYOUTS,
)
def test_layout_is_told_by_its_folders(tmp_path, write, layout, expected):
    write(tmp_path)
    for asked in ("auto", layout):
        (category,) = find_categories(tmp_path, None, asked)
        assert category.layout == layout
        assert counts(category) == expected
        assert category.has_masks
        assert not [finding for finding in category.findings if finding.fatal]


def test_layouts_may_stand_side_by_side(tmp_path):
    write_btad(tmp_path / "01")
    write_category(tmp_path / "bolt")
    assert [c.layout for c in find_categories(tmp_path, None)] == ["btad", "mvtec"]


def test_two_folders_are_a_category_themselves(tmp_path):
    write_folders(tmp_path / "part", masks=False)
    (category,) = find_categories(tmp_path / "part", None)
    assert (category.name, category.has_masks) == ("part", False)
    assert "8 good photographs to fit on, 2 to score" in category.findings[0].message


def test_split_of_two_folders_depends_on_names_alone(tmp_path):
    for name in ("a", "b"):
        write_folders(tmp_path / name)
    (tmp_path / "b" / "good" / "7.png").write_bytes((tmp_path / "b/good/8.png").read_bytes())
    a, b = find_categories(tmp_path, None)
    assert [path.name for path in a.train] == [path.name for path in b.train]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("object,split", "object,part", "line 2: expected the columns object,split"),
        ("candle,test,anomaly", "candle,test,odd", "label is 'odd', expected normal or anomaly"),
        ("candle,train", "candle,training", "split is 'training', expected train or test"),
        (",candle/Data/Images/A", ",../candle/Data/Images/A", "does not lie below 'candle'"),
        (",candle/Data/Images/A", ",/etc/A", "'/etc/Anomaly/000.JPG' does not lie below"),
    ],
)
def test_split_of_visa_that_is_wrong_names_the_line(tmp_path, old, new, message):
    write_visa(tmp_path)
    path = tmp_path / "split_csv" / "1cls.csv"
    path.write_text(path.read_text().replace(old, new))
    refused(tmp_path, message)


def test_image_that_visas_split_names_in_vain_is_found(tmp_path):
    write_visa(tmp_path)
    (tmp_path / "candle/Data/Images/Normal/1.JPG").unlink()
    refused(tmp_path, "candle: 1 normal photographs")
    (tmp_path / "candle/Data/Images/Normal/2.JPG").rename(
        tmp_path / "candle/Data/Images/Normal/1.JPG"
    )
    fatal(tmp_path, "unreadable", "Data/Images/Normal/2.JPG", "not there")
