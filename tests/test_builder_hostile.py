"""Datasets made to break a reader: `verify` names a fault, `render-from` one line; no traceback."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from builder.cli import main
from builder.errors import BuilderError
from builder.render import check_theta
from builder.verify import verify
from tests.forging import NORMALS, SECOND, edit, forge, kinds
from tests.shards_by_hand import npy_bytes


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def test_no_vectors_are_within_their_ranges():
    check_theta(np.zeros((0, 271), np.float32), 3)


def test_vector_without_components_is_refused():
    with pytest.raises(BuilderError, match="theta: expected float32"):
        check_theta(np.zeros((2, 1), np.float32), 3)


def test_shard_without_a_readable_vector_is_found(copy: Path):
    def swapped(name: str, data: bytes) -> bytes:
        if not name.endswith(".theta.npy"):
            return data
        return npy_bytes(np.load(io.BytesIO(data)).astype(">f4"))

    edit(copy / SECOND, swapped)
    forge(copy)
    found = verify(str(copy), rerender=20, jobs=1)
    assert kinds(found) == [("npy", SECOND, f"{i:09d}") for i in range(6, 12)]


def huge_canvas(data: bytes) -> bytes:
    """A WebP of 16384 x 16384 by its first header, of 32 x 32 by its picture's."""
    edge = (16383).to_bytes(3, "little")
    chunks = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + edge + edge + data[12:]
    return b"RIFF" + (len(chunks) + 4).to_bytes(4, "little") + b"WEBP" + chunks


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("json", lambda data: b"{}"),
        ("json", lambda data: b"[1]"),
        ("json", lambda data: b"\xff"),
        ("webp", huge_canvas),
        ("webp", lambda data: b"no image"),
        ("webp", lambda data: data[:60] + bytes(len(data) - 60)),
    ],
    ids=["no category", "list", "no text", "canvas", "no image", "undecodable"],
)
def test_wrong_normals_with_forged_hashes_are_found(suffix: str, change, copy: Path):
    edit(copy / NORMALS, lambda name, x: change(x) if name == f"000000002.{suffix}" else x)
    forge(copy)
    found = verify(str(copy), rerender=2, rebuilds=2, jobs=1)
    assert found.faults
    assert found.counts.rebuilt == 0
    named = {shard for _, shard, _ in kinds(found)}
    assert named in ({NORMALS}, {"normals"})


def test_unusable_scratch_folder_is_no_fault_of_the_dataset(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEMIFORMULA_SCRATCH", str(tmp_path / "file"))
    with pytest.raises(BuilderError, match=f"scratch folder {tmp_path}/file: "):
        verify(str(dataset), rerender=2, jobs=1)
    found = verify(str(dataset), rebuilds=2, jobs=1)
    assert found.faults == []
    assert found.notes[0].startswith(f"nothing of 2 shards rebuilt: scratch folder {tmp_path}/file")
    assert not found.is_rebuilt


def test_dataset_of_another_kernel_is_not_rebuilt_and_no_fault(copy: Path):
    (copy / "plan.json").unlink()
    shutil.rmtree(copy / "records")
    index = json.loads((copy / "dataset.json").read_text())
    index["environment"]["kernel"] = "0123456789abcdef"
    (copy / "dataset.json").write_text(json.dumps(index))
    found = verify(str(copy), rebuilds=1, jobs=1)
    assert found.faults == []
    assert "kernel is" in found.notes[-1]


def test_machine_that_makes_other_bytes_says_so_in_one_line(copy: Path):
    for name in ("plan.json", "dataset.json"):
        fields = json.loads((copy / name).read_text())
        fields["environment"]["libwebp"] = "0.0.1"
        for golden in fields.get("goldens", []):
            golden["encoded_sha256"] = "0" * 64
        (copy / name).write_text(json.dumps(fields))
    forge(copy)
    found = verify(str(copy), rebuilds=4, jobs=1)
    assert found.faults == []
    assert found.notes[0].startswith("nothing of 4 shards rebuilt: golden sample 0: ")
    assert "other webp bytes than the plan: libwebp" in found.notes[0]
    result = CliRunner().invoke(main, ["verify", str(copy), "--rebuild", "4", "--jobs", "1"])
    assert result.exit_code == 1
    assert ": no fault: " in result.output
    assert result.output.splitlines()[-1].startswith("Error: --rebuild 4: rebuilt 0 shards")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "path",
            "../../etc/passwd",
            "path: expected one below the photographs' root, found '../..",
        ),
        ("path", "/etc/passwd", "path: expected one below the photographs' root, found '/etc"),
        ("sha256", "zz" * 32, "sha256: expected 64 hexadecimal digits, found 'zz"),
        ("path", "steel/other.png", "photographs_sha256 is not that of the normals'"),
        ("sha256", "0" * 64, "photographs_sha256 is not that of the normals'"),
    ],
)
def test_forged_provenance_is_found(field: str, value: str, message: str, copy: Path):
    def change(name: str, data: bytes) -> bytes:
        if name != "000000002.json":
            return data
        return json.dumps({**json.loads(data), field: value}).encode()

    edit(copy / NORMALS, change)
    forge(copy)
    found = verify(str(copy), jobs=1)
    assert [fault.message[: len(message)] for fault in found.faults] == [message]


def test_normal_named_in_other_digits_is_found(copy: Path):
    def change(name: str, data: bytes) -> bytes:
        if name != "000000008.json":
            return data
        fields = json.loads(data)
        other = fields["normal"].translate({ord("0") + i: 0x660 + i for i in range(10)})
        return json.dumps({**fields, "normal": other}, ensure_ascii=False).encode()

    edit(copy / SECOND, change)
    forge(copy)
    assert kinds(verify(str(copy), jobs=1)) == [("json", SECOND, "000000008")]


def test_report_that_cannot_be_written_is_refused_before_the_work(dataset: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "report.json", Path("/proc/report.json")):
        words = ["verify", str(dataset), "--jobs", "1", "--report", str(place)]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {place}: cannot be written (")
        assert len(result.output.splitlines()) == 1


def test_interrupted_verify_promises_nothing(copy: Path):
    (copy / "dataset.json").unlink()
    os.mkfifo(copy / "dataset.json")
    words = [sys.executable, "-m", "builder", "verify", str(copy)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    with (copy / "dataset.json").open("wb"):  # opens once verify reads it
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "Interrupted.\n")


def test_surplus_links_and_pipes_are_found(copy: Path, tmp_path: Path):
    (copy / "data" / "link").symlink_to(tmp_path)
    (copy / "dangling").symlink_to("nowhere")
    (copy / "linked").symlink_to("plan.json")
    os.mkfifo(copy / "pipe")
    found = verify(str(copy), jobs=1)
    assert kinds(found) == [("surplus", x, "") for x in ("dangling", "data/link", "linked", "pipe")]
