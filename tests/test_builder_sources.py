import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builder.artifacts import read_toml
from builder.errors import BuilderError
from builder.images import decode_pixels, encode_pixels, prepare_normal
from builder.rejects import count_kept
from builder.sources import Manifest, find_source, shipped_manifests
from tests.conftest import write_photographs

MANIFESTS = Path(__file__).parent.parent / "data_manifests"

THREE_FILES = """
format = "semiformula-manifest"
format_version = 1
name = "three"
title = "Three"
licence = "CC0-1.0"
citation = "nobody"
homepage = "nowhere"
get = "make it"
[[normals]]
category = "a"
folders = ["a/train", "a/test"]
expected = 3
skip_labelled = "Label/{stem}_label.PNG"
"""


def grey_png(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path, format="PNG")
    return path


@pytest.fixture
def three(tmp_path: Path) -> Path:
    (tmp_path / "three.toml").write_text(THREE_FILES)
    for name in ("train/000.png", "train/001.png", "test/000.png"):
        grey_png(tmp_path / "root" / "a" / name)
    return tmp_path


def test_folder_gives_sorted_images_with_the_first_folder_as_category(photographs: Path):
    source = find_source(str(photographs), None, None)
    names = [photograph.name for photograph in source.photographs]
    assert names == [
        "steel/000.png",
        "steel/002.bmp",
        "steel/004.bmp",
        "wood/001.bmp",
        "wood/003.png",
        "wood/005.bmp",
    ]
    assert [p.category for p in source.photographs] == ["steel"] * 3 + ["wood"] * 3
    assert source.report.licence == "unknown"


def test_folder_without_subfolders_is_one_category_of_its_name(tmp_path: Path):
    grey_png(tmp_path / "oak planks" / "1.png")
    source = find_source(str(tmp_path / "oak planks"), None, "mine")
    assert source.photographs[0].category == "oak_planks"
    assert source.report.licence == "mine"


def test_folder_with_a_test_part_is_refused(tmp_path: Path):
    grey_png(tmp_path / "bottle" / "test" / "broken" / "000.png")
    with pytest.raises(BuilderError, match="pre-training must not see it"):
        find_source(str(tmp_path), None, None)


def test_empty_folder_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(BuilderError, match=r"no images found .* among 1 files"):
        find_source(str(tmp_path), None, None)


def test_wrong_path_names_the_manifests():
    with pytest.raises(BuilderError, match=r"neither a folder nor a manifest \(btad, dagm"):
        find_source("nowhere", None, None)


def test_manifest_complete_has_no_faults(three: Path):
    source = find_source(str(three / "three.toml"), three / "root", None)
    assert [p.name for p in source.photographs] == [
        "a/train/000.png",
        "a/train/001.png",
        "a/test/000.png",
    ]
    assert source.report.faults == []


def test_manifest_names_missing_numbers_and_folders(three: Path):
    grey_png(three / "root/a/train/003.png")
    (three / "root/a/train/001.png").unlink()
    (three / "root/a/test/000.png").unlink()
    (three / "root/a/test").rmdir()
    source = find_source(str(three / "three.toml"), three / "root", None)
    assert source.report.faults == [
        "missing: a/train/001.png",
        "missing: a/train/002.png",
        "missing: a/test/",
        "a: expected 3 images, found 2",
    ]


def test_manifest_names_surplus_files(three: Path):
    grey_png(three / "root/a/test/001.png")
    source = find_source(str(three / "three.toml"), three / "root", None)
    assert source.report.faults == ["a: expected 3 images, found 4", "surplus: a/test/001.png"]
    (three / "root/a/test/001.png").rename(three / "root/a/train/copy of 000.png")
    source = find_source(str(three / "three.toml"), three / "root", None)
    assert source.report.faults[-1] == "surplus: a/train/copy of 000.png"


def test_manifest_leaves_out_labelled_images(three: Path):
    grey_png(three / "root/a/test/001.png")
    grey_png(three / "root/a/test/Label/001_label.PNG")
    source = find_source(str(three / "three.toml"), three / "root", None)
    assert source.report.faults == []
    assert len(source.photographs) == 3


def test_manifest_without_root_or_data_says_how_to_get_it(three: Path):
    with pytest.raises(BuilderError, match=r"--root DIR \(make it\)"):
        find_source(str(three / "three.toml"), None, None)
    with pytest.raises(BuilderError, match="no image of three found; expected a/train/"):
        find_source(str(three / "three.toml"), three, None)
    with pytest.raises(BuilderError, match="no such folder"):
        find_source(str(three / "three.toml"), three / "nowhere", None)


# Counts as published: BTAD 1,799 train + 451 test normal images, MVTec AD 3,629, DAGM 6 x 1,000.
@pytest.mark.parametrize(
    ("name", "categories", "images"),
    [("btad", 3, 2250), ("mvtec_ad", 15, 3629), ("dagm2007", 6, 6000)],
)
def test_shipped_manifest_expects_the_published_counts(name: str, categories: int, images: int):
    manifest = read_toml(Manifest, MANIFESTS / f"{name}.toml")
    assert len(manifest.normals) == categories
    assert sum(entry.expected or 0 for entry in manifest.normals) == images


def test_shipped_manifests_are_four():
    assert shipped_manifests() == ["btad", "dagm2007", "demo", "mvtec_ad"]


def test_prepared_normal_is_upright_square_and_lossless(tmp_path: Path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 200  # the left half is light
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    fault, webp = prepare_normal(path, 16, 3).fault, prepare_normal(path, 16, 3).encoded
    image = decode_pixels(webp, 3)
    assert fault == ""
    assert image.shape == (16, 16, 3)
    assert (image[:6] > 195).all()
    assert (image[-6:] < 5).all()


def test_prepared_normal_scales_16_bit_grey(tmp_path: Path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((16, 16), 257 * 77, np.uint16)).save(path)
    assert (decode_pixels(prepare_normal(path, 16, 1).encoded, 1) == 77).all()


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"no image", "not an image"), (b"", "not an image"), (b"\x89PNG\r\n\x1a\n", "not an image")],
)
def test_unreadable_photograph_is_a_fault(tmp_path: Path, content: bytes, fault: str):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    assert prepare_normal(path, 16, 3).fault == fault


def test_cut_photograph_is_a_fault(tmp_path: Path):
    path = write_photographs(tmp_path, 1) / "steel" / "000.png"
    path.write_bytes(path.read_bytes()[:900])
    assert prepare_normal(path, 16, 3).fault.startswith("unreadable (")


def test_decompression_bomb_is_a_fault(tmp_path: Path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert prepare_normal(path, 16, 3).fault == "more than 89 million pixels"


def test_transparent_photograph_is_a_fault(tmp_path: Path):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    pixels[0, 0, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    assert prepare_normal(tmp_path / "opaque.png", 16, 3).fault == ""
    assert prepare_normal(tmp_path / "clear.png", 16, 3).fault.startswith("unreadable (transp")


def test_photograph_of_several_frames_is_a_fault(tmp_path: Path):
    first, second = Image.new("L", (8, 8), 10), Image.new("L", (8, 8), 200)
    first.save(tmp_path / "two.tif", save_all=True, append_images=[second])
    assert prepare_normal(tmp_path / "two.tif", 16, 3).fault.startswith("unreadable (several fr")


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "LA"])
def test_photograph_of_another_mode_is_converted(tmp_path: Path, mode: str):
    path = tmp_path / "odd.tif"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert (decode_pixels(prepare_normal(path, 16, 3).encoded, 3) == 255).all()


def test_folder_links_are_followed_and_other_files_counted(photographs: Path, tmp_path: Path):
    (tmp_path / "linked").symlink_to(photographs / "wood")
    (tmp_path / "notes.txt").write_text("")
    source = find_source(str(tmp_path), None, None)
    assert [p.category for p in source.photographs] == ["linked"] * 3
    assert source.report.other_files == 1


def test_link_in_a_circle_is_refused(tmp_path: Path):
    grey_png(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    with pytest.raises(BuilderError, match="leads in a circle"):
        find_source(str(tmp_path), None, None)


def test_file_name_that_is_not_utf8_is_refused(tmp_path: Path):
    grey_png(tmp_path / "1.png").rename(tmp_path / os.fsdecode(b"b\xff.png"))
    with pytest.raises(BuilderError, match="not UTF-8; rename it"):
        find_source(str(tmp_path), None, None)


@pytest.mark.parametrize("folder", ["/etc", "../other"])
def test_manifest_with_a_folder_elsewhere_is_refused(three: Path, folder: str):
    path = three / "three.toml"
    path.write_text(path.read_text().replace("a/test", folder))
    with pytest.raises(BuilderError, match="must lie below --root"):
        find_source(str(path), three / "root", None)


def test_rejected_photographs_are_counted_by_reason(photographs: Path):
    source = find_source(str(photographs), None, None)
    first, second, *_ = source.photographs
    report = count_kept(source.report, [(first, "not an image"), (second, "unreadable (cut)")])
    steel = report.categories[0]
    assert (steel.found, steel.kept) == (3, 1)
    assert steel.rejected == {"not an image": 1, "unreadable": 1}
    assert report.faults == ["not an image: steel/000.png", "unreadable (cut): steel/002.bmp"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("codec", ["webp", "png"])
def test_lossless_codec_returns_the_pixels(channels: int, codec: str):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, channels)).astype(np.uint8)
    assert (decode_pixels(encode_pixels(pixels, codec), channels) == pixels).all()


def test_jpeg_keeps_full_colour_resolution():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, ::2] = [255, 0, 0]
    pixels[:, 1::2] = [0, 0, 255]
    image = decode_pixels(encode_pixels(pixels, "jpeg"), 3)
    assert np.abs(image.astype(int) - pixels).max() < 40  # subsampled colour would be off by 127
