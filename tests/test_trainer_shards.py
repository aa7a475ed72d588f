"""The reader: what it reads, and one line for everything that it must refuse."""

from __future__ import annotations

import io
import json
import mmap
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import slots
from tests.parameters_by_hand import write_parameters
from tests.shards_by_hand import cut, flip_byte, npy_bytes, rehash, write_dataset
from trainer.cache import Cache
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.index import BadShard, index_shard
from trainer.shards import first_samples, open_shard, read_normals
from trainer.storage import Folder

SHARD = "data/train-00001-of-00003.tar"
NORMALS = "normals/normals-00000-of-00001.tar"


def indexed(folder: Path) -> list[np.ndarray]:
    """Verify and index every shard, and read the normals."""
    storage, cache = Folder(folder), Cache(folder / "cache", 0)
    dataset = read_dataset(storage)
    read_normals(storage, cache, dataset)
    found = []
    for number, first in enumerate(first_samples(dataset.shards)[:-1]):
        with open_shard(storage, cache, dataset.shards[number]) as opened:
            found.append(index_shard(opened.file.read(), dataset, number, first))
    return found


def refusal(folder: Path) -> str:
    with pytest.raises(TrainerError) as error:
        indexed(folder)
    assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize(
    ("suffix", "channels"), [("webp", 3), ("webp", 1), ("png", 3), ("png", 1), ("jpg", 3)]
)
def test_rows_say_where_samples_lie(tmp_path: Path, suffix: str, channels: int) -> None:
    held = write_dataset(tmp_path, suffix=suffix, channels=channels)
    for path, rows in zip(sorted((tmp_path / "data").iterdir()), indexed(tmp_path), strict=True):
        np.testing.assert_array_equal(rows, slots.index(path))
    storage = Folder(tmp_path)
    table = read_normals(storage, Cache(tmp_path / "cache", 0), read_dataset(storage))
    np.testing.assert_array_equal(table, np.stack(held["normals"]))


def test_rows_of_parameters_say_where_thetas_lie(tmp_path: Path) -> None:
    held = write_parameters(tmp_path)
    shards = sorted((tmp_path / "data").iterdir())
    assert [path.name for path in shards] == [f"theta-0000{i}-of-00003.tar" for i in range(3)]
    found = indexed(tmp_path)
    for path, rows in zip(shards, found, strict=True):
        np.testing.assert_array_equal(rows, slots.index(path))
    start, count = found[1][2, 2:4].tolist()
    data = shards[1].read_bytes()[start : start + count]
    np.testing.assert_array_equal(np.frombuffer(data, "<f4"), held["thetas"][6])
    assert found[1][:, 4].tolist() == [1, 2, 0, 1]


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


@pytest.mark.parametrize("kind", ["data", "normals"])
def test_count_that_the_shard_has_no_room_for_is_refused(tmp_path: Path, kind: str) -> None:
    write_dataset(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    if kind == "data":
        index["shards"][1]["samples"] += 10**6
        index["samples"] += 10**6
    else:
        index["normals"]["shards"][0]["samples"] += 10**6
        index["normals"]["count"] += 10**6
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert "bytes cannot hold the 100000" in refusal(tmp_path)


@pytest.mark.parametrize("value", [10**13, 10**18, 10**19, 10**30, -1, 1.5])
@pytest.mark.parametrize(
    "path",
    [
        ("samples",),
        ("theta", "components"),
        ("theta", "length"),
        ("normals", "count"),
        ("normals", "shards", 0, "samples"),
        ("shards", 1, "samples"),
        ("shards", 1, "bytes"),
        ("image", "size_px"),
    ],
)
def test_number_that_cannot_be_is_refused(
    tmp_path: Path, path: tuple[str | int, ...], value: float
) -> None:
    write_dataset(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    *parents, key = path
    place = index
    for parent in parents:
        place = place[parent]
    place[key] = value
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(TrainerError) as error:
        read_dataset(tmp_path)
    assert "\n" not in error.value.message


def test_more_normals_than_memory_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    normals, count = index["normals"], 10**7
    index["image"]["size_px"] = 4096
    normals["shards"][0] |= {"samples": count, "bytes": 1024 * count}
    normals["count"] = count
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    line = refusal(tmp_path)
    assert f"{count} normal images of 4096 px take {count * 3 * 4096**2} bytes, more memory" in line


def test_large_members_are_refused_by_their_headers_alone(tmp_path: Path) -> None:
    held = 70_000  # more than 4 * 16 * 16 * 3 + 65536 bytes
    write_dataset(
        tmp_path / "image",
        edit=lambda name, data: data + bytes(held) if name == "000000005.webp" else data,
    )
    assert "000000005: image of 7" in refusal(tmp_path / "image")
    write_dataset(
        tmp_path / "theta",
        edit=lambda name, data: data + bytes(2**24) if name == "000000005.theta.npy" else data,
    )
    storage, cache = Folder(tmp_path / "theta"), Cache(tmp_path / "cache", 0)
    dataset = read_dataset(storage)
    with open_shard(storage, cache, dataset.shards[1]) as opened:
        view = mmap.mmap(opened.file.fileno(), 0, access=mmap.ACCESS_READ)
    tracemalloc.start()
    with pytest.raises(BadShard, match=r"000000005: theta.npy 16777292 bytes of data, expected 76"):
        index_shard(view, dataset, 1, 4)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


PARAMETER_EDITS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "nan": ("theta.npy", lambda d: theta_at(d, 1, 3, np.nan), "000000005: theta breaks the rule"),
    "rho": (
        "theta.npy",
        lambda d: theta_at(d, 3, 7, 2),
        "000000007: theta breaks the rule",
    ),
    "rows": ("theta.npy", lambda d: npy_bytes(np.zeros((5, 19), "f4")), "holds {'descr': '<f4'"),
    "cut": ("theta.npy", lambda d: d[:-4], "300 bytes of data, expected 304"),
    "pickled": (
        "theta.npy",
        lambda d: npy_bytes(np.array([[None] * 19] * 4, dtype=object)),
        "holds {'descr': '|O'",
    ),
    "fortran": (
        "theta.npy",
        lambda d: npy_bytes(np.zeros((19, 4), "f4").T),
        "'fortran_order': True",
    ),
    "header of 65 kB": (
        "theta.npy",
        lambda d: d[:8] + b"\xff\xff" + d[10:],
        "has a header that cannot be read",
    ),
    "normal beyond": (
        "normal.npy",
        lambda d: npy_bytes(np.array([0, 0, 3, 0], "<i4")),
        "000000006: normal.npy names the normal 3, the dataset has 3",
    ),
    "normal below": (
        "normal.npy",
        lambda d: npy_bytes(np.array([0, -1, 0, 0], "<i4")),
        "000000005: normal.npy names the normal -1",
    ),
    "normal int64": ("normal.npy", lambda d: npy_bytes(np.zeros(4, "<i8")), "holds {'descr': '<i8"),
}


def theta_at(data: bytes, row: int, position: int, value: float) -> bytes:
    thetas = np.load(io.BytesIO(data)).copy()
    thetas[row, position] = value
    return npy_bytes(thetas)


@pytest.mark.parametrize("name", PARAMETER_EDITS)
def test_bad_parameters_are_refused_with_shard_and_key(tmp_path: Path, name: str) -> None:
    suffix, change, message = PARAMETER_EDITS[name]
    target = f"000000004.{suffix}"
    write_parameters(tmp_path, edit=lambda member, data: change(data) if member == target else data)
    line = refusal(tmp_path)
    assert message in line
    assert "theta-00001-of-00003.tar: 00000000" in line


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (b"77777777777\0", "of 8589934591 bytes lies outside the file"),
        (b"\x80" + bytes(5) + b"\x02" + bytes(5), "with a readable size"),  # 10 GB, in base 256
        (b"-0000000001\0", "with a readable size"),
        (b"00000000000\0", "of 0 bytes lies outside the file"),
    ],
)
def test_size_that_cannot_be_is_refused(tmp_path: Path, field: bytes, message: str) -> None:
    write_dataset(tmp_path)
    data = bytearray((tmp_path / SHARD).read_bytes())
    data[124:136] = field
    (tmp_path / SHARD).write_bytes(data)
    rehash(tmp_path)
    assert message in refusal(tmp_path)


def test_shard_with_more_samples_than_said_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    index["shards"][1]["samples"] -= 1
    index["samples"] -= 1
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert "found member '000000007.webp' where the end belongs" in refusal(tmp_path)


def test_shard_with_fewer_samples_than_said_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    index["shards"][2]["samples"] += 1
    index["samples"] += 1
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert "ends before '000000010.webp'" in refusal(tmp_path)


def test_fault_of_one_shard_is_told_from_others(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    flip_byte(tmp_path / SHARD, 700)
    with pytest.raises(BadShard):
        indexed(tmp_path)


def test_shards_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_parameters(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    index["contents"] = "images"
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert "number of shards named data/train-* is 0" in refusal(tmp_path)
