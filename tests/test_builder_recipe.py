import json
import re
from pathlib import Path

import pytest

from builder.artifacts import parse_model
from builder.errors import BuilderError
from builder.index import Dataset, ShardRecord, content_sha256
from builder.recipe import RECIPES, Recipe, load_recipe

SPEC = Path(__file__).parent.parent / "builder" / "SHARDS.md"


def spec_json() -> list[dict[str, object]]:
    blocks = re.findall(r"^```json\n(.*?)^```", SPEC.read_text(), re.S | re.M)
    return [json.loads(block, object_pairs_hook=without_repeats) for block in blocks]


def without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs), "a key stands twice"
    return dict(pairs)


def test_spec_example_is_a_dataset():
    example = Dataset.model_validate(spec_json()[0])
    assert example.recipe.sha256 == example.recipe_sha256
    assert content_sha256([*example.normals.shards, *example.shards]) == example.content_sha256
    assert sum(shard.samples for shard in example.shards) == example.samples


def test_spec_schema_is_the_models():
    assert spec_json()[1] == Dataset.model_json_schema()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipe_opens_with_command_and_loads_by_name(path: Path):
    opening = path.read_text().split("\nformat")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert f"builder build {path.stem} " in opening
    assert load_recipe(path.stem).name == path.stem


def test_paper_recipe_is_the_papers():
    recipe = load_recipe("paper")
    assert (recipe.samples, recipe.components, recipe.channels) == (1_000_000, 30, 3)
    assert recipe.theta_length == 271
    assert recipe.shard_count == 1000


def test_recipe_hash_ignores_how_numbers_are_written(tmp_path: Path):
    text = (RECIPES / "paper.toml").read_text()
    changed = tmp_path / "changed.toml"
    changed.write_text(text.replace("low = -1,", "low = -1.0,").replace("1_000_000", "1000000"))
    assert load_recipe(str(changed)).sha256 == load_recipe("paper").sha256


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("samples = ", "sampels = ", "unknown key 'sampels'; did you mean 'samples'?"),
        ("max_abs_rho", "max_rho", "unknown key 'prior.max_rho'; did you mean 'max_abs_rho'?"),
        ("offset = 0.01", "ofset = 0.01", "did you mean 'offset'?"),
        ("size_px = 224", "size_px = 4", "key 'size_px': Input should be greater than or equal"),
        ("channels = 3", "channels = 2", "key 'channels': Input should be 1 or 3, found 2"),
        ("format_version = 1", "format_version = 2", "format_version is 2, this version reads 1"),
        ("low = 0, high = 1 }", "low = 1, high = 0 }", "low (1.0) must not exceed high (0.0)"),
        ("[prior]", "[prior", "not readable as TOML"),
    ],
)
def test_recipe_with_a_fault_is_refused_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
):
    path = tmp_path / "faulty.toml"
    text = (RECIPES / "paper.toml").read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(BuilderError) as caught:
        load_recipe(str(path))
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_unknown_recipe_name_lists_the_shipped_ones():
    with pytest.raises(BuilderError, match=r"neither a shipped recipe \(demo, fine, paper\) nor"):
        load_recipe("papper")


def test_shard_record_with_a_path_escape_is_refused():
    record = {"name": "data/../../etc.tar", "samples": 1, "bytes": 1, "sha256": "0" * 64}
    with pytest.raises(BuilderError, match="key 'name'"):
        parse_model(ShardRecord, record, "record")


def test_recipe_samples_are_not_negative():
    with pytest.raises(BuilderError, match="key 'samples'"):
        parse_model(Recipe, {**load_recipe("demo").model_dump(), "samples": 0}, "recipe")
