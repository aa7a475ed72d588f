import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from builder import __version__
from builder.build import build
from builder.dataset import read_index, read_parameters
from builder.environment import Golden
from builder.errors import BuilderError
from builder.place import alone
from builder.plan import Plan, adopt_normals, make_plan, read_plan
from builder.sources import find_source
from builder.status import finish, status_of, survey
from builder.storage import Folder, open_storage
from builder.work import _context, build_shard, local_engine, share_of, work
from tests.test_builder_build import flip, hashes, members, recipe


def planned(photographs: Path, out: Path, **changes: object) -> Plan:
    source = find_source(str(photographs), None, "CC0-1.0")
    return make_plan(open_storage(str(out)), recipe(**changes), source, jobs=1)


def at_work(out: Path, task: str = "auto"):
    return work(str(out), task, local_engine(1))


@pytest.fixture(scope="module")
def plan_folder(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of four shards that nobody has worked on. Not to be changed."""
    out = tmp_path_factory.mktemp("plan") / "out"
    planned(photographs, out)
    return out


@pytest.fixture
def plan(plan_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plan_folder, tmp_path / "out"))


def test_tasks_build_their_shares_and_finish_writes_the_index(plan: Path, dataset: Path):
    assert at_work(plan, "1/2").built == 2
    found = status_of(open_storage(str(plan)))
    assert (found.done, found.missing, found.bad, found.finished) == (2, 2, 0, False)
    assert found.samples_done == 6 + 2
    with pytest.raises(BuilderError, match="2 of 4 shards are missing, 0 bad; run `builder work"):
        finish(open_storage(str(plan)))
    rest = at_work(plan)
    assert (rest.built, rest.kept, rest.built_samples) == (2, 2, 12)
    finish(open_storage(str(plan)))
    assert status_of(open_storage(str(plan))).finished
    assert hashes(plan) == hashes(dataset)


def test_status_and_finish_of_bad_shards(plan: Path, dataset: Path):
    at_work(plan)
    (plan / "data/train-00000-of-00004.tar").write_bytes(b"cut")
    (plan / "data/train-00001-of-00004.tar").unlink()
    (plan / "records/train-00002-of-00004.json").write_text("{")
    other = plan / "records/train-00003-of-00004.json"
    size = (dataset / "data/train-00000-of-00004.tar").stat().st_size
    fields = json.loads(other.read_text())
    fields["plan_sha256"] = "0" * 64
    other.write_text(json.dumps(fields))
    found = status_of(open_storage(str(plan)))
    assert (found.done, found.missing, found.bad) == (0, 0, 4)
    assert found.faults == [
        f"data/train-00000-of-00004.tar: expected {size} bytes, found 3",
        "data/train-00001-of-00004.tar: recorded, but the file is missing",
        "data/train-00002-of-00004.tar: its record is not readable",
        "data/train-00003-of-00004.tar: its record is of another plan",
    ]
    with pytest.raises(BuilderError, match="0 of 4 shards are missing, 4 bad"):
        finish(open_storage(str(plan)))


def test_finish_clears_what_killed_writers_left(plan: Path, dataset: Path):
    (plan / "data").mkdir()
    (plan / "data/.train-00000-of-00004.tar.tmp-1-ab").write_bytes(b"half")
    at_work(plan)
    finish(open_storage(str(plan)))
    assert hashes(plan) == hashes(dataset)


def test_survey_counts_a_hash_that_ends_in_zero_bytes(plan: Path, dataset: Path):
    shutil.copytree(dataset / "data", plan / "data")
    shutil.copytree(dataset / "records", plan / "records")
    path = plan / "records/train-00000-of-00004.json"
    fields = json.loads(path.read_text())
    fields["shard"]["sha256"] = "ab" * 30 + "00" * 2
    path.write_text(json.dumps(fields))
    head = finish(open_storage(str(plan)))
    assert survey(open_storage(str(plan))).done == 4
    written = json.loads((plan / "dataset.json").read_text())
    assert written["shards"][0]["sha256"] == "ab" * 30 + "00" * 2
    assert written["content_sha256"] == head.content_sha256


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("theta_sha256", "golden sample 9: this machine makes other parameters than the plan: "),
        ("pixels_sha256", "golden sample 9: this machine makes other pixels than the plan: "),
        ("encoded_sha256", "makes other webp bytes than the plan: libwebp "),
    ],
)
def test_worker_that_makes_other_bytes_writes_nothing(plan: Path, field: str, line: str):
    found = read_plan(open_storage(str(plan)))
    assert [golden.index for golden in found.goldens] == [0, 9, 19]
    goldens = [Golden(**g.model_dump()) for g in found.goldens]
    goldens[1] = goldens[1].model_copy(update={field: "0" * 64})
    environment = found.environment.model_copy(update={"libwebp": "0.4.1"})
    changed = found.model_copy(update={"goldens": goldens, "environment": environment})
    (plan / "plan.json").write_text(changed.model_dump_json())
    with pytest.raises(BuilderError) as caught:
        at_work(plan)
    assert line in caught.value.message
    assert "\n" not in caught.value.message
    if field == "encoded_sha256":
        assert "(planned with 0.4.1)" in caught.value.message
    assert not (plan / "data").exists()


def test_worker_with_another_kernel_writes_nothing(plan: Path):
    path = plan / "plan.json"
    fields = json.loads(path.read_text())
    fields["environment"]["kernel"] = "0123456789abcdef"
    path.write_text(json.dumps(fields))
    with pytest.raises(BuilderError, match="the plan's 0123456789abcdef; work with the builder"):
        at_work(plan)
    assert not (plan / "data").exists()


def test_work_on_damaged_normals_is_refused(plan: Path):
    flip(plan / "normals/normals-00000-of-00001.tar")
    with pytest.raises(BuilderError, match=r"its SHA-256 is not the recorded one; plan again"):
        at_work(plan)


def test_work_on_a_plan_that_was_replaced_stops(plan: Path, photographs: Path):
    context = _context(str(plan))
    path = plan / "plan.json"
    path.write_text(path.read_text().replace('"cpu": "', '"cpu": "other '))
    with pytest.raises(BuilderError, match=r"plan\.json: was replaced meanwhile; start again"):
        build_shard(str(plan), 0, False)
    assert context.plan.recipe.seed == 0
    assert not (plan / "data").exists()


def test_two_planners_in_one_folder_are_refused(plan: Path, photographs: Path, tmp_path: Path):
    out = tmp_path / "new"
    with alone(open_storage(str(out))), pytest.raises(BuilderError, match="is being made here"):
        planned(photographs, out)
    assert not list(out.iterdir())
    planned(photographs, out)
    with pytest.raises(BuilderError, match="holds another dataset"):
        planned(photographs, out, seed=1)


def test_plan_that_appears_while_normals_are_prepared_stands(
    plan: Path, photographs: Path, tmp_path: Path
):
    found = read_plan(open_storage(str(plan)))
    with pytest.raises(BuilderError, match=r"holds another dataset \(recipe 'fine': seed = 0"):
        adopt_normals(open_storage(str(plan)), recipe(seed=1), "images", found.normals, "0" * 64)
    assert read_plan(open_storage(str(plan))) == found


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('"shard_count": 4', '"shard_count": 1000000000', "shard_count is 1000000000, but"),
        ('"index": 19', '"index": 190000000000000000000000', "goldens is "),
        ('"seed": 0', '"seed": 1', "recipe_sha256 is "),
    ],
)
def test_plan_that_contradicts_itself_is_refused(plan: Path, old: str, new: str, line: str):
    path = plan / "plan.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BuilderError, match=line):
        status_of(open_storage(str(plan)))


def test_work_of_another_builder_version_is_refused(plan: Path):
    path = plan / "plan.json"
    version = f'"builder_version": "{__version__}"'
    path.write_text(path.read_text().replace(version, '"builder_version": "9.9.9"'))
    with pytest.raises(BuilderError, match=r"is of builder 9\.9\.9, this is"):
        at_work(plan)
    assert not (plan / "data").exists()


def test_finish_without_the_normals_is_refused(plan: Path):
    at_work(plan)
    (plan / "normals/normals-00000-of-00001.tar").unlink()
    with pytest.raises(BuilderError, match=r"00001\.tar: expected \d+ bytes, the file is missing"):
        finish(open_storage(str(plan)))


class _Slow(Folder):
    """A folder in which a shard is committed between two listings."""

    def __init__(self, path: Path, dataset: Path) -> None:
        super().__init__(path)
        self._dataset, self._left = dataset, 1

    def entries(self, folder: str):
        found = list(super().entries(folder))
        if self._left:
            self._left -= 1
            for name in ("data", "records"):
                shutil.copytree(self._dataset / name, self.path / name)
        return iter(found)


def test_shard_committed_during_a_survey_is_not_bad(plan: Path, dataset: Path):
    found = survey(_Slow(plan, dataset))
    assert (found.bad, found.done) == (0, 0)
    assert survey(open_storage(str(plan))).done == 4


def test_work_without_a_plan_says_what_to_do(tmp_path: Path):
    with pytest.raises(BuilderError, match=r"plan\.json: no such file; plan first with"):
        at_work(tmp_path)


def test_plan_of_another_version_is_refused(plan: Path):
    path = plan / "plan.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(BuilderError, match="format_version is 1, this version reads 2 only"):
        at_work(plan)


def test_parameters_alone_are_packed_by_shard(photographs: Path, tmp_path: Path, dataset: Path):
    out = tmp_path / "out"
    source = find_source(str(photographs), None, "CC0-1.0")
    build(recipe(), source, out, jobs=1, contents="parameters")
    index = read_index(open_storage(str(out)))
    assert (index.contents, [shard.samples for shard in index.shards]) == (
        "parameters",
        [6, 6, 6, 2],
    )
    with tarfile.open(out / "data/theta-00001-of-00004.tar") as tar:
        assert tar.getnames() == ["000000006.theta.npy", "000000006.normal.npy"]
    images = members(dataset, "data/*.tar")
    for shard in range(4):
        normal, theta = read_parameters(open_storage(str(out)), index, shard)
        for i in range(len(theta)):
            key = f"{shard * 6 + i:09d}"
            assert json.loads(images[f"{key}.json"])["normal"] == f"{normal[i]:09d}"
            stored = np.load(io.BytesIO(images[f"{key}.theta.npy"]))
            assert theta[i].tobytes() == stored.tobytes()


def test_without_a_number_of_tasks_all_shards_are_walked_in_an_order_of_ones_own():
    orders = [list(share_of(500, "auto")) for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(500))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("task", ["", "1", "3/3", "a/b", "0/0", "-1/3", "1/2/3"])
def test_task_that_cannot_be_is_refused(task: str):
    with pytest.raises(BuilderError, match="--task"):
        share_of(10, task)
