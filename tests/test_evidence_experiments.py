"""The evidence's experiments: files, their commands, and every shipped one trained in small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from builder.cli import main as builder_main
from builder.recipe import load_recipe
from evaluator.cli import main as evaluator_main
from evaluator.errors import EvaluatorError
from evaluator.evidence import commands
from evaluator.evidence.commands import Place
from evaluator.evidence.experiment import Experiment, opening_comment, read_arms, recipe_path
from evaluator.evidence.questions import read_questions
from trainer.cli import main as trainer_main
from trainer.models import build_model

from .evidence_files import RECIPE, TRAINED, small_experiments, write_arm, write_photographs

SHIPPED = Path(__file__).parents[1] / "data_manifests" / "experiments"
ARMS = read_arms(SHIPPED)


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    return small_experiments(tmp_path / "experiments")


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_shipped_experiment_opens_with_what_one_needs_to_know(arm) -> None:
    heads = [line.partition(":")[0] for line in arm.comment.splitlines()]
    assert heads == ["Question", "Command", "Minutes", "Expect"]
    assert f"Command: make evidence ONLY={arm.name}" in arm.comment.splitlines()
    assert "EXPECT" not in arm.comment


def test_shipped_questions_are_those_of_the_arms() -> None:
    questions = read_questions(SHIPPED, ARMS)
    assert {q.name for q in questions.questions} == {arm.experiment.question for arm in ARMS}
    assert all(len(text) > 3 for q in questions.questions for text in (q.asked, q.saw, q.changed))


TRAINED_ARMS = [arm for arm in ARMS if arm.experiment.train is not None]


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs and weights in the places that the experiments name."""
    folder = write_photographs(tmp_path_factory.mktemp("photographs"))
    torch.manual_seed(0)
    (folder / "weights").mkdir()
    state = build_model("mobilenet_v2", 1001).state_dict()
    save_file(dict(state), folder / "weights" / "mobilenet_v2_imagenet.safetensors")
    return folder


@pytest.fixture(scope="module")
def shrunk(little: Path):
    """From an arm to the dataset of its recipe with 9 samples of 32 px; each recipe built once."""

    def dataset(arm) -> Path:
        path = recipe_path(SHIPPED, arm.experiment.data)
        out = little / "datasets" / path.stem
        if not out.exists():
            small = little / path.name
            edge = load_recipe(str(path)).size_px
            small.write_text(path.read_text().replace(f"size_px = {edge}", "size_px = 32"))
            build = ["build", str(small), "--normals", str(little / "normals"), "--samples", "9"]
            built = CliRunner().invoke(builder_main, [*build, "--out", str(out), "--jobs", "1"])
            assert built.exit_code == 0, built.output
        return out

    return dataset


@pytest.mark.parametrize("arm", TRAINED_ARMS, ids=lambda arm: arm.name)
def test_shipped_experiment_trains_shrunk(arm, little: Path, shrunk, tmp_path: Path) -> None:
    words = commands.pretrain(Place(SHIPPED, little, tmp_path), arm, 0)[1:]
    words[words.index("--data") + 1] = str(shrunk(arm))
    for option, value in (("--size", "32"), ("--steps", "1"), ("--workers", "0")):
        words[words.index(option) + 1] = value
    words += ["--batch-size", "4", "--device", "cpu", "--precision", "fp32"]
    trained = CliRunner().invoke(trainer_main, words)
    assert trained.exit_code == 0, trained.output


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_shipped_experiment_is_typed_as_its_commands_take_it(arm, little: Path, tmp_path) -> None:
    (tmp_path / "inspection").mkdir()
    place = Place(SHIPPED, little, tmp_path)
    _, name, *words = commands.padim(place, arm)
    padim = evaluator_main.commands[name].make_context(name, words)  # exits where click refuses
    assert set((padim.params["layers"] or "layer1").split(",")) <= {"layer1", "layer2", "layer3"}
    if arm.experiment.restate is not None:
        _, name, *words = commands.restate(place, arm, 0)
        place.run(arm.experiment.runs, 0).mkdir(parents=True)
        trainer_main.commands[name].make_context(name, words)


# Experiments as files


def test_commands_typed_by_hand(experiments: Path, tmp_path: Path) -> None:
    write_arm(experiments, "20-direct.toml", TRAINED.format(steps=7, textures=2))
    direct = read_arms(experiments)[1]
    place = Place(experiments, Path("photos"), Path("runs"))
    data = place.dataset(direct.experiment.data)
    assert commands.pretrain(place, direct, 1) == [
        *("trainer", "pretrain", "--data", str(data), "--out", "runs/arms/direct/seed1"),
        *("--seed", "1", "--workers", "1", "--loss", "direct", "--arch", "resnet18"),
        *("--steps", "7", "--batch-size", "4"),
    ]
    assert commands.padim(place, direct) == [
        *("evaluator", "padim", "--data", "runs/inspection", "--layout", "mvtec"),
        *("--out", "runs/arms/direct/report", "--seeds", "5"),
        *("--features", "runs/features", "--features-max", "8", "--bootstrap", "0"),
        *("--backbone", "direct-0=runs/arms/direct/seed0"),
        *("--backbone", "direct-1=runs/arms/direct/seed1"),
    ]


def test_datasets_differ_where_recipe_normals_or_samples_do(experiments: Path) -> None:
    write_arm(experiments, "20-direct.toml", TRAINED.format(steps=7, textures=2))
    data = read_arms(experiments)[1].experiment.data
    place = Place(experiments, Path("photos"), Path("runs"))
    others = [
        data.model_copy(update=change)
        for change in ({}, {"samples": 13}, {"textures": 3}, {"normals": ["other"]})
    ]
    found = [place.dataset(one) for one in others]
    (experiments / "recipes" / "small.toml").write_text(RECIPE + "max_abs_rho = 0.5\n")
    found.append(place.dataset(data))
    assert len(set(found)) == 5
    assert others[0] == data


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("direct.toml", 'backbone = "x"', None),  # no number: not an experiment
        ("20-Direct.toml", 'backbone = "x"', "expected a name like 10-direct.toml"),
        ("20-a.toml", 'backbone = "x"\ntrain = []', "give exactly one of train, backbone and runs"),
        ("20-a.toml", "train = []", "need a \\[data\\] table"),
        ("20-a.toml", 'runs = "b"', "runs is 'b', expected another arm's name"),
        ("20-a.toml", 'backbone = "x"\nbaseline = "a"', "baseline is 'a', expected another arm"),
        ("20-a.toml", 'backbone = "x"\nlosses = 1', "losses"),
        ("20-a.toml", 'backbone = "x', "cannot be read as TOML"),
        ("20-a.toml", 'backbone = "{sed}"', "only {data} and {seed} may stand in braces"),
        ("20-a.toml", 'backbone = "{"', "only {data} and {seed} may stand in braces"),
        ("20-a.toml", 'runs = "random"', "runs is 'random', which trains nothing"),
        ("20-random.toml", 'backbone = "x"', "two files for one arm"),
    ],
)
def test_experiment_that_cannot_be_meant(experiments, name, more, said) -> None:
    write_arm(experiments, name, more)
    if said is None:
        assert [arm.name for arm in read_arms(experiments)] == ["random"]
        return
    with pytest.raises(EvaluatorError, match=said) as caught:
        read_arms(experiments)
    assert "\n" not in caught.value.message


def test_runs_that_come_later_are_refused(experiments: Path) -> None:
    write_arm(experiments, "30-direct.toml", TRAINED.format(steps=7, textures=2))
    write_arm(experiments, "20-layer1.toml", 'runs = "direct"')
    with pytest.raises(EvaluatorError, match="runs is 'direct', which comes later"):
        read_arms(experiments)


def test_seed_may_stand_in_options_of_training(experiments: Path) -> None:
    more = TRAINED.format(steps=7, textures=0).replace(
        '"direct"', '"direct", "--init", "{data}/{seed}"'
    )
    write_arm(experiments, "20-direct.toml", more)
    words = commands.pretrain(
        Place(experiments, Path("photos"), Path("runs")), read_arms(experiments)[1], 3
    )
    assert words[words.index("--init") + 1] == "photos/3"


def test_pictured_arm_must_not_show_photographs(experiments: Path) -> None:
    write_arm(experiments, "20-direct.toml", TRAINED.format(steps=7, textures=2))
    with pytest.raises(
        EvaluatorError, match="pictured is 'direct', which is painted on photographs"
    ):
        read_questions(experiments, read_arms(experiments))


def test_experiment_without_a_comment_is_refused(experiments: Path) -> None:
    path = write_arm(experiments, "20-a.toml", 'backbone = "x"')
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(EvaluatorError, match="must open with a comment"):
        read_arms(experiments)


def test_opening_comment_ends_at_the_first_other_line() -> None:
    assert opening_comment("# a\n#  b\nx = 1\n# c\n") == "a\nb"


def test_question_that_is_not_asked_is_refused(experiments: Path) -> None:
    path = experiments / "10-random.toml"
    path.write_text(path.read_text().replace('"one"', '"two"'))
    with pytest.raises(EvaluatorError, match="question 'two' is not in"):
        read_questions(experiments, read_arms(experiments))


def test_experiment_keeps_what_its_runs_follow_from() -> None:
    fields = {"format": "semiformula-experiment", "format_version": 1, "question": "one"}
    one = Experiment(**fields, title="a", backbone="random:resnet18:{seed}")
    other = Experiment(**fields, title="b", baseline="x", backbone="random:resnet18:{seed}")
    assert one.made_of() == other.made_of()
    assert one.made_of() != one.model_copy(update={"seeds": [0]}).made_of()
