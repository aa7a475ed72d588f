"""The reader: what it reads, and one line for everything that it must refuse."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.shards_by_hand import cut, flip_byte, npy_bytes, rehash, write_dataset
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.shards import ShardSamples, index_samples, read_normals

SHARD = "data/train-00001-of-00003.tar"
NORMALS = "normals/normals-00000-of-00001.tar"


def open_samples(folder: Path) -> ShardSamples:
    dataset = read_dataset(folder)
    read_normals(folder, dataset)
    return ShardSamples(folder, dataset, index_samples(folder, dataset))


def refusal(folder: Path) -> str:
    with pytest.raises(TrainerError) as error:
        open_samples(folder)
    assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize(("suffix", "channels"), [("webp", 3), ("webp", 1), ("png", 3), ("png", 1)])
def test_batch_gives_what_was_written(tmp_path: Path, suffix: str, channels: int) -> None:
    held = write_dataset(tmp_path, suffix=suffix, channels=channels)
    samples = open_samples(tmp_path)
    images, thetas, normal = samples.batch([7, 0, 9])
    for row, index in enumerate([7, 0, 9]):
        np.testing.assert_array_equal(images[row].numpy(), held["images"][index])
        np.testing.assert_array_equal(thetas[row].numpy(), held["thetas"][index])
    assert normal.tolist() == [1, 0, 0]
    table = read_normals(tmp_path, samples.dataset)
    np.testing.assert_array_equal(table, np.stack(held["normals"]))


def test_jpeg_batch_is_near_what_was_written(tmp_path: Path) -> None:
    write_dataset(tmp_path, suffix="jpg", size_px=32)
    images, _, _ = open_samples(tmp_path).batch(range(10))
    assert images.shape == (10, 32, 32, 3)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (lambda d: d.rename(d.with_name("gone")), "no such folder"),
    "no index": (lambda d: (d / "dataset.json").unlink(), "holds no dataset.json"),
    "cut index": (lambda d: cut(d / "dataset.json", 300), "not readable as JSON"),
    "missing shard": (lambda d: (d / SHARD).unlink(), "no such file, but dataset.json lists it"),
    "cut shard": (lambda d: cut(d / SHARD, 2048), "2048 bytes, dataset.json says"),
    "flipped byte": (lambda d: flip_byte(d / SHARD, 700), "SHA-256 differs"),
    "flipped byte in normals": (lambda d: flip_byte(d / NORMALS, 700), "SHA-256 differs"),
    "cut between members": (lambda d: recut(d), "ends without the closing blocks"),
    "shifted sample": (lambda d: swap_shards(d), "found member '000000000.webp' where"),
}


def recut(folder: Path) -> None:
    """Cut before the last member, with hashes that agree."""
    with tarfile.open(folder / SHARD) as tar:
        length = tar.getmembers()[-1].offset
    cut(folder / SHARD, length)
    rehash(folder)


def swap_shards(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / "data/train-00000-of-00003.tar").read_bytes())
    rehash(folder)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_dataset_is_refused(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path / "data set")
    damage, message = DAMAGE[name]
    damage(tmp_path / "data set")
    assert message in refusal(tmp_path / "data set")


def theta_where(position: int, value: float) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        theta = np.load(io.BytesIO(data)).copy()
        theta[position] = value
        return npy_bytes(theta)

    return edit


def other_size(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (17, 16)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def bomb(data: bytes) -> bytes:
    """A PNG header that promises 60,000 x 60,000 pixels, under a WebP's name."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(
        ">I4sIIBBBBB", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0
    )


EDITS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "theta nan": ("theta.npy", theta_where(3, float("nan")), "every value is finite"),
    "theta inf": ("theta.npy", theta_where(5, float("inf")), "every value is finite"),
    "v of 1.5": ("theta.npy", theta_where(0, 1.5), "v and mu lie in [-1, 1]"),
    "mu of -2": ("theta.npy", theta_where(4, -2), "v and mu lie in [-1, 1]"),
    "sigma 0": ("theta.npy", theta_where(6, 0), "sigma > 0"),
    "rho 1": ("theta.npy", theta_where(7, 1), "|rho| < 1"),
    "pi off": ("theta.npy", theta_where(8, 0.999), "pi >= 0 with sum 1"),
    "s of 1.1": ("theta.npy", theta_where(18, 1.1), "s lies in [0, 1]"),
    "theta float64": ("theta.npy", lambda d: npy_bytes(np.zeros(19)), "expected {'descr': '<f4'"),
    "theta of 20": ("theta.npy", lambda d: npy_bytes(np.zeros(20, "f4")), "holds {'descr'"),
    "theta object": (
        "theta.npy",
        lambda d: npy_bytes(np.array([None] * 19, dtype=object)),
        "holds {'descr': '|O'",
    ),
    "theta cut": ("theta.npy", lambda d: d[:-1], "75 bytes of data, expected 76"),
    "theta unhashable header": (
        "theta.npy",
        lambda d: d[:10] + b"{[]: 1}".ljust(len(d) - 87) + b"\n" + d[-76:],
        "has a header that cannot be read",
    ),
    "theta empty header": ("theta.npy", lambda d: d[:9], "has a header that cannot be read"),
    "index off": ("json", lambda d: d.replace(b'"index": 5', b'"index": 6'), "says index 6"),
    "normal beyond": ("json", lambda d: d.replace(b"000000002", b"000000003"), "the dataset has 3"),
    "normal a number": ("json", lambda d: d.replace(b'"000000002"', b"2"), "expected nine digits"),
    "json cut": ("json", lambda d: d[:-1], "json cannot be read"),
    "json with more": ("json", lambda d: d[:-1] + b', "x": 1}', "exactly the keys"),
    "empty json": ("json", lambda d: b"", "lies outside the file"),
}


@pytest.mark.parametrize("name", EDITS)
def test_bad_member_is_refused_with_shard_and_key(tmp_path: Path, name: str) -> None:
    suffix, change, message = EDITS[name]
    target = f"000000005.{suffix}"
    write_dataset(tmp_path, edit=lambda member, data: change(data) if member == target else data)
    line = refusal(tmp_path)
    assert message in line
    assert "000000005" in line
    assert "train-00001-of-00003.tar" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_size, "image of 17 x 16 pixels, mode RGB; dataset.json says 16 x 16"),
        (bomb, "not readable as WEBP"),
        (lambda data: data[:40], "not readable as WEBP"),
    ],
)
def test_bad_image_is_refused_with_shard_and_key(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    target = "000000005.webp"
    write_dataset(tmp_path, edit=lambda member, data: change(data) if member == target else data)
    fault = open_samples(tmp_path).__getitems__([0, 5])
    assert isinstance(fault, TrainerError)
    assert message in fault.message
    assert "train-00001-of-00003.tar: 000000005" in fault.message


def test_link_in_a_shard_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with tarfile.open(tmp_path / SHARD, "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("000000004.webp")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    rehash(tmp_path)
    assert "'000000004.webp' is not a plain USTAR file" in refusal(tmp_path)


def test_member_of_another_name_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with tarfile.open(tmp_path / SHARD, "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("../../000000004.webp")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    rehash(tmp_path)
    assert "'../../000000004.webp' where '000000004.webp' belongs" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 1, "format_version is 1, this version reads 2 only"),
        ("format", "other", "format is 'other', this version reads 'semiformula-shards' only"),
        ("samples", 11, "samples of all shards is 10, the rest of the file gives 11"),
        ("content_sha256", "0" * 64, "content_sha256 is 0000"),
        ("recipe_sha256", "0" * 64, "recipe_sha256 is 0000"),
        ("sample", 1, "unknown key 'sample'; did you mean 'samples'?"),
    ],
)
def test_index_that_disagrees_is_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    write_dataset(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    index[key] = value
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert message in refusal(tmp_path)


def test_shard_altered_after_verification_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    samples = open_samples(tmp_path)
    cut(tmp_path / SHARD, 1000)
    with pytest.raises(TrainerError, match=r"000000007: the shard became shorter"):
        samples.batch([7])


@pytest.mark.parametrize("kind", ["data", "normals"])
def test_count_that_the_shard_has_no_room_for_is_refused(tmp_path: Path, kind: str) -> None:
    write_dataset(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    if kind == "data":
        index["shards"][1]["samples"] += 10**15
        index["samples"] += 10**15
    else:
        index["normals"]["shards"][0]["samples"] += 10**15
        index["normals"]["count"] += 10**15
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert "bytes cannot hold the 1000000000000" in refusal(tmp_path)


def test_wanted_samples_alone_are_read(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    dataset = read_dataset(tmp_path)
    whole = index_samples(tmp_path, dataset)
    flip_byte(tmp_path / SHARD, 700)  # samples 4 to 7
    for wanted in (range(0, 4), range(8, 10)):
        part = index_samples(tmp_path, dataset, wanted)
        assert part.start[wanted].tolist() == whole.start[wanted].tolist()
        assert (part.start[4:8] == -1).all()
    with pytest.raises(TrainerError, match="SHA-256 differs"):
        index_samples(tmp_path, dataset, range(3, 5))
