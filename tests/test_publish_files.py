"""publish-files: what it writes, what it refuses, and that it writes the same bytes twice."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from builder.dataset import read_index, read_parameters
from builder.errors import BuilderError
from builder.publish import PUBLISHED, is_published
from builder.publish.cli import publish_files as command
from builder.publish.facts import Options
from builder.publish.files import publish_files
from builder.publish.parameters import stored_parameters
from builder.storage import Folder
from tests.publishing import OPTIONS, RECIPE, built, published_copy


@pytest.fixture(scope="module")
def published(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_copy(dataset, tmp_path_factory.mktemp("files") / "small")


def test_every_promised_file_is_written_and_no_other(dataset, published):
    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix() for path in found}

    assert files(published) - files(dataset) == set(PUBLISHED)
    assert all(is_published(name) for name in PUBLISHED)
    assert not is_published("data/train-00000-of-00004.tar")


def test_publishing_twice_writes_the_same_bytes(dataset, published, tmp_path):
    again = published_copy(dataset, tmp_path / "again")
    publish_files(Folder(again), Options(title="Other"))
    publish_files(Folder(again), OPTIONS)
    for name in PUBLISHED:
        assert (again / name).read_bytes() == (published / name).read_bytes(), name


def test_sums_are_what_sha256sum_checks(published):
    run = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=published,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    named = {line.split("  ", 1)[1] for line in (published / "SHA256SUMS").read_text().splitlines()}
    assert named >= {*PUBLISHED, "dataset.json", "plan.json"} - {"SHA256SUMS"}
    assert sum(name.endswith(".tar") for name in named) == 5


def test_parquet_holds_every_vector_in_order(published):
    storage = Folder(published)
    index = read_index(storage)
    table = pq.read_table(published / "parameters" / "params.parquet")
    normals, thetas = zip(*(read_parameters(storage, index, i) for i in range(4)), strict=True)
    assert str(table.schema.field("theta").type) == "fixed_size_list<element: float>[271]"
    assert table["index"].to_pylist() == list(range(20))
    np.testing.assert_array_equal(
        np.array(table["theta"].to_pylist(), "f4"), np.concatenate(thetas)
    )
    assert table["normal"].to_pylist() == [f"{i:09d}" for i in np.concatenate(normals)]
    assert table["shard"].to_pylist()[5:7] == [f"train-0000{i}-of-00004.tar" for i in (0, 1)]
    assert table["category"].to_pylist() == [
        "steel" if i < 3 else "wood" for i in np.concatenate(normals)
    ]


def test_card_s_front_matter_is_yaml_with_the_counts(published):
    text = (published / "README.md").read_text("utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "cc0-1.0"
    assert front["pretty_name"] == "Small defects"
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.tar"}]
    assert front["dataset_info"][0]["splits"][0]["num_examples"] == 20
    assert front["dataset_info"][1]["splits"][0]["num_examples"] == 6
    assert front["size_categories"] == ["n<1K"]


def test_citation_is_yaml_that_names_the_authors(published):
    cited = yaml.safe_load((published / "CITATION.cff").read_text("utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert [author["name"] for author in cited["authors"]] == ["A. Publisher", "B. Publisher"]
    assert cited["license"] == "CC0-1.0"
    assert cited["type"] == "dataset"


def test_no_template_name_is_left_unfilled(published):
    for name in ("README.md", "datasheet.md"):
        assert "$" not in (published / name).read_text("utf-8")


def test_hostile_titles_stay_text(dataset, tmp_path):
    title = 'A "title": <script>alert(1)</script>\n- [x](y) $HOME'
    out = published_copy(dataset, tmp_path / "out", Options(title=title))
    front = yaml.safe_load((out / "README.md").read_text("utf-8").split("---\n")[1])
    assert front["pretty_name"] == title
    assert yaml.safe_load((out / "CITATION.cff").read_text("utf-8"))["title"] == title
    assert json.loads((out / "croissant.json").read_text("utf-8"))["name"] == title
    for name in ("README.md", "datasheet.md", "gallery/index.html"):
        body = (out / name).read_text("utf-8").split("---\n")[-1]
        assert "<script>alert" not in body


def run(*arguments: str):
    return CliRunner().invoke(command, arguments)


def test_command_prints_what_it_wrote_and_how_to_upload(dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    result = run(str(out), "--repo", "someone/small")
    assert result.exit_code == 0, result.output
    assert "licence: CC0-1.0" in result.output
    upload = f"hf upload someone/small {out} . --repo-type dataset --exclude 'records/*'"
    assert upload in result.output
    assert f"aws s3 sync {out} s3://BUCKET/PREFIX --exclude 'records/*'" in result.output


@pytest.mark.parametrize(
    ("option", "value"),
    [("--date", "31.5.2026"), ("--version", "one"), ("--repo", "small")],
)
def test_bad_options_are_usage_errors(dataset, option, value):
    result = run(str(dataset), option, value)
    assert result.exit_code == 2
    assert repr(value) in result.output


def test_unfinished_dataset_is_one_line(dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    (out / "dataset.json").unlink()
    result = run(str(out))
    assert result.exit_code == 1
    assert result.output == (
        f"Error: {out}/dataset.json: no such file; finish the dataset with `builder finish {out}`\n"
    )


def test_missing_and_short_shards_are_named(dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    shard = out / "data" / "train-00002-of-00004.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(BuilderError, match=r"train-00002-of-00004\.tar: of \d+ bytes, expected"):
        publish_files(Folder(out), Options())
    shard.unlink()
    with pytest.raises(BuilderError, match=r"train-00002-of-00004\.tar: missing; see builder ver"):
        publish_files(Folder(out), Options())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (b"000000013.theta.npy", "expected member 000000013.theta.npy"),
        (b"'descr': '<f4'", r"expected float32 \[271\]"),
        (b'"normal": "0', "normal"),
    ],
)
def test_damaged_members_are_named(dataset, tmp_path, what, said):
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    shard = out / "data" / "train-00002-of-00004.tar"
    data = shard.read_bytes()
    at = data.index(what, data.index(b"000000013.webp"))
    shard.write_bytes(data[:at] + b"9" * len(what) + data[at + len(what) :])
    storage = Folder(out)
    with pytest.raises(BuilderError, match=said):
        list(stored_parameters(storage, read_index(storage)))


def test_help_needs_none_of_the_heavy_packages():
    code = (
        "import sys; from builder.publish.cli import publish_files; import builder.publish; "
        "print(sorted({'numpy', 'pyarrow', 'numba', 'pydantic', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_normals_shard_is_listed_with_the_hash_of_its_bytes(published):
    name = "normals/normals-00000-of-00001.tar"
    digest = hashlib.file_digest(io.BytesIO((published / name).read_bytes()), "sha256").hexdigest()
    assert f"{digest}  {name}\n" in (published / "SHA256SUMS").read_text()


def test_smallest_dataset_of_unknown_licence_is_published_by_who_knows(photographs, tmp_path):
    """One grey JPEG with constant parameters: no test, no order, an unknown licence."""
    recipe = (
        RECIPE.replace("samples = 20", "samples = 1")
        .replace(
            "[prior]",
            """
channels = 1
components = 1
codec = "jpeg"
[prior]
color = { low = 1, high = 1 }
mean = { low = 0, high = 0 }
max_abs_rho = 0
scale = { low = 1, high = 1 }
""",
        )
        .replace('"softplus_normal"', '"log_uniform", low = 0.1, high = 0.1')
    )
    out = built(photographs, tmp_path / "one", recipe=recipe)
    refused = run(str(out))
    assert refused.exit_code == 1
    assert "(unknown): licence 'unknown' is not one whose terms are known" in refused.output
    assert not (out / "README.md").exists()
    assert run(str(out), "--i-know").exit_code == 0
    card = (out / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "unknown"
    assert "**The licence of the normal photographs is not known.**" in card
    assert "The images are lossy" in card
    assert "| `s` | constant 1 | 1 | – | – |" in card
    assert "license" not in json.loads((out / "croissant.json").read_text("utf-8"))
