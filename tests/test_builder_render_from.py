import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from builder import stored
from builder.build import build
from builder.cli import main
from builder.dataset import read_index
from builder.errors import BuilderError
from builder.images import decode_pixels
from builder.plan import read_plan
from builder.render_from import plan_render, render_from
from builder.sources import find_source
from builder.storage import open_storage
from builder.tar import make_header
from builder.verify import verify
from builder.work import Done, build_shard
from tests import naive
from tests.forging import edit
from tests.shards_by_hand import flip_byte, npy_bytes, rehash
from tests.test_builder_build import hashes, members, recipe

PACKED = "data/theta-00001-of-00004.tar"


@pytest.fixture(scope="module")
def parameters(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parameters of `dataset`, without its images. Not to be changed."""
    out = tmp_path_factory.mktemp("parameters") / "parameters"
    source = find_source(str(photographs), None, "CC0-1.0")
    build(recipe(), source, out, jobs=1, contents="parameters")
    return out


@pytest.fixture
def copy(parameters: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parameters, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _scratch_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # `here` holds the table of normals in this process, as a worker does, until it ends.
    monkeypatch.setenv("SEMIFORMULA_SCRATCH", str(tmp_path / "scratch"))


def here(url: str, indices: Sequence[int], deep: bool, _: Callable[[str], None]) -> Iterator[Done]:
    """An engine without processes: they take longer to start than these shards to build."""
    for index in indices:
        yield build_shard(url, index, deep)


def render(source: Path, out: Path, **options):
    return render_from(str(source), str(out), jobs=1, engine=here, **options)


def dataset_of(folder: Path) -> dict[str, str]:
    found = hashes(folder)
    return {name: x for name, x in found.items() if name.startswith(("da", "normals/"))}


def edit_theta(folder: Path) -> np.ndarray:
    """A white blob in the middle for sample 8, the third of its shard, and for no other."""
    blob = np.zeros(271, np.float32)
    parts = blob[:-1].reshape(30, 9)
    parts[:] = [1, 1, 1, 0, 0, 0.3, 0.2, 0.5, 0]
    parts[0, 8] = blob[-1] = 1

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("theta.npy"):
            return data
        theta = np.load(io.BytesIO(data)).copy()
        theta[2] = blob
        return npy_bytes(theta)

    edit(folder / PACKED, change)
    rehash(folder)
    return blob


def test_rendered_dataset_is_that_of_a_direct_build(
    dataset: Path, parameters: Path, tmp_path: Path
):
    summary = render(parameters, tmp_path / "out")
    assert (summary.built, summary.kept, summary.samples) == (4, 0, 20)
    assert dataset_of(tmp_path / "out") == dataset_of(dataset)
    assert len(dataset_of(dataset)) == 6  # dataset.json, four shards of data, one of normals
    rendered, direct = (read_plan(open_storage(str(x))) for x in (tmp_path / "out", dataset))
    ours = {"parameters_from": None, "parameters_sha256": None}
    assert rendered.model_copy(update=ours) == direct
    assert rendered.parameters_from == str(parameters)
    assert rendered.parameters_sha256 == read_index(open_storage(str(parameters))).content_sha256
    found = verify(str(tmp_path / "out"), rerender=20, rebuilds=2, jobs=1)
    assert (found.faults, found.counts.differing) == ([], 0)


def test_parameters_of_stored_images_render_to_the_same(dataset: Path, tmp_path: Path):
    render(dataset, tmp_path / "out")
    assert dataset_of(tmp_path / "out") == dataset_of(dataset)


def test_command_plans_alone_and_then_works_in_processes(
    dataset: Path, parameters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(parameters.parent)  # workers elsewhere must find it too
    words = ["render-from", parameters.name, "--out", str(tmp_path / "out"), "--jobs", "1"]
    planned = CliRunner().invoke(main, [*words, "--plan-only"])
    assert planned.exit_code == 0, planned.output
    assert planned.output.endswith(f"next: builder work {tmp_path / 'out'}\n")
    assert not (tmp_path / "out/data").exists()
    monkeypatch.chdir(tmp_path)
    worked = CliRunner().invoke(main, ["work", "out", "--task", "0/2", "--jobs", "1"])
    assert "shards: 2 built" in worked.output, worked.output
    monkeypatch.chdir(parameters.parent)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "shards: 2 built, 2 verified as they stood, 4 in all\nsamples: 20" in result.output
    assert dataset_of(tmp_path / "out") == dataset_of(dataset)


def test_another_codec_gives_the_dataset_of_the_recipe_with_that_codec(
    photographs: Path, parameters: Path, tmp_path: Path
):
    render(parameters, tmp_path / "out", codec="png")
    source = find_source(str(photographs), None, "CC0-1.0")
    build(recipe(codec="png"), source, tmp_path / "direct", jobs=1, engine=here)
    assert dataset_of(tmp_path / "out") == dataset_of(tmp_path / "direct")


def test_edited_theta_is_painted_as_it_is(dataset: Path, copy: Path, tmp_path: Path):
    blob = edit_theta(copy)
    render(copy, tmp_path / "out")
    edited, drawn = (members(x, "data/*.tar") for x in (tmp_path / "out", dataset))
    changed = {name for name in drawn if drawn[name] != edited[name]}
    assert changed == {"000000008.webp", "000000008.theta.npy"}
    normals = members(dataset, "normals/*.tar")
    normal = decode_pixels(normals[json.loads(drawn["000000008.json"])["normal"] + ".webp"], 3)
    image = decode_pixels(edited["000000008.webp"], 3)
    assert np.abs(image.astype(int) - naive.render(normal, blob)).max() <= 1
    found = verify(str(tmp_path / "out"), rerender=20, rebuilds=4, jobs=1)
    assert (found.faults, found.counts.differing, found.counts.rebuilt) == ([], 1, 4)
    assert "may differ from the recipe's draw" in found.notes[0]


def test_verify_finds_the_edited_theta_of_a_parameter_dataset(copy: Path):
    assert verify(str(copy), rebuilds=4, jobs=1).faults == []
    edit_theta(copy)
    shutil.rmtree(copy / "records")
    found = verify(str(copy), jobs=1)
    assert [(fault.kind, fault.shard, fault.key) for fault in found.faults] == [
        ("draw", PACKED, "000000008")
    ]


def test_verify_finds_the_cut_in_a_parameter_dataset(copy: Path):
    path = copy / PACKED
    path.write_bytes(path.read_bytes()[:3000])
    found = verify(str(copy), jobs=1)
    assert [(fault.kind, fault.message) for fault in found.faults] == [
        # headers and padded members: 512 + 6656 + 512 + 512, and the end's 1024
        ("length", "expected 9216 bytes, found 3000"),
        ("tar", "the file ends inside 000000006.theta.npy"),
    ]


def test_damaged_shard_is_rendered_again(dataset: Path, parameters: Path, tmp_path: Path):
    out = tmp_path / "out"
    render(parameters, out)
    flip_byte(out / "data/train-00002-of-00004.tar", 2000)
    flip_byte(out / "normals/normals-00000-of-00001.tar", 2000)
    (out / "dataset.json").unlink()
    summary = render(parameters, out)
    assert (summary.built, summary.kept) == (1, 3)
    assert dataset_of(out) == dataset_of(dataset)


def test_out_that_holds_something_else_is_refused(
    dataset: Path, parameters: Path, photographs: Path, tmp_path: Path
):
    with pytest.raises(BuilderError, match="was begun with parameters drawn from the recipe; go"):
        render(parameters, Path(shutil.copytree(dataset, tmp_path / "direct")))
    with pytest.raises(BuilderError, match="contents = parameters, asked for images"):
        render(parameters, Path(shutil.copytree(parameters, tmp_path / "packed")))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/letter.txt").write_text("dear")
    with pytest.raises(BuilderError, match="not empty and not a dataset folder"):
        render(parameters, tmp_path / "letters")
    out = tmp_path / "out"
    plan_render(str(parameters), open_storage(str(out)))
    source = find_source(str(photographs), None, "CC0-1.0")
    with pytest.raises(BuilderError, match=r"was begun with the parameters of /.*; go on with"):
        build(recipe(), source, out, jobs=1)


def test_source_that_changed_since_the_plan_is_refused(copy: Path, tmp_path: Path):
    out = tmp_path / "out"
    plan_render(str(copy), open_storage(str(out)))
    edit_theta(copy)
    with pytest.raises(BuilderError, match="was begun with the parameters of dataset"):
        render(copy, out)
    stored._index.cache_clear()  # as in a worker that starts now
    with pytest.raises(BuilderError, match=r"when this was planned, is [0-9a-f]{16} now"):
        next(here(str(out), [0], False, print))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda x: (x / "dataset.json").unlink(), "dataset.json: no such file; finish the dataset"),
        (lambda x: flip_byte(x / PACKED, 2000), "its SHA-256 is not the recorded one; see builder"),
        (lambda x: (x / PACKED).unlink(), "the file is missing; see builder verify"),
        (
            lambda x: flip_byte(x / "normals/normals-00000-of-00001.tar", 2000),
            "not the bytes that dataset.json records; see builder verify",
        ),
        (
            lambda x: (x / "normals/normals-00000-of-00001.tar").unlink(),
            "normals-00000-of-00001.tar: no such file",
        ),
    ],
    ids=["unfinished", "flipped", "missing", "flipped normals", "missing normals"],
)
def test_damaged_source_is_one_line(damage, line: str, copy: Path, tmp_path: Path):
    damage(copy)
    with pytest.raises(BuilderError, match=line) as caught:
        render(copy, tmp_path / "out")
    assert "\n" not in caught.value.message
    assert not list(tmp_path.glob("out/**/.*"))


def test_theta_out_of_its_ranges_is_one_line(copy: Path, tmp_path: Path):
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("theta.npy"):
            return data
        theta = np.load(io.BytesIO(data)).copy()
        theta[3, -1] = 2
        return npy_bytes(theta)

    edit(copy / PACKED, change)
    rehash(copy)
    with pytest.raises(BuilderError, match=rf"{PACKED}: theta: row 3 breaks s in \[0, 1\]"):
        render(copy, tmp_path / "out")


def npz_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("theta", npz_bytes),
        ("theta", lambda x: npy_bytes(x).replace(b"(6, 271), }", b"(999999999999, 271), }")),
        ("theta", lambda x: npy_bytes(x)[:-4]),
        ("theta", lambda x: npy_bytes(x.astype(">f4"))),
        ("normal", lambda x: npy_bytes(x.astype(str))),
        ("normal", lambda x: npy_bytes(x + 0.7)),
        ("normal", lambda x: npy_bytes(x.astype(np.int64))),
        ("normal", lambda x: npy_bytes(x - 100)),
        ("normal", npz_bytes),
    ],
    ids=[
        "npz", "huge header", "cut", "big-endian", "strings", "fractions", "int64", "negative",
        "npz of normals",
    ],
)  # fmt: skip
def test_npy_of_another_kind_is_one_line(member: str, change, copy: Path, tmp_path: Path):
    wanted = f".{member}.npy"
    edit(copy / PACKED, lambda name, x: change(np.load(io.BytesIO(x))) if wanted in name else x)
    rehash(copy)
    with pytest.raises(BuilderError, match=PACKED):
        render(copy, tmp_path / "out")


@pytest.mark.parametrize("name", ["zero", "٠٠٠٠٠٠٠٠١", "9" * 400, "999999999", 1, None])
def test_json_that_names_no_normal_is_one_line(name, dataset: Path, tmp_path: Path):
    source = Path(shutil.copytree(dataset, tmp_path / "source"))
    shard = "data/train-00001-of-00004.tar"

    def change(member: str, data: bytes) -> bytes:
        if not member.endswith(".json"):
            return data
        return json.dumps({**json.loads(data), "normal": name}).encode()

    edit(source / shard, change)
    rehash(source)
    with pytest.raises(BuilderError, match=shard):
        render(source, tmp_path / "out")


def test_normals_that_cannot_be_decoded_are_one_line(copy: Path, tmp_path: Path):
    shard = "normals/normals-00000-of-00001.tar"
    edit(copy / shard, lambda name, x: b"no image" if name.endswith(".webp") else x)
    rehash(copy)
    with pytest.raises(BuilderError, match=rf"{shard}: normal 00000000\d: cannot be decoded"):
        render(copy, tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_SPARSE, tarfile.SYMTYPE, tarfile.DIRTYPE])
def test_member_that_is_no_plain_file_is_one_line(kind: bytes, copy: Path, tmp_path: Path):
    edit(copy / PACKED, lambda _, data: data, type=kind)
    rehash(copy)
    with pytest.raises(BuilderError, match=f"{PACKED}: not readable as a tar"):
        render(copy, tmp_path / "out")


def test_member_beyond_the_end_of_the_file_is_one_line(copy: Path, tmp_path: Path):
    path = copy / PACKED
    path.write_bytes(make_header(b"000000006.theta.npy", 8**11 - 1) + path.read_bytes()[512:])
    rehash(copy)
    with pytest.raises(BuilderError, match=f"{PACKED}: not readable as a tar"):
        render(copy, tmp_path / "out")


def test_tar_of_parameters_holds_two_members(parameters: Path):
    with tarfile.open(parameters / PACKED) as tar:
        assert tar.getnames() == ["000000006.theta.npy", "000000006.normal.npy"]
