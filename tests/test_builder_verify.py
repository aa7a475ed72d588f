import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builder.check import MAX_FAULTS_PER_SHARD
from builder.check_image import image_fault
from builder.cli import main
from builder.index import ImageFormat
from builder.plan import read_plan
from builder.storage import open_storage
from builder.tar import check_header, make_header
from builder.verification import Verification
from builder.verify import verify
from tests.shards_by_hand import cut, flip_byte, image_bytes, npy_bytes, rehash
from tests.test_builder_build import run

FIRST, SECOND = "data/train-00000-of-00004.tar", "data/train-00001-of-00004.tar"
NORMALS = "normals/normals-00000-of-00001.tar"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def kinds(found: Verification) -> list[tuple[str, str, str]]:
    return [(fault.kind, fault.shard, fault.key) for fault in found.faults]


def forge(folder: Path) -> None:
    """Make index, plan and records agree with the shards as they are now: a careful forger."""
    rehash(folder)
    index = json.loads((folder / "dataset.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    plan["normals"] = index["normals"]
    (folder / "plan.json").write_text(json.dumps(plan))
    plan_sha256 = read_plan(open_storage(str(folder))).sha256
    for shard in index["shards"]:
        record = folder / "records" / Path(shard["name"]).with_suffix(".json").name
        fields = {**json.loads(record.read_text()), "plan_sha256": plan_sha256, "shard": shard}
        record.write_text(json.dumps(fields))


def edit(path: Path, change: Callable[[str, bytes], bytes], **header: object) -> None:
    """Write a tar again with its members' bytes and headers changed."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    file = io.BytesIO()
    for name, data in members:
        info = tarfile.TarInfo(name)
        data = change(name, data)
        info.size = len(data)
        for field, value in header.items():
            setattr(info, field, value)
        file.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
    path.write_bytes(file.getvalue() + bytes(1024))


def edit_theta(folder: Path, name: str, index: int, value: float) -> None:
    def change(member: str, data: bytes) -> bytes:
        if member != name:
            return data
        theta = np.load(io.BytesIO(data))
        theta[index] = value
        return npy_bytes(theta)

    edit(folder / SECOND, change)
    forge(folder)


def test_whole_dataset_has_no_fault_and_the_counts_add_up(dataset: Path):
    found = verify(str(dataset), rerender=5, jobs=1)
    assert found.faults == []
    assert found.notes == []
    counts = found.counts
    assert (counts.data_shards, counts.normals_shards, counts.shards_read) == (4, 1, 5)
    assert (counts.samples, counts.normals, counts.records) == (20, 6, 4)
    assert (counts.redrawn, counts.differing, counts.rerendered) == (20, 0, 5)
    assert counts.bytes == sum(path.stat().st_size for path in dataset.rglob("*.tar"))


def offset(path: Path, member: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(member).offset


def cut_at_a_member(folder: Path) -> None:
    cut(folder / SECOND, offset(folder / SECOND, "000000008.webp"))


def flip_payload(folder: Path) -> None:
    flip_byte(folder / SECOND, offset(folder / SECOND, "000000008.webp") + 512 + 200)


def flip_header(folder: Path) -> None:
    flip_byte(folder / SECOND, offset(folder / SECOND, "000000008.webp") + 140)


def swap(folder: Path) -> None:
    first = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes((folder / SECOND).read_bytes())
    (folder / SECOND).write_bytes(first)


def remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def add(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"?")


def take_record_of_another_plan(folder: Path) -> None:
    path = folder / "records/train-00001-of-00004.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "plan_sha256": "0" * 64}))


def take_record_of_another_shard(folder: Path) -> None:
    records = folder / "records"
    shutil.copy(records / "train-00000-of-00004.json", records / "train-00001-of-00004.json")


def take_plan_of_another_seed(folder: Path) -> None:
    path = folder / "plan.json"
    plan = json.loads(path.read_text())
    plan["recipe"]["seed"] = 1
    path.write_text(json.dumps(plan))


RECORD = "records/train-00001-of-00004.json"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_at_a_member, [("length", SECOND, ""), ("tar", SECOND, "000000008")]),
        (flip_payload, [("sha256", SECOND, "")]),
        (flip_header, [("tar", SECOND, "000000008"), ("sha256", SECOND, "")]),
        (swap, [("swapped", FIRST, ""), ("swapped", SECOND, "")]),
        (partial(remove, SECOND), [("missing", SECOND, "")]),
        (partial(add, "data/more.txt"), [("surplus", "data/more.txt", "")]),
        (partial(add, "more.txt"), [("surplus", "more.txt", "")]),
        (partial(add, "a/b/more"), [("surplus", "a/b/more", "")]),
        (partial(add, "data/.x.tmp-1"), [("surplus", "data/.x.tmp-1", "")]),
        (take_record_of_another_plan, [("record", RECORD, "")]),
        (take_record_of_another_shard, [("record", RECORD, "")]),
    ],
    ids=[
        "cut at a member", "flipped payload", "flipped header", "swapped", "missing",
        "surplus in data", "surplus at the root", "surplus in a folder", "temporary",
        "record of another plan", "record of another shard",
    ],
)  # fmt: skip
def test_damage_is_found(damage, expected: list[tuple[str, str, str]], copy: Path):
    damage(copy)
    assert kinds(verify(str(copy), jobs=1)) == expected


def test_missing_normals_are_found_and_nothing_is_rendered(copy: Path):
    (copy / NORMALS).unlink()
    found = verify(str(copy), rerender=3, jobs=1)
    assert kinds(found) == [("missing", NORMALS, "")]
    assert found.notes == ["nothing was rendered again: the normals are damaged"]


def test_plan_of_another_recipe_is_found(copy: Path):
    take_plan_of_another_seed(copy)
    found = verify(str(copy), jobs=1)
    assert ("plan", "plan.json", "") in kinds(found)
    assert "recipe is not that of dataset.json" in found.faults[0].message


def test_edited_theta_with_forged_hashes_is_no_draw_of_the_recipe(copy: Path):
    edit_theta(copy, "000000008.theta.npy", 0, 0.5)
    found = verify(str(copy), rerender=20, jobs=1)
    assert kinds(found) == [
        ("draw", SECOND, "000000008"),
        ("rerender", SECOND, "000000008"),
    ]
    assert "value 0 expected" in found.faults[0].message
    assert found.faults[0].message.endswith("found 0.5")
    assert found.counts.differing == 1


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_theta_out_of_its_ranges_is_found(value: float, copy: Path):
    edit_theta(copy, "000000008.theta.npy", 270, value)
    found = verify(str(copy), rerender=20, jobs=1)
    assert kinds(found) == [("theta", SECOND, "000000008"), ("draw", SECOND, "000000008")]
    assert found.faults[0].message == "theta: breaks s in [0, 1]"


def test_edited_normal_with_forged_hashes_is_found_by_rendering(copy: Path):
    chosen = {}
    with tarfile.open(copy / FIRST) as tar:
        for i in range(6):
            file = tar.extractfile(f"{i:09d}.json")
            assert file is not None
            chosen[f"{i:09d}"] = json.load(file)["normal"]
    key, normal = chosen.popitem()

    def change(member: str, data: bytes) -> bytes:
        if member != f"{normal}.webp":
            return data
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image).copy()
        pixels[0, 0] ^= 64
        return image_bytes(pixels, "webp")

    edit(copy / NORMALS, change)
    forge(copy)
    assert verify(str(copy), jobs=1).faults == []
    found = verify(str(copy), rerender=20, jobs=1)
    assert ("rerender", FIRST, key) in kinds(found)
    assert {kind for kind, _, _ in kinds(found)} == {"rerender"}


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        (b'"category": "', b'"category": "x', "json", "category: expected '"),
        (b'"index": 8', b'"index": 9', "json", "index: expected 8, found 9"),
        (b"{", b'{"label": 1, ', "json", "unknown field 'label'"),
        (b": ", b":", "json", "not in the builder's own bytes"),
        (b'"normal": "00000000', b'"normal": "10000000', "json", "normal: expected a key below"),
        (b"{", b"[", "json", "normal: expected a key below"),
    ],
)
def test_edited_json_is_found(old: bytes, new: bytes, kind: str, message: str, copy: Path):
    edit(copy / SECOND, lambda name, x: x.replace(old, new) if name == "000000008.json" else x)
    forge(copy)
    found = verify(str(copy), jobs=1)
    assert kinds(found) == [(kind, SECOND, "000000008")]
    assert found.faults[0].message.startswith(message)


def test_another_choice_of_normal_is_no_draw_of_the_recipe(copy: Path):
    def change(name: str, data: bytes) -> bytes:
        if name != "000000008.json":
            return data
        fields = json.loads(data)
        number = int(fields["normal"])  # its neighbour in the same category
        other = number + 1 if number % 3 < 2 else number - 1
        return json.dumps({**fields, "normal": f"{other:09d}"}).encode()

    edit(copy / SECOND, change)
    forge(copy)
    assert kinds(verify(str(copy), jobs=1)) == [("draw", SECOND, "000000008")]


def test_edited_provenance_is_found(copy: Path):
    edit(copy / NORMALS, lambda name, x: x.replace(b"CC0-1.0", b"CC0-2.0"))
    forge(copy)
    found = verify(str(copy), jobs=1)
    assert kinds(found) == [("json", NORMALS, f"{i:09d}") for i in range(6)]
    assert found.faults[0].message == "licence: expected 'CC0-1.0', found 'CC0-2.0'"


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


@pytest.mark.parametrize(
    ("codec", "channels"), [("jpeg", 3), ("png", 1), ("webp", 1)], ids=["jpeg", "png", "grey webp"]
)
def test_other_codecs_render_and_rebuild_to_the_same(
    codec: str, channels: int, photographs: Path, tmp_path: Path
):
    out = tmp_path / "out"
    run(photographs, out, codec=codec, channels=channels, samples=7)
    found = verify(str(out), rerender=7, rebuilds=2, jobs=1)
    assert found.faults == []
    assert (found.counts.rerendered, found.counts.rebuilt) == (7, 2)


def test_jpeg_of_another_library_may_differ_by_its_rounding_alone(
    photographs: Path, tmp_path: Path
):
    out = tmp_path / "out"
    run(photographs, out, codec="jpeg", samples=2, samples_per_shard=2)
    shard, key = "data/train-00000-of-00001.tar", "000000001"

    def altered(name: str, data: bytes) -> bytes:
        if name != f"{key}.jpg":
            return data
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image)
        return encoded_pixels(pixels)

    edit(out / shard, altered)
    forge(out)
    found = verify(str(out), rerender=2, jobs=1)
    assert kinds(found) == [("rerender", shard, key)]

    for name in ("plan.json", "dataset.json"):
        fields = json.loads((out / name).read_text())
        fields["environment"]["libjpeg"] = "turbo 0.1"
        (out / name).write_text(json.dumps(fields))
    forge(out)
    found = verify(str(out), rerender=2, jobs=1)
    assert found.faults == []
    assert found.notes[0].startswith("JPEGs are of libjpeg turbo 0.1, here is ")

    with Image.open(photographs / "wood/001.bmp") as photograph:
        other = encoded_pixels(np.asarray(photograph.convert("RGB").resize((32, 32))))
    edit(out / shard, lambda name, x: other if name == f"{key}.jpg" else x)
    forge(out)
    assert kinds(verify(str(out), rerender=2, jobs=1)) == [("rerender", shard, key)]


def encoded_pixels(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def test_rebuilt_shards_that_differ_are_named_with_the_member(copy: Path):
    edit_theta(copy, "000000008.theta.npy", 0, 0.5)
    found = verify(str(copy), rebuilds=4, jobs=1)
    assert kinds(found) == [("rebuild", SECOND, ""), ("draw", SECOND, "000000008")]
    assert found.faults[0].message.endswith("in 000000008.theta.npy")


def test_machine_that_makes_other_bytes_says_so_in_one_line(copy: Path):
    for name in ("plan.json", "dataset.json"):
        fields = json.loads((copy / name).read_text())
        fields["environment"]["libwebp"] = "0.0.1"
        for golden in fields.get("goldens", []):
            golden["encoded_sha256"] = "0" * 64
        (copy / name).write_text(json.dumps(fields))
    forge(copy)
    found = verify(str(copy), rebuilds=4, jobs=1)
    assert kinds(found) == [("rebuild", "plan.json", "")]
    assert "other webp bytes than the plan: libwebp" in found.faults[0].message


def test_several_processes_find_the_same(copy: Path):
    flip_payload(copy)
    two = verify(str(copy), rerender=20, jobs=2)
    one = verify(str(copy), rerender=20, jobs=1)
    assert two.faults == one.faults
    assert two.counts == one.counts


def test_command_prints_a_line_a_fault_and_writes_the_report(copy: Path, tmp_path: Path):
    words = ["verify", str(copy), "--jobs", "1", "--report", str(tmp_path / "report.json")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "no fault" in result.output
    flip_payload(copy)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert result.output.startswith(f"sha256: {SECOND}: SHA-256 expected ")
    assert ": 1 fault: " in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["format"], report["format_version"]) == ("semiformula-verification", 1)
    assert report["faults"][0]["shard"] == SECOND
    assert report["counts"]["shards_read"] == 5


def test_published_dataset_without_plan_and_records_verifies(copy: Path):
    shutil.rmtree(copy / "records")
    (copy / "plan.json").unlink()
    (copy / "README.md").write_text("card")
    found = verify(str(copy), rebuilds=1, jobs=1)
    assert found.faults == []
    assert found.counts.rebuilt == 1
    assert found.notes == [
        "no plan.json: records are compared with dataset.json alone",
        "4 of 4 shards have no record",
    ]


def test_unfinished_dataset_is_one_line(copy: Path):
    (copy / "dataset.json").unlink()
    result = CliRunner().invoke(main, ["verify", str(copy)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {copy}/dataset.json: no such file; finish")


class _Files(BaseHTTPRequestHandler):
    """Serves files and lists nothing, as most web servers do."""

    root: Path

    def do_GET(self) -> None:
        path = self.root / self.path.lstrip("/")
        data = path.read_bytes() if path.is_file() else b""
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_dataset_behind_a_web_server_is_verified_without_listing(copy: Path):
    flip_payload(copy)
    server = HTTPServer(("127.0.0.1", 0), type("Files", (_Files,), {"root": copy}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    program = [sys.executable, "-m", "builder", "verify", url, "--jobs", "1"]
    run = subprocess.run(program, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert run.returncode == 1, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith(f"sha256: {SECOND}: ")
    assert lines[1] == "note: surplus files were not looked for: this storage cannot be listed"
    assert lines[-1].endswith(f": 1 fault: {url}")
