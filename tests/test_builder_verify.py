import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from builder.cli import main
from builder.verify import verify
from tests.forging import FIRST, NORMALS, SECOND, edit, edit_theta, forge, kinds
from tests.shards_by_hand import cut, flip_byte, image_bytes
from tests.test_builder_build import run


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


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


def test_image_of_another_kernel_may_differ_by_one_grey_level(photographs: Path, tmp_path: Path):
    out = tmp_path / "out"
    run(photographs, out, codec="png", samples=2, samples_per_shard=2)
    shard, key = "data/train-00000-of-00001.tar", "000000001"

    def lighter(levels: int) -> None:
        def altered(name: str, data: bytes) -> bytes:
            if name != f"{key}.png":
                return data
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image).copy()
            pixels[3, 4] = np.where(
                pixels[3, 4] < 128, pixels[3, 4] + levels, pixels[3, 4] - levels
            )
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            return file.getvalue()

        edit(out / shard, altered)
        forge(out)

    lighter(1)
    assert kinds(verify(str(out), rerender=2, jobs=1)) == [("rerender", shard, key)]
    for name in ("plan.json", "dataset.json"):
        fields = json.loads((out / name).read_text())
        fields["environment"]["kernel"] = "0123456789abcdef"
        (out / name).write_text(json.dumps(fields))
    forge(out)
    found = verify(str(out), rerender=2, jobs=1)
    assert found.faults == []
    assert found.notes[0].startswith("images are of kernel 0123456789abcdef, here is ")
    lighter(1)
    assert kinds(verify(str(out), rerender=2, jobs=1)) == [("rerender", shard, key)]


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
