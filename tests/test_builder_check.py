import io
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builder.check import MAX_FAULTS_PER_SHARD
from builder.check_image import image_fault
from builder.index import ImageFormat
from builder.tar import check_header, make_header
from builder.verify import verify
from tests.forging import SECOND, edit, forge, kinds
from tests.shards_by_hand import cut, flip_byte, npy_bytes


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mtime", 1, "header: mtime expected '00000000000', found '00000000001'"),
        ("mode", 0o755, "header: mode expected '0000644', found '0000755'"),
        ("uid", 1, "header: uid expected '0000000', found '0000001'"),
        ("gname", "a", "header: group name expected '', found 'a'"),
        ("type", tarfile.SYMTYPE, "header: type expected '0', found '2'"),
        ("name", "../x", "header: name expected '000000006.webp', found '../x'"),
    ],
)
def test_header_that_another_tool_wrote_is_found(
    field: str, value: object, message: str, copy: Path
):
    edit(copy / SECOND, lambda _, data: data, **{field: value})
    forge(copy)
    found = verify(str(copy), jobs=1)
    assert {kind for kind, _, _ in kinds(found)} == {"tar"}
    assert found.faults[0].message == message
    # 6 samples of 3 members each, of which ten faults are kept
    walks_on = field not in ("type", "name")
    assert len(found.faults) == (MAX_FAULTS_PER_SHARD if walks_on else 1)
    assert found.counts.faults_left_out == (18 - MAX_FAULTS_PER_SHARD if walks_on else 0)


def append(data: bytes, path: Path) -> None:
    path.write_bytes(path.read_bytes() + data)


def fill_padding(path: Path) -> None:
    with tarfile.open(path) as tar:
        member = tar.getmember("000000008.json")
    flip_byte(path, member.offset_data + member.size)


def drop_a_sample(path: Path) -> None:
    with tarfile.open(path) as tar:
        eighth, ninth = (tar.getmember(f"00000000{i}.webp").offset for i in (8, 9))
    data = path.read_bytes()
    path.write_bytes(data[:eighth] + data[ninth:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (partial(append, bytes(512)), "bytes after the end of the archive"),
        (lambda path: cut(path, -512), "expected two blocks of zeros after the last member"),
        (lambda path: cut(path, -1024 - 512), "the file ends inside 000000011.json"),
        (fill_padding, "000000008.json: padding is not zero"),
        (
            drop_a_sample,
            "header: name expected '000000008.webp', found '000000009.webp'",
        ),
    ],
    ids=["long", "one end block", "cut member", "padding", "dropped sample"],
)
def test_tar_with_forged_hashes_is_found(damage, message: str, copy: Path):
    damage(copy / SECOND)
    forge(copy)
    found = verify(str(copy), jobs=1)
    assert [(fault.kind, fault.message) for fault in found.faults] == [("tar", message)]


def other_npy(theta: np.ndarray, version: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, theta, version=version)
    return file.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda theta: other_npy(theta, (2, 0)),
        lambda theta: npy_bytes(theta.astype(">f4")),
        lambda theta: npy_bytes(theta[:-1]),
        lambda theta: npy_bytes(theta)[:-2],
    ],
    ids=["version 2", "big-endian", "short", "cut"],
)
def test_npy_of_another_kind_is_found(change, copy: Path):
    edit(
        copy / SECOND,
        lambda name, x: change(np.load(io.BytesIO(x))) if name == "000000008.theta.npy" else x,
    )
    forge(copy)
    found = verify(str(copy), rerender=20, jobs=1)
    assert kinds(found) == [("npy", SECOND, "000000008")]


def encoded(size: tuple[int, int], mode: str = "RGB", kind: str = "WEBP", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


WEBP = ImageFormat(size_px=32, channels=3, codec="webp", suffix="webp", lossless=True)
PNG = WEBP.model_copy(update={"codec": "png"})


@pytest.mark.parametrize(
    ("data", "image", "fault"),
    [
        (encoded((32, 32), lossless=True), WEBP, ""),
        (encoded((32, 32), lossless=True, icc_profile=b"profile"), WEBP, ""),
        (encoded((32, 33), lossless=True), WEBP, "32 x 33 pixels, expected 32 x 32"),
        (encoded((33, 32), lossless=True, icc_profile=b"p"), WEBP, "33 x 32 pixels, expected"),
        (encoded((32, 32)), WEBP, "not a lossless WebP"),
        (encoded((32, 32), lossless=True) + b"more", WEBP, "WebP of"),
        (encoded((32, 32), kind="PNG"), WEBP, "not a WebP"),
        (encoded((32, 32), kind="PNG"), PNG, ""),
        (encoded((31, 32), kind="PNG"), PNG, "31 x 32 pixels"),
        (encoded((32, 32), "L", "PNG"), PNG, "mode L, expected RGB"),
        (encoded((32, 32), lossless=True), PNG, "not readable as PNG"),
        (encoded((10_000, 10_000), "1", "PNG"), PNG, "more than 89 million pixels"),
        (b"", WEBP, "not a WebP"),
    ],
)
def test_image_is_judged_by_its_header(data: bytes, image: ImageFormat, fault: str):
    found = image_fault(data, image.codec, image)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


@given(st.text("abz019.-_", min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_header_is_that_of_tarfile(name: str, size: int):
    info = tarfile.TarInfo(name)
    info.size = size
    expected = info.tobuf(tarfile.USTAR_FORMAT)
    assert make_header(name.encode(), size) == expected
    assert check_header(expected, name.encode()) == (size, [])


@given(st.integers(0, 511), st.integers(1, 255))
def test_header_with_another_byte_is_refused(position: int, flip: int):
    header = bytearray(make_header(b"000000007.webp", 1234))
    header[position] ^= flip
    check = check_header(bytes(header), b"000000007.webp")
    assert check.faults
    assert check.size == -1
