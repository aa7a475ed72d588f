"""The README's commands exist, and the demo runs as it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import builder.cli
import evaluator.cli
import trainer.cli

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "builder": builder.cli.main,
    "trainer": trainer.cli.main,
    "evaluator": evaluator.cli.main,
}


def shell_lines(path: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def recipe_lines() -> list[str]:
    """The commands that the opening comments of recipes and manifests give."""
    files = [*ROOT.glob("builder/recipes/*.toml"), *ROOT.glob("data_manifests/*.toml")]
    comments = [line for path in files for line in path.read_text().splitlines()]
    return [
        part
        for line in comments
        if line.startswith("#   builder")
        for part in line.removeprefix("#   ").split(" && ")
    ]


def parse(line: str) -> click.Context:
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    program, command, *words = words
    subcommand = PROGRAMS[program].commands[command]
    if isinstance(subcommand, click.Group):
        command, *words = words
        subcommand = subcommand.commands[command]
    return subcommand.make_context(command, words, resilient_parsing=False)


STARTERS = {*PROGRAMS, "torchrun"}
COMMANDS = [line for line in shell_lines(ROOT / "README.md") if line.split()[0] in STARTERS]


@pytest.mark.parametrize("line", [*COMMANDS, *recipe_lines()])
def test_command_and_its_options_exist(line: str):
    assert parse(line).params


def test_a_command_with_an_unknown_option_would_be_noticed():
    with pytest.raises(click.NoSuchOption):
        parse("builder build fine --normals x --outt y")


def test_readme_has_the_two_commands_and_the_stages():
    lines = shell_lines(ROOT / "README.md")
    assert lines[:2] == ["make demo", "make test"]
    assert len(COMMANDS) == 32
    assert {line.split()[0] for line in lines} == {"make", *STARTERS}


def test_files_that_the_readme_names_exist():
    names = re.findall(r"`([\w/.*-]+\.(?:py|md|toml))`", (ROOT / "README.md").read_text())
    assert len(names) > 15
    assert [name for name in names if not list(ROOT.glob(name))] == []


def test_pictures_that_the_readme_shows_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    assert pictures
    assert [name for name in pictures if not (ROOT / name).is_file()] == []


@pytest.mark.slow
def test_make_demo_in_small_ends_in_a_table(tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    run = subprocess.run(
        [
            "make",
            "demo",
            f"VENV={sys.prefix}",
            f"--assume-old={sys.prefix}/installed-all",  # the tests run where all is installed
            f"DEMO={tmp_path}",
            "DEMO_PHOTOGRAPHS=--train 8 --good 3 --defects 1 --size 64",
            "DEMO_BUILD=--samples 64",
            "DEMO_TRAIN=--steps 2 --size 32 --batch-size 4",
            "DEMO_EVALUATE=--seeds 2 --resize 64 --crop 56",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    table = (tmp_path / "report/table.csv").read_text().splitlines()
    assert table[0] == "group,category,backbone,metric,mean,sd,low,high,n_seeds"
    cells = {tuple(line.split(",")[1:4]) for line in table[1:]}
    assert {
        (product, backbone, "pixel_auroc")
        for product in ("plank", "plate", "terrazzo")
        for backbone in ("random", "direct", "indirect")
    } <= cells
    pictures = [
        "dataset.png",
        "direct/figure5.png",
        "indirect/figure5.png",
        "report/figure6.png",
        "report/report.html",
    ]
    assert [name for name in pictures if not (tmp_path / name).is_file()] == []
