"""Inspection photographs: what is read, and one line for each thing that is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator.errors import EvaluatorError
from evaluator.inspection import find_categories
from tests.evaluator_inspection import save, write_category


@pytest.fixture
def bolt(tmp_path: Path) -> Path:
    return write_category(tmp_path / "bolt")


def refused(root: Path, pattern: str, names: list[str] | None = None) -> None:
    with pytest.raises(EvaluatorError, match=pattern) as caught:
        find_categories(root, names)
    assert "\n" not in caught.value.message


def test_category_lists_files_in_order(bolt):
    (category,) = find_categories(bolt.parent, None)
    assert category.name == "bolt"
    assert [path.name for path in category.train] == [f"{i:03d}.png" for i in range(5)]
    assert [image.defect for image in category.test] == ["dark", "dark", "good", "good", "light"]
    assert category.good == 2
    assert category.defects == {"dark": 2, "light": 1}
    assert category.test[0].mask == bolt / "ground_truth" / "dark" / "000_mask.png"


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
    refused(bolt.parent, r"train/good: 0 images")


def test_category_with_a_single_training_image(bolt):
    for path in sorted((bolt / "train" / "good").iterdir())[1:]:
        path.unlink()
    refused(bolt.parent, r"train/good: 1 images; .* at least 2")


def test_category_without_test_images(bolt):
    shutil.rmtree(bolt / "test")
    shutil.rmtree(bolt / "ground_truth")
    refused(bolt.parent, "bolt/test: no test images")


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
    refused(bolt.parent, r"dark/001.png: defective image without mask; expected .*001_mask.png")


def test_surplus_mask_is_refused(bolt):
    (bolt / "test" / "dark" / "001.png").unlink()
    refused(bolt.parent, "dark/001_mask.png: mask without image")


@pytest.mark.parametrize("lost", ["folder", "files"])
def test_lost_images_show_by_their_masks(bolt, lost):
    for path in (bolt / "test" / "light").iterdir():
        path.unlink()
    if lost == "folder":
        (bolt / "test" / "light").rmdir()
    refused(bolt.parent, "light/000_mask.png: mask without image; expected .*test/light/000.png")


def test_two_images_with_one_mask_are_refused(bolt):
    Image.new("RGB", (64, 64)).save(bolt / "test" / "dark" / "000.jpg")
    refused(bolt.parent, r"dark/000.png: has the same mask .*000_mask.png as 000.jpg; rename")


def test_mask_of_another_size_names_both_sizes(bolt):
    save(bolt / "ground_truth" / "light" / "000_mask.png", np.ones((32, 64), np.uint8))
    refused(bolt.parent, r"000_mask.png: mask is 64 x 32 pixels, its image .* 64 x 64")


@pytest.mark.parametrize("keep_bytes", [0, 20, 1000])
def test_cut_image_is_refused(bolt, keep_bytes):
    path = bolt / "train" / "good" / "002.png"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    refused(bolt.parent, "002.png: not a readable image")


def test_flipped_byte_in_a_png_is_refused(bolt):
    path = bolt / "test" / "good" / "000.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(bolt.parent, "good/000.png: not a readable image")


def test_name_that_is_not_utf8_is_refused(bolt):
    (bolt / "test" / "good" / "000.png").rename(bolt / "test" / "good" / "\udcff.png")
    refused(bolt.parent, r"good/\\udcff.png': the name is not UTF-8; rename it")


def test_sixteen_bit_image_is_refused(bolt):
    save(bolt / "train" / "good" / "000.png", np.full((64, 64), 40_000, np.uint16))
    refused(bolt.parent, "more than 8 bit")


def test_image_of_too_many_pixels_is_refused(bolt):
    Image.new("1", (10_000, 9_000)).save(bolt / "train" / "good" / "000.png")
    refused(bolt.parent, "000.png: ")
