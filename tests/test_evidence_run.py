"""A small evidence run from end to end: what fails, goes on, is refused, and is collected."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from builder.demo import make_demo_data
from evaluator.cli import main
from evaluator.errors import EvaluatorError
from evaluator.evidence.commands import Place, inspection_links
from evaluator.evidence.experiment import read_arms
from evaluator.evidence.record import (
    ArmRecord,
    Step,
    inputs_of,
    new_record,
    read_record,
    record_path,
)
from evaluator.evidence.run import Runner, Stopped

from .evidence_files import RECIPE, TRAINED, small_experiments, write_arm, write_photographs

LITTLE = '"--resize", "64", "--crop", "0"'


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    return small_experiments(tmp_path / "experiments")


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
    trained = trained.replace('["kind"]', "[]")  # its pictures are shown
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
    assert "\ndirect: 2 of 3: trainer pretrain --data " in first.output
    assert "\nlayer1: 1 of 1: evaluator padim --data " in first.output
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
    assert {line["arm"] for line in lines} == {"", "random", "direct", "wrong", "layer1"}
    shared = [line["command"].split()[:2] for line in lines if not line["arm"]]
    builder = [["builder", name] for name in ("demo-data", "textures", "build", "build")]
    assert shared == builder
    assert not any(str(tmp_path) in line["command"] for line in lines)

    # What is done is not done again; what failed is, and may be mended; seeds may be added.
    log = (tmp_path / "runs/arms/direct/log.txt").read_text()
    write_arm(experiments, "30-wrong.toml", TRAINED.format(steps=1, textures=0))
    again = run(experiments, tmp_path, "run", "--only", "direct,wrong")
    assert again.exit_code == 1
    assert "30-wrong.toml changed since" in again.output
    assert (tmp_path / "runs/arms/direct/log.txt").read_text() == log
    shutil.rmtree(tmp_path / "runs/arms/wrong")
    write_arm(experiments, "20-direct.toml", "seeds = [0, 1, 2]\n" + trained)
    again = run(experiments, tmp_path, "run", "--only", "direct,wrong")
    assert again.exit_code == 0, again.output
    more = (tmp_path / "runs/arms/direct/log.txt").read_text().removeprefix(log)
    ran = [line.split()[1:3] for line in more.splitlines() if line.startswith("$ ")]
    assert ran == [["trainer", "pretrain"], ["evaluator", "padim"]]
    report = json.loads((tmp_path / "runs/arms/direct/report/report.json").read_text())
    assert [one["name"] for one in report["backbones"]] == ["direct-0", "direct-1", "direct-2"]


def test_print_prints_and_runs_nothing(experiments: Path, tmp_path: Path) -> None:
    (tmp_path / "photographs/inspection").mkdir(parents=True)
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
    path = record_path(place, direct)
    path.parent.mkdir(parents=True)
    path.write_text(record.model_dump_json())
    assert read_record(place, direct) == record
    (experiments / "recipes/small.toml").write_text(RECIPE + "max_abs_rho = 0.5\n")
    with pytest.raises(EvaluatorError, match=r"direct: recipe small\.toml changed since"):
        read_record(place, direct)


def test_weights_that_were_changed_are_noticed(experiments: Path, tmp_path: Path) -> None:
    place = Place(experiments, tmp_path / "photographs", tmp_path / "runs")
    place.inspection.mkdir(parents=True)
    weights = place.photographs / "weights/a.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    write_arm(experiments, "10-random.toml", 'backbone = "{data}/weights/a.safetensors,arch=x"')
    [arm] = read_arms(experiments)
    record = new_record(place, arm)
    assert sorted(record.inputs) == ["DATA/weights/a.safetensors", "categories"]
    record_path(place, arm).parent.mkdir(parents=True)
    record_path(place, arm).write_text(record.model_dump_json())
    weights.write_bytes(b"other")
    with pytest.raises(EvaluatorError, match=r"random: DATA/weights/a\.safetensors changed since"):
        read_record(place, arm)


def test_more_seeds_and_categories_keep_what_was_trained(experiments: Path, tmp_path: Path) -> None:
    text = TRAINED.format(steps=7, textures=2)
    write_arm(experiments, "20-direct.toml", text)
    place = Place(experiments, tmp_path / "photographs", tmp_path / "runs")
    place.inspection.mkdir(parents=True)
    runner = Runner(place, 1)
    direct = read_arms(experiments)[1]
    lines = ["trainer pretrain 0", "trainer pretrain 1", "evaluator padim"]
    steps = [Step(command=line, commit="c", seconds=1, exit_code=0, last_line="") for line in lines]
    record = new_record(place, direct).model_copy(update={"steps": steps, "done": True})
    record_path(place, direct).parent.mkdir(parents=True)
    record_path(place, direct).write_text(record.model_dump_json())
    assert runner._record(direct) == record
    write_arm(experiments, "20-direct.toml", "seeds = [0, 1, 2]\n" + text)
    (place.inspection / "bolt").mkdir()
    direct = read_arms(experiments)[1]
    kept = runner._record(direct)
    assert [step.command for step in kept.steps] == lines[:2]
    assert not kept.done
    assert kept.inputs["categories"] == "bolt"
    assert kept.experiment["seeds"] == [0, 1, 2]
    with pytest.raises(EvaluatorError, match="run `evaluator evidence run` again"):
        read_record(place, direct)
    write_arm(experiments, "20-direct.toml", text.replace('"7"', '"8"'))
    with pytest.raises(
        EvaluatorError, match=r"20-direct\.toml changed since .*; remove its folder"
    ):
        runner._record(read_arms(experiments)[1])


def test_shared_names_and_hidden_folders(experiments: Path, tmp_path: Path) -> None:
    place = Place(experiments, tmp_path / "photographs", tmp_path / "runs")
    for name in ("tire", ".ipynb_checkpoints"):
        (place.photographs / "inspection" / name).mkdir(parents=True)
    assert sorted(inspection_links(place)) == ["plank", "plate", "terrazzo", "tire"]
    (place.photographs / "inspection" / "plate").mkdir()
    with pytest.raises(EvaluatorError, match="inspection/plate: a procedural product has that"):
        inspection_links(place)


def test_kinds_that_are_missing_are_named_before_anything_is_drawn(
    experiments: Path, tmp_path: Path
) -> None:
    write_arm(experiments, "20-direct.toml", TRAINED.format(steps=7, textures=0))
    (tmp_path / "photographs/inspection/tire").mkdir(parents=True)
    result = run(experiments, tmp_path, "run")
    assert result.exit_code == 1
    assert "photographs/normals: no folder kind; add it, or name other `normals`" in result.output
    assert not (tmp_path / "runs/products").exists()


def test_printed_commands_link_what_they_read(experiments: Path, tmp_path: Path) -> None:
    write_arm(experiments, "20-direct.toml", TRAINED.format(steps=7, textures=0))
    write_arm(experiments, "30-layer1.toml", 'runs = "direct"\npadim = ["--layers", "layer1"]')
    (tmp_path / "photographs/inspection/tire").mkdir(parents=True)
    lines = run(experiments, tmp_path, "run", "--print", "--only", "layer1").output.splitlines()
    made = [line.split()[-1] for line in lines if line.startswith("ln -sfn ")]
    names = ["plank", "plate", "terrazzo", "tire"]
    assert made[:4] == [str(tmp_path / "runs/inspection" / name) for name in names]
    [build] = [line.split() for line in lines if line.startswith("builder build")]
    assert made[4:] == [build[build.index("--normals") + 1] + "/kind"]
    assert sum(line.startswith("trainer pretrain") for line in lines) == 2  # direct's, for layer1


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


def processes_of(runs: Path) -> list[bytes]:
    """The command lines of this machine that name the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append((process / "cmdline").read_bytes())
    return [words for words in found if str(runs).encode() in words]


def test_a_lost_terminal_leaves_no_command_behind(experiments: Path, tmp_path: Path) -> None:
    (tmp_path / "photographs/inspection").mkdir(parents=True)
    words = ["--experiments", experiments, "--data", tmp_path / "photographs"]
    process = subprocess.Popen(
        [sys.executable, "-m", "evaluator", "evidence", "run", *words, "--runs", tmp_path / "runs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests under nohup ignore the signal, and hand that on.
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
    )
    while len(processes_of(tmp_path / "runs")) < 2:  # the run, and a command of it
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not processes_of(tmp_path / "runs")


def test_commands_are_written_without_this_machines_folders() -> None:
    place = Place(Path("data_manifests/experiments"), Path("data"), Path("runs/evidence"))
    command = "trainer pretrain --data runs/evidence/datasets/data --x data/w data_manifests/a"
    assert place.named(command) == (
        "trainer pretrain --data RUNS/datasets/data --x DATA/w data_manifests/a"
    )
    assert place.named("Error: runs/evidence: is locked") == "Error: RUNS: is locked"


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
