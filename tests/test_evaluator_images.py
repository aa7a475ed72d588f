"""Photographs and masks: the pixels that a protocol asks for, and one line for what is damaged."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import Mask

from evaluator.errors import EvaluatorError
from evaluator.images import image_size, load_image, load_mask, mask_values
from evaluator.protocols import PROTOCOLS, changed
from tests.evaluator_inspection import save

FULL = changed(PROTOCOLS["full"], resize_px=16)
CORNER = changed(FULL, mask_rule="nonzero-nearest-corner")


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), np.uint8)


def refused(path, pattern: str) -> None:
    for load in (lambda: load_image(path, FULL), lambda: load_mask([path], FULL)):
        with pytest.raises(EvaluatorError, match=pattern) as caught:
            load()
        assert "\n" not in caught.value.message


def test_image_is_the_centre_of_the_square(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[6:10, 6:10] = 200
    path = save(tmp_path / "a.png", pixels)
    assert (load_image(path, changed(FULL, crop_px=4)) == 200).all()
    assert (load_image(path, FULL) == pixels).all()


def test_image_that_is_not_square_is_squeezed(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    found = load_image(save(tmp_path / "a.png", pixels), changed(FULL, interpolation="bilinear"))
    assert found.shape == (16, 16, 3)
    assert (found[:, :7] == 0).all()
    assert (found[:, 9:] == 255).all()


@pytest.mark.parametrize("interpolation", ["lanczos", "bilinear", "bicubic"])
def test_interpolation_is_pillows_filter_of_this_name(tmp_path, interpolation):
    pixels = noise(40, 30, 3)
    path = save(tmp_path / "a.png", pixels)
    wanted = Image.fromarray(pixels).resize((16, 16), Image.Resampling[interpolation.upper()])
    found = load_image(path, changed(FULL, interpolation=interpolation))
    np.testing.assert_array_equal(found, np.asarray(wanted))


def test_bilinear_is_torchvisions_antialiased_resize(tmp_path):
    pixels = noise(100, 70, 3)
    path = save(tmp_path / "a.png", pixels)
    wanted = functional.resize(
        torch.from_numpy(pixels).permute(2, 0, 1).float(), [16, 16], antialias=True
    )
    found = load_image(path, changed(FULL, interpolation="bilinear"))
    difference = found - wanted.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() < 1.0  # grey levels: Pillow rounds after each axis


def test_image_from_bytes_at_hand(tmp_path):
    path = save(tmp_path / "a.png", noise(20, 20, 3))
    data = path.read_bytes()
    expected = load_image(path, FULL)
    path.unlink()
    np.testing.assert_array_equal(load_image(path, FULL, data), expected)
    assert image_size(path, data) == (20, 20)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_image_of_any_8_bit_mode_becomes_rgb(tmp_path, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    path = tmp_path / f"a{suffix}"
    Image.new("L", (16, 16), 255).convert("RGB").convert(mode).save(path)
    found = load_image(path, FULL)
    assert found.shape == (16, 16, 3)
    assert (found == 255).all()


@pytest.mark.parametrize("value", [1, 127, 255])
def test_mask_is_whatever_is_not_zero(tmp_path, value):
    mask = np.zeros((2, 2), np.uint8)
    mask[0, 1] = value
    expected = np.zeros((16, 16), bool)
    expected[:8, 8:] = True
    found = load_mask([save(tmp_path / "a_mask.png", mask)], FULL)
    np.testing.assert_array_equal(found, expected)


def test_mask_is_cropped_like_its_image(tmp_path):
    pixels = noise(16, 16)
    path = save(tmp_path / "a.png", pixels)
    found = load_mask([path], changed(FULL, crop_px=5))
    np.testing.assert_array_equal(found, pixels[5:10, 5:10] > 0)


def test_mask_of_one_bit(tmp_path):
    path = save(tmp_path / "a_mask.png", np.eye(16, dtype=bool))
    np.testing.assert_array_equal(load_mask([path], FULL), np.eye(16, dtype=bool))


def test_mask_in_colour_counts_every_channel(tmp_path):
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 1, 2] = 1  # would vanish in a conversion to grey
    path = save(tmp_path / "a_mask.png", pixels)
    assert load_mask([path], FULL).sum() == 64
    np.testing.assert_array_equal(mask_values(path), pixels)


def test_several_masks_are_united(tmp_path):
    paths = []
    for row, size in ((0, 16), (5, 16), (10, 32)):
        mask = np.zeros((size, 16), np.uint8)
        mask[row * size // 16 : (row + 1) * size // 16] = 255
        paths.append(save(tmp_path / f"{row}.png", mask))
    rows = load_mask(paths, FULL).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(rows), [0, 5, 10])


def test_no_mask_is_no_defect():
    assert load_mask([], changed(FULL, crop_px=8)).shape == (8, 8)
    assert not load_mask([], FULL).any()


def test_mask_rules_see_other_rows(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[6] = 255  # of each pair of rows one rule shows the lower, the other the upper one
    path = save(tmp_path / "a_mask.png", mask)
    assert not load_mask([path], FULL).any()
    np.testing.assert_array_equal(np.flatnonzero(load_mask([path], CORNER).any(axis=1)), [3])


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (33, 100), (57, 31), (250, 225)])
def test_mask_rules_are_pillows_and_torchvisions(tmp_path, size):
    mask = (noise(*size) > 127).astype(np.uint8)
    path = save(tmp_path / "a_mask.png", mask)
    pillow = Image.fromarray(mask).resize((16, 16), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(load_mask([path], FULL), np.asarray(pillow) > 0)
    torchvision = functional.resize(Mask(torch.from_numpy(mask)), [16, 16])
    np.testing.assert_array_equal(load_mask([path], CORNER), torchvision.numpy() > 0)


def test_cut_file_is_refused(tmp_path):
    path = save(tmp_path / "a.jpg", noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, re.escape(f"{path}: not a readable image"))


@pytest.mark.parametrize("position", ["header", "pixels"])
def test_flipped_byte_in_a_png_is_refused(tmp_path, position):
    path = save(tmp_path / "a.png", noise(64, 64, 3))
    data = bytearray(path.read_bytes())
    data[20 if position == "header" else len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(EvaluatorError, match=r"a\.png: not a readable image"):
        image_size(path)
    refused(path, r"a\.png: not a readable image")


def test_sixteen_bit_image_is_refused(tmp_path):
    refused(save(tmp_path / "a.png", np.full((8, 8), 40_000, np.uint16)), "more than 8 bit")


def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (10_000, 8_000)).save(path)
    refused(path, "10000 x 8000 pixels, more than 64000000; refused")
    with pytest.raises(EvaluatorError, match="refused"):
        image_size(path)


def test_format_that_nobody_photographs_in_is_not_parsed(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(path, format="GIF")
    refused(path, r"a\.png: not a readable image \(cannot identify image file")


def test_file_that_is_not_there(tmp_path):
    refused(tmp_path / "a.png", r"a\.png: cannot be read \(No such file or directory\)")


def test_size_is_width_then_height(tmp_path):
    assert image_size(save(tmp_path / "a.png", noise(5, 9))) == (9, 5)


def test_palette_with_transparency_is_read_without_a_warning(tmp_path):
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=b"\x00\x80")
    assert load_image(tmp_path / "p.png", FULL)[0, 0].tolist() == [10, 20, 30]
