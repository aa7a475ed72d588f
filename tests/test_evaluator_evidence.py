"""The evidence: experiments as files, their commands, a small run from end to end, its tables."""

from __future__ import annotations

import csv
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from builder.cli import main as builder_main
from builder.demo import make_demo_data
from builder.recipe import load_recipe
from evaluator.cli import main
from evaluator.errors import EvaluatorError
from evaluator.evidence import commands
from evaluator.evidence.commands import Place
from evaluator.evidence.differences import (
    Noise,
    difference,
    differences,
    half_interval,
    noise_of,
    paired_noise,
    pooled_noise,
)
from evaluator.evidence.experiment import Experiment, opening_comment, read_arms, recipe_path
from evaluator.evidence.gathered import Scored
from evaluator.evidence.questions import read_questions
from evaluator.evidence.run import ArmRecord, Runner, Stopped, inputs_of, read_record
from evaluator.evidence.tables import _without
from trainer.cli import main as trainer_main
from trainer.models import build_model

SHIPPED = Path(__file__).parents[1] / "data_manifests" / "experiments"
ARMS = read_arms(SHIPPED)

SMALL = """\
# Question: does it run?
format = "semiformula-experiment"
format_version = 1
question = "one"
title = "{title}"
{more}
"""
TRAINED = """\
baseline = "random"
train = ["--loss", "direct", "--arch", "resnet18", "--steps", "{steps}", "--batch-size", "4"]

[data]
recipe = "small"
normals = ["kind"]
textures = {textures}
samples = 12
"""
RECIPE = """\
format = "semiformula-recipe"
format_version = 1
name = "small"
samples = 12
samples_per_shard = 6
size_px = 32
components = 3

[prior]
sigma = {kind = "softplus_normal"}
"""
QUESTIONS = """\
format = "semiformula-questions"
format_version = 1
introduction = "A small one."
untouched = ["plate"]
products = ["plank", "plate"]
shown = ["random", "direct"]
pictured = "direct"

[[questions]]
name = "one"
title = "Does it run?"
asked = "Whether."
saw = "That."
changed = "Nothing."
"""


def write_arm(folder: Path, name: str, more: str, title: str = "an arm") -> Path:
    path = folder / name
    path.write_text(SMALL.format(title=title, more=more))
    return path


def write_photographs(folder: Path) -> Path:
    (folder / "normals" / "kind").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(3):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "normals" / "kind" / f"{index}.png")
    return folder


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments"
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / "small.toml").write_text(RECIPE)
    (folder / "questions.toml").write_text(QUESTIONS)
    write_arm(folder, "10-random.toml", 'backbone = "random:resnet18:{seed}"')
    return folder


# What is shipped


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


# A small run, from end to end

LITTLE = '"--resize", "64", "--crop", "0"'


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def run(experiments: Path, tmp_path: Path, *words: str):
    (tmp_path / "photographs").mkdir(exist_ok=True)
    options = ["--experiments", str(experiments), "--data", str(tmp_path / "photographs")]
    options += ["--runs", str(tmp_path / "runs")]
    return CliRunner().invoke(main, ["evidence", *words[:1], *options, *words[1:]])


@pytest.mark.slow
def test_evidence_runs_fails_goes_on_and_is_collected(experiments: Path, tmp_path: Path) -> None:
    write_photographs(tmp_path / "photographs")
    write_arm(
        experiments, "10-random.toml", f'backbone = "random:resnet18:{{seed}}"\npadim = [{LITTLE}]'
    )
    trained = f"padim = [{LITTLE}]\n" + TRAINED.format(steps=2, textures=2)
    write_arm(experiments, "20-direct.toml", trained)
    wrong = TRAINED.format(steps=2, textures=0).replace('"resnet18"', '"resnet19"')
    write_arm(experiments, "30-wrong.toml", wrong)
    write_arm(
        experiments,
        "40-layer1.toml",
        'baseline = "direct"\nruns = "direct"\npadim = ["--layers", "layer1", "--dims", "9", '
        f"{LITTLE}]",
    )
    (tmp_path / "photographs/inspection").mkdir()
    make_demo_data(tmp_path / "runs/products", train=4, good=2, per_defect=1, size_px=48, jobs=1)
    first = run(experiments, tmp_path, "run", "--jobs", "2")
    assert first.exit_code == 1
    assert "3 of 4 arms done" in first.output
    assert "Failed: wrong; see log.txt of each." in first.output
    record = json.loads((tmp_path / "runs/arms/wrong/arm.json").read_text())
    assert record["steps"][-1]["exit_code"] == 2
    assert "resnet19" in record["steps"][-1]["last_line"]

    results = tmp_path / "results"
    collected = run(experiments, tmp_path, "collect", "--results", str(results))
    assert collected.exit_code == 0, collected.output
    rows = rows_of(results / "arms.csv")
    report = json.loads((tmp_path / "runs/arms/direct/report/report.json").read_text())
    cell = next(c for c in report["scores"] if c["backbone"] == "direct-1")
    row = next(
        r
        for r in rows
        if (r["arm"], r["training_seed"], r["metric"]) == ("direct", "1", "aupro_30")
    )
    assert cell["category"] == row["category"]
    assert float(row["mean"]) == pytest.approx(100 * np.mean(cell["metrics"]["aupro_30"]), abs=1e-4)
    backbone = json.loads((tmp_path / "runs/arms/direct/seed1/backbone.json").read_text())
    assert row["weights_sha256"] == backbone["weights"]["sha256"]
    assert row["dataset_sha256"] == backbone["dataset"]["content_sha256"]
    assert row["command"] == "make evidence ONLY=direct"
    page = (results / "README.md").read_text()
    assert "* `wrong`: failed: " in page
    assert "| an arm − `random` |" in page
    for name in ("differences-pixel_auroc.png", "losses.png", "figure5.png", "figure6.png"):
        assert f"]({name})" in page
        with Image.open(results / name) as picture:
            assert picture.width > 100
    lines = rows_of(results / "commands.csv")
    assert {line["arm"] for line in lines} == {"random", "direct", "wrong", "layer1"}
    assert not any(str(tmp_path) in line["command"] for line in lines)

    # What is done is not done again; what failed is, and may be mended.
    log = (tmp_path / "runs/arms/direct/log.txt").read_bytes()
    write_arm(experiments, "30-wrong.toml", TRAINED.format(steps=1, textures=0))
    again = run(experiments, tmp_path, "run", "--only", "direct,wrong")
    assert again.exit_code == 1
    assert "30-wrong.toml changed since" in again.output
    shutil.rmtree(tmp_path / "runs/arms/wrong")
    again = run(experiments, tmp_path, "run", "--only", "direct,wrong")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "runs/arms/direct/log.txt").read_bytes() == log


def test_print_prints_and_runs_nothing(experiments: Path, tmp_path: Path) -> None:
    result = run(experiments, tmp_path, "run", "--print")
    assert result.exit_code == 0
    assert "builder demo-data" in result.output
    assert not (tmp_path / "runs").exists()


def test_other_photographs_in_the_same_runs_are_refused(experiments: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/products").mkdir(parents=True)
    (tmp_path / "runs/products/demo.json").touch()
    (tmp_path / "runs/inspection").mkdir()
    (tmp_path / "runs/inspection/tire").symlink_to(tmp_path / "elsewhere")
    result = run(experiments, tmp_path, "run")
    assert result.exit_code == 1
    assert "photographs/inspection: no such folder; give --data FOLDER" in result.output
    (tmp_path / "photographs/inspection/tire").mkdir(parents=True)
    result = run(experiments, tmp_path, "run")
    assert result.exit_code == 1
    assert "give the same --data, or other --runs" in result.output


def test_recipe_that_was_changed_is_noticed(experiments: Path, tmp_path: Path) -> None:
    write_arm(experiments, "20-direct.toml", TRAINED.format(steps=7, textures=2))
    direct = read_arms(experiments)[1]
    place = Place(experiments, tmp_path / "photographs", tmp_path / "runs")
    place.inspection.mkdir(parents=True)
    record = ArmRecord(
        format="semiformula-evidence-arm",
        format_version=1,
        arm="direct",
        experiment=direct.experiment.made_of(),
        inputs=inputs_of(place, direct),
        steps=[],
        done=True,
    )
    path = tmp_path / "arm.json"
    path.write_text(record.model_dump_json())
    assert read_record(place, direct, path) == record
    (experiments / "recipes/small.toml").write_text(RECIPE + "max_abs_rho = 0.5\n")
    with pytest.raises(EvaluatorError, match=r"direct: recipe small\.toml changed since"):
        read_record(place, direct, path)


def test_a_signal_ends_commands_once_and_starts_no_other(experiments: Path, tmp_path: Path) -> None:
    runner = Runner(Place(experiments, tmp_path, tmp_path / "runs"), 1)
    said: list[object] = []

    def work() -> None:
        try:
            runner(["http.server", "0", "--bind", "127.0.0.1"], tmp_path / "log.txt")
        except Stopped as stopped:
            said.append(stopped)

    thread = threading.Thread(target=work)
    thread.start()
    while not runner._running:
        time.sleep(0.01)
    [process] = runner._running
    assert os.getpgid(process.pid) != os.getpgid(0)  # the terminal's Ctrl-C does not reach it
    runner.stop()
    thread.join(30)
    assert len(said) == 1
    with pytest.raises(Stopped):
        runner(["http.server"], tmp_path / "log.txt")


def test_commands_are_written_without_this_machines_folders() -> None:
    folders = {"data": "DATA", "runs/evidence": "RUNS"}
    command = "trainer pretrain --data runs/evidence/datasets/data --x data/w data_manifests/a"
    assert _without(folders, command) == (
        "trainer pretrain --data RUNS/datasets/data --x DATA/w data_manifests/a"
    )


def test_unknown_arm_is_named_with_the_nearest(experiments: Path, tmp_path: Path) -> None:
    result = run(experiments, tmp_path, "run", "--only", "randon")
    assert result.exit_code == 1
    assert result.output == "Error: --only: no arm 'randon'; did you mean random?\n"


def test_collect_without_a_run_is_one_line(experiments: Path, tmp_path: Path) -> None:
    path = experiments / "questions.toml"
    text = path.read_text().replace('["random", "direct"]', '["random"]')
    path.write_text(text.replace('pictured = "direct"', 'pictured = "random"'))
    result = run(experiments, tmp_path, "collect", "--results", str(tmp_path / "results"))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "no arm is done; run `evaluator evidence run` first" in result.output
    assert not (tmp_path / "results").exists()


# Differences


def result_of(name: str, seeds: list[float], draws: list[float], train: bool = True, **more):
    experiment = SimpleNamespace(
        train=[] if train else None,
        backbone=more.get("backbone"),
        baseline=more.get("baseline"),
        runs=more.get("runs"),
        seeds=list(range(len(seeds))),
    )
    without = (np.array(more.get("good", [0, 1.0])), np.array(more.get("bad", [0, 1.0])))
    score = Scored(np.array(seeds), np.zeros(len(seeds)), np.array(draws), without)
    return SimpleNamespace(
        arm=SimpleNamespace(name=name, experiment=experiment),
        arch=more.get("arch", "resnet18"),
        scores={("a", "pixel_auroc"): score},
    )


def test_noise_between_seeds_is_pooled_over_trained_arms() -> None:
    results = [
        result_of("x", [90, 92], [0, 0]),  # squares 1 + 1, one degree of freedom
        result_of("y", [80, 83, 86], [0, 0]),  # 9 + 0 + 9, two
        result_of("random", [10, 70], [0, 0], train=False),  # not trained: left out
    ]
    results.append(result_of("m", [90, 94], [0, 0], arch="mobilenet_v2"))
    assert pooled_noise(results, ["a"], "pixel_auroc") == {
        "resnet18": Noise(20 / 3, 3),
        "mobilenet_v2": Noise(8, 1),
    }


def test_interval_typed_by_hand() -> None:
    # Images: the differences 1 and 3 of the draws have variance 2. Without one of three good, or
    # of three defective images the differences are 0, 1, 2 (jackknife variance 4 / 3) and 0, 0, 0:
    # all of it is the good ones', so 2 degrees of freedom. Training: 1.5 / 2 a side, 3 degrees of
    # freedom each. Satterthwaite: 3.5^2 / (2^2 / 2 + 2 * 0.75^2 / 3) = 5.1579.
    x = result_of("x", [92, 94], [91, 93], good=[0, 1, 2], bad=[0, 0, 0])
    y = result_of("y", [90, 92], [90, 90], good=[0, 0, 0], bad=[0, 0, 0])
    one = difference(x, y, "chosen", ["a"], "pixel_auroc", {"resnet18": Noise(1.5, 3)})
    t = 2.5471  # of Student's distribution with 5.1579 degrees of freedom, 97.5 %
    assert one.difference == 2
    assert one.high - one.difference == pytest.approx(t * 3.5**0.5, rel=1e-3)
    assert one.low + one.high == pytest.approx(4)


def test_half_interval_of_a_score_typed_by_hand() -> None:
    # Draws 91 and 93: variance 2; good images alone vary, 2 degrees of freedom. Training: 1.5 / 2
    # with 3. Satterthwaite: 2.75^2 / (2^2 / 2 + 0.75^2 / 3) = 3.4571.
    x = result_of("x", [92, 94], [91, 93], good=[0, 1, 2], bad=[0, 0, 0])
    half = half_interval(x, ["a"], "pixel_auroc", {"resnet18": Noise(1.5, 3)})
    assert half == pytest.approx(2.9561 * 2.75**0.5, rel=1e-3)
    assert np.isnan(half_interval(x, ["a"], "pixel_auroc", {}))
    assert np.isnan(half_interval(x, ["b"], "pixel_auroc", {"resnet18": Noise(1.5, 3)}))


def test_noise_of_a_side_is_its_kinds() -> None:
    pooled = {"resnet18": Noise(1.5, 3)}
    file = result_of("f", [92.0], [0, 0], train=False, backbone="w.safetensors")
    calm = result_of("r", [90, 90], [0, 0], train=False, backbone="random:resnet18:{seed}")
    wild = result_of("r", [90, 94], [0, 0], train=False, backbone="random:resnet18:{seed}")
    other = result_of("o", [90, 94], [0, 0], arch="mobilenet_v2")
    for result, noise in ((file, Noise(0, 1)), (calm, Noise(1.5, 3)), (wild, Noise(8, 1))):
        assert noise_of(result, result.scores["a", "pixel_auroc"], pooled) == noise
    assert noise_of(other, other.scores["a", "pixel_auroc"], pooled) is None


def test_arms_that_share_their_runs_are_paired_by_seed() -> None:
    base = result_of("base", [80, 90], [90, 90])  # the runs are far apart
    x = result_of("x", [82, 94], [91, 93], train=False, runs="base", baseline="base")
    y = result_of("y", [79, 89], [91, 93], train=False, runs="base", baseline="base")
    other = result_of("z", [10, 90], [91, 93], baseline="base")  # runs of its own
    # Differences 2 and 4: squares 1 + 1; -1 and -1: none. Two degrees of freedom.
    paired = paired_noise([base, x, y, other], ["a"], "pixel_auroc")
    assert paired == Noise(1, 2)
    wide = difference(other, base, "c", ["a"], "pixel_auroc", {"resnet18": Noise(900, 3)}, paired)
    one = difference(x, base, "c", ["a"], "pixel_auroc", {"resnet18": Noise(900, 3)}, paired)
    assert one.difference == 3
    # Variance 2 of the images with 1 degree of freedom, 1 / 2 of the seeds with 2.
    freedom = 2.5**2 / (2**2 / 1 + 0.5**2 / 2)
    assert freedom == pytest.approx(1.5152, abs=1e-4)
    assert one.high - one.difference == pytest.approx(5.933 * 2.5**0.5, rel=2e-3)
    assert one.high - one.low < (wide.high - wide.low) / 3


def test_difference_without_any_second_run_has_no_interval() -> None:
    x, y = result_of("x", [92], [91, 93]), result_of("y", [90], [90, 90])
    one = difference(x, y, "chosen", ["a"], "pixel_auroc", {})
    assert one.difference == 2
    assert np.isnan(one.low)
    assert one.p == 1
    assert not one.distinct


def test_differences_are_corrected_over_all_arms_of_a_group() -> None:
    results = [
        result_of("base", [90, 90], [90, 91, 89]),
        result_of("x", [99, 99], [99, 98, 99.5], baseline="base", good=[0] * 9, bad=[0] * 9),
        result_of("y", [91, 91], [91, 90, 92], baseline="base", good=[0] * 9, bad=[0] * 9),
    ]
    results[0] = result_of("base", [89.9, 90.1], [90, 91, 89], good=range(9), bad=range(9))
    x, y = differences(results, {"chosen": ["a"]})
    assert (x.arm, y.arm) == ("x", "y")
    assert x.p_holm == pytest.approx(min(1, 2 * x.p))
    assert y.p_holm == pytest.approx(max(y.p, x.p_holm))
    assert x.distinct
    assert not y.distinct


def test_experiment_keeps_what_its_runs_follow_from() -> None:
    fields = {"format": "semiformula-experiment", "format_version": 1, "question": "one"}
    one = Experiment(**fields, title="a", backbone="random:resnet18:{seed}")
    other = Experiment(**fields, title="b", baseline="x", backbone="random:resnet18:{seed}")
    assert one.made_of() == other.made_of()
    assert one.made_of() != one.model_copy(update={"seeds": [0]}).made_of()
