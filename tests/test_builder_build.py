import gc
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from builder.artifacts import parse_model
from builder.build import build
from builder.dataset import read_index
from builder.errors import BuilderError
from builder.images import decode_pixels
from builder.index import Dataset
from builder.recipe import Recipe, load_recipe
from builder.shards import _header, npy_bytes
from builder.sources import find_source
from builder.storage import open_storage
from tests import naive
from tests.conftest import SMALL, write_photographs


def recipe(**changes: object) -> Recipe:
    return parse_model(Recipe, {**load_recipe("fine").model_dump(), **SMALL, **changes}, "test")


def run(photographs: Path, out: Path, jobs: int = 1, **changes: object):
    return build(recipe(**changes), find_source(str(photographs), None, "CC0-1.0"), out, jobs=jobs)


def index_of(folder: Path) -> Dataset:
    return read_index(open_storage(str(folder)))


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def members(folder: Path, pattern: str) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def test_dataset_folder_holds_what_the_spec_lists(dataset: Path):
    names = [f"train-{i:05d}-of-00004" for i in range(4)]
    assert list(hashes(dataset)) == sorted(
        ["dataset.json", "plan.json", "normals/normals-00000-of-00001.tar"]
        + [f"data/{name}.tar" for name in names]
        + [f"records/{name}.json" for name in names]
    )


def test_index_states_the_shards_as_they_are(dataset: Path):
    index = index_of(dataset)
    shards = [*index.normals.shards, *index.shards]
    for shard in shards:
        data = (dataset / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [shard.samples for shard in index.shards] == [6, 6, 6, 2]
    lines = "".join(f"{shard.sha256}  {shard.name}\n" for shard in shards)
    assert index.content_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert index.normals.count == 6


def test_shards_read_by_hand(dataset: Path):
    normals = members(dataset, "normals/*.tar")
    data = members(dataset, "data/*.tar")
    assert list(data)[:4] == [
        "000000000.webp",
        "000000000.theta.npy",
        "000000000.json",
        "000000001.webp",
    ]
    assert len(data) == 3 * 20
    for i in range(20):
        fields = json.loads(data[f"{i:09d}.json"])
        assert fields["index"] == i
        theta = np.load(io.BytesIO(data[f"{i:09d}.theta.npy"]))
        normal = decode_pixels(normals[f"{fields['normal']}.webp"], 3)
        expected = naive.render(normal, theta)
        image = decode_pixels(data[f"{i:09d}.webp"], 3)
        assert np.abs(image.astype(int) - expected).max() <= 1
        assert json.loads(normals[f"{fields['normal']}.json"])["category"] == fields["category"]


def test_normals_carry_their_provenance(dataset: Path, photographs: Path):
    normals = members(dataset, "normals/*.tar")
    fields = json.loads(normals["000000003.json"])
    digest = hashlib.sha256((photographs / "wood/001.bmp").read_bytes()).hexdigest()
    assert fields == {
        "index": 3,
        "category": "wood",
        "path": "wood/001.bmp",
        "sha256": digest,
        "licence": "CC0-1.0",
    }


def test_tar_headers_hold_nothing_of_time_or_machine(dataset: Path):
    with tarfile.open(dataset / "data/train-00000-of-00004.tar") as tar:
        assert tar.pax_headers == {}
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {
            (0, 0, 0, "", "", 0o644)
        }


@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files to the garbage collector
def test_plain_webdataset_reads_the_shards(dataset: Path):
    urls = str(dataset / "data" / "train-{00000..00003}-of-00004.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(20)]
    assert {tuple(sorted(k for k in sample if k[0] != "_")) for sample in samples} == {
        ("json", "theta.npy", "webp")
    }
    assert samples[7]["theta.npy"].shape == (271,)
    assert samples[7]["theta.npy"].dtype == np.float32
    assert samples[7]["webp"].shape == (32, 32, 3)
    assert samples[7]["json"]["index"] == 7
    gc.collect()


@pytest.mark.parametrize("size", [0, 1, 511, 12345, 8**11 - 1])
def test_member_headers_are_tarfiles(size: int):
    info = tarfile.TarInfo("000000123.theta.npy")
    info.size = size
    assert _header(b"000000123.theta.npy", size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("length", [1, 10, 271, 9001])
def test_npy_bytes_are_numpys(length: int):
    vector = np.arange(length, dtype=np.float32)
    file = io.BytesIO()
    np.lib.format.write_array(file, vector, version=(1, 0))
    assert npy_bytes(vector) == file.getvalue()


def test_build_is_the_same_for_any_number_of_jobs(dataset: Path, photographs: Path, tmp_path: Path):
    run(photographs, tmp_path / "two", jobs=2)
    assert hashes(tmp_path / "two") == hashes(dataset)


def test_samples_are_the_same_for_any_shard_size_and_count(
    dataset: Path, photographs: Path, tmp_path: Path
):
    run(photographs, tmp_path / "other", samples=30, samples_per_shard=30)
    first = members(dataset, "data/*.tar")
    longer = members(tmp_path / "other", "data/*.tar")
    assert {name: longer[name] for name in first} == first


@pytest.mark.parametrize(("codec", "suffix"), [("png", "png"), ("jpeg", "jpg")])
def test_build_with_another_codec(codec: str, suffix: str, photographs: Path, tmp_path: Path):
    run(photographs, tmp_path / "out", codec=codec, samples=3)
    data = members(tmp_path / "out", "data/*.tar")
    assert decode_pixels(data[f"000000002.{suffix}"], 3).shape == (32, 32, 3)
    assert index_of(tmp_path / "out").image.lossless == (codec == "png")


def test_build_in_grey(photographs: Path, tmp_path: Path):
    run(photographs, tmp_path / "out", channels=1, samples=3)
    data = members(tmp_path / "out", "data/*.tar")
    assert np.load(io.BytesIO(data["000000001.theta.npy"])).shape == (30 * 7 + 1,)
    normals = members(tmp_path / "out", "normals/*.tar")
    normal = decode_pixels(normals[json.loads(data["000000001.json"])["normal"] + ".webp"], 1)
    expected = naive.render(normal, np.load(io.BytesIO(data["000000001.theta.npy"])))
    assert np.abs(decode_pixels(data["000000001.webp"], 1).astype(int) - expected).max() <= 1


def cut(path: Path) -> None:
    """To the end of a whole sample: a tar reader sees a shorter tar and no error."""
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[3]
    path.write_bytes(path.read_bytes()[: fourth.offset])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (cut, "data/train-00001-of-00004.tar"),
        (flip, "data/train-00001-of-00004.tar"),
        (Path.unlink, "data/train-00001-of-00004.tar"),
        (flip, "normals/normals-00000-of-00001.tar"),
    ],
    ids=["cut", "flipped", "missing", "flipped-normals"],
)
def test_damaged_shard_is_built_again(
    damage, name: str, dataset: Path, photographs: Path, tmp_path: Path
):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    damage(out / name)
    summary = run(photographs, out)
    assert hashes(out) == hashes(dataset)
    assert (summary.built, summary.kept) == ((1, 3) if "data" in name else (0, 4))


def test_shard_without_its_record_is_built_again(dataset: Path, photographs: Path, tmp_path: Path):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    (out / "records/train-00002-of-00004.json").unlink()
    (out / "dataset.json").unlink()
    assert run(photographs, out).built == 1
    assert hashes(out) == hashes(dataset)


def test_folder_of_another_recipe_is_refused_and_kept(
    dataset: Path, photographs: Path, tmp_path: Path
):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    before = hashes(out)
    with pytest.raises(BuilderError, match=r"seed = 0, asked for 1\); choose another --out"):
        run(photographs, out, seed=1)
    assert hashes(out) == before


def test_folder_of_other_photographs_is_refused(dataset: Path, tmp_path: Path):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    other = write_photographs(tmp_path / "other", 5)
    with pytest.raises(BuilderError, match="was begun with other photographs"):
        run(other, out)


def test_folder_that_is_something_else_is_refused(photographs: Path, tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(BuilderError, match="not empty and not a dataset folder"):
        run(photographs, tmp_path)
    with pytest.raises(BuilderError, match="Not a directory"):
        run(photographs, tmp_path / "letter.txt")


def test_folder_with_photographs_under_other_names_is_refused(dataset: Path, tmp_path: Path):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    renamed = write_photographs(tmp_path / "photographs")
    (renamed / "wood").rename(renamed / "woods")
    with pytest.raises(BuilderError, match="other photographs, or under other names"):
        run(renamed, out)


@pytest.mark.parametrize("name", ["plan.json", "records/train-00001-of-00004.json"])
def test_damaged_json_is_refused_or_built_again(
    dataset: Path, photographs: Path, tmp_path: Path, name: str
):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    (out / name).write_bytes((out / name).read_bytes()[:40])
    if name == "plan.json":
        with pytest.raises(BuilderError, match=r"plan\.json: not readable as JSON"):
            run(photographs, out)
    else:
        assert run(photographs, out).built == 1
        assert hashes(out) == hashes(dataset)


def test_index_that_contradicts_itself_is_refused(dataset: Path, tmp_path: Path):
    text = (dataset / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(text.replace('"samples": 20,', '"samples": 500,'))
    with pytest.raises(BuilderError, match="but the rest of the file says"):
        index_of(tmp_path)


DIES_AT_A_RENAME = """
import os, signal, sys
from pathlib import Path
from builder.build import build
from builder.sources import find_source
from tests.test_builder_build import recipe

photographs, out, who, count = sys.argv[1:]
left, replace = [int(count)], Path.replace

def counted(self, target):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

if who == {"__main__": "parent", "__mp_main__": "worker"}[__name__]:
    Path.replace = counted
if __name__ == "__main__":
    build(recipe(), find_source(photographs, None, "CC0-1.0"), Path(out), jobs=1)
"""


# The parent renames the normals' tar, plan.json, the table of normals and its categories, and
# dataset.json; the worker a tar and a record a shard.
@pytest.mark.parametrize(
    ("who", "renames"),
    [*(("parent", n) for n in range(5)), ("worker", 0), ("worker", 3)],
)
def test_build_killed_inside_a_write_resumes_to_the_same_bytes(
    who: str, renames: int, dataset: Path, photographs: Path, tmp_path: Path
):
    out, program = tmp_path / "out", tmp_path / "program.py"
    program.write_text(DIES_AT_A_RENAME)
    root = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, str(program), str(photographs), str(out), who, str(renames)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
    )
    assert killed.returncode == (-signal.SIGKILL if who == "parent" else 1), killed.stderr
    run(photographs, out)
    assert hashes(out) == hashes(dataset)


def test_unreadable_photograph_stops_the_build_or_is_recorded(tmp_path: Path):
    folder = write_photographs(tmp_path / "photographs")
    (folder / "wood/003.png").write_bytes(b"no image")
    with pytest.raises(BuilderError, match=r"not an image: wood/003\.png; mend it, or go on"):
        run(folder, tmp_path / "out", samples=3)
    source = find_source(str(folder), None, None)
    build(recipe(samples=3), source, tmp_path / "out", jobs=1, allow_incomplete=True)
    normals = index_of(tmp_path / "out").normals
    assert normals.count == 5
    assert normals.source.incomplete
    assert normals.source.faults == ["not an image: wood/003.png"]
    assert normals.source.categories[1].rejected == {"not an image": 1}


def command(photographs: Path, out: Path) -> list[str]:
    toml = out.parent / "small.toml"
    fields = (Path(__file__).parent.parent / "builder/recipes/fine.toml").read_text()
    for key, value in {**SMALL, "samples": 120}.items():
        lines = [f"{key} = {value}" if x.startswith(f"{key} =") else x for x in fields.splitlines()]
        fields = "\n".join(lines)
    toml.write_text(fields)
    program = [sys.executable, "-m", "builder", "build", str(toml), "--jobs", "2"]
    return [*program, "--normals", str(photographs), "--out", str(out)]


def test_killed_build_resumes_to_the_same_bytes_and_leaves_no_process(
    photographs: Path, tmp_path: Path
):
    subprocess.run(command(photographs, tmp_path / "calm"), check=True, capture_output=True)
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(photographs, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(out.glob("data/train-*.tar")) and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived its killed parent"
        time.sleep(0.05)
    assert not (out / "dataset.json").exists()
    subprocess.run(command(photographs, out), check=True, capture_output=True)
    assert hashes(out) == hashes(tmp_path / "calm")


def test_interrupted_build_ends_with_one_line_and_goes_on(photographs: Path, tmp_path: Path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(photographs, out), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(out.glob("data/train-*.tar")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers hear it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"Interrupted; the same command goes on in {out}.\n"
    assert not list(out.glob("*/.*"))
    again = subprocess.run(command(photographs, out), capture_output=True, text=True, check=True)
    assert "0 verified as they stood" not in again.stdout


def test_killed_worker_is_replaced_once(photographs: Path, tmp_path: Path):
    out = tmp_path / "out"
    process = subprocess.Popen(command(photographs, out), stderr=subprocess.PIPE, text=True)
    while not list(out.glob("data/train-*.tar")) and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.startswith("a worker process was killed; going on with 1 instead of 2")
    assert "Traceback" not in errors
    assert not list(out.rglob(".*"))
    assert index_of(out).samples == 120
