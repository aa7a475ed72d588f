import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from builder.cli import main


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_build_prints_a_summary_that_adds_up(photographs: Path, tmp_path: Path):
    words = ["build", "demo", "--normals", photographs, "--samples", 3, "--jobs", 1]
    result = call(*words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[:3] == [
        "normals steel: 3 found, 3 kept",
        "normals wood: 3 found, 3 kept",
        "shards: 1 built, 0 verified as they stood, 1 in all",
    ]
    assert re.search(r"^samples: 3, 0\.\d MB; 3 rendered in [\d.]+ of", result.output, re.M)
    again = call(*words, "--out", tmp_path / "out")
    assert "shards: 0 built, 1 verified as they stood, 1 in all" in again.output


def test_show_writes_a_contact_sheet(dataset: Path, tmp_path: Path):
    result = call("show", dataset, "--out", tmp_path / "sheet.png", "--samples", 5)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    # two columns of three 32-pixel tiles, three rows, 4-pixel gaps
    assert pixels.shape == (3 * 36 + 4, 2 * (3 * 36 + 8) + 4, 3)
    assert (pixels[4:36, 4:36] != pixels[4:36, 40:72]).any()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["build", "nothing", "--normals", "x", "--out", "y"], "Error: recipe 'nothing': neither"),
        (["build", "demo", "--normals", "x", "--out", "y"], "Error: --normals x: neither a folder"),
        (["build", "demo", "--normals", "btad", "--out", "y"], "Error: manifest btad: say where"),
        (["build", "demo", "--normals", "", "--out", "y"], "Error: --normals : neither a folder"),
        (["build", "demo", "--normals", ".", "--root", "x", "--out", "y"], "Error: --root x: only"),
        (
            ["build", "demo", "--normals", "demo", "--root", "x", "--licence", "z", "--out", "y"],
            "Error: --licence: manifest demo states the licence",
        ),
        (["show", "nowhere"], "Error: nowhere/dataset.json: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(words: list[str], line: str):
    result = call(*words)
    assert result.exit_code == 1
    assert result.output.startswith(line)
    assert result.output.count("\n") == 1


def test_build_into_a_path_that_cannot_be_is_one_line(photographs: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = call("build", "demo", "--normals", photographs, "--samples", 3, "--out", out)
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {out}: cannot be read (Not a directory)")
        assert result.output.count("\n") == 1


def test_show_into_a_folder_is_one_line(dataset: Path, tmp_path: Path):
    result = call("show", dataset, "--out", tmp_path, "--samples", 1)
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path}: cannot be written (Is a directory)\n"


def test_unknown_option_is_exit_code_2():
    result = call("build", "demo", "--normal", "x")
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_show_of_a_cut_shard_is_one_line(dataset: Path, tmp_path: Path):
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    shard = copy / "data/train-00003-of-00004.tar"
    shard.write_bytes(shard.read_bytes()[:512])
    result = call("show", copy, "--out", tmp_path / "sheet.png")
    assert result.exit_code == 1
    assert "train-00003-of-00004.tar: expected " in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("package", ["builder", "trainer", "evaluator"])
def test_help_imports_nothing_heavy(package: str):
    program = (
        f"import sys, {package}.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'numba', 'torch', 'PIL', 'pydantic', 'matplotlib', 'sklearn', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "Interrupted.\n"), (signal.SIGTERM, 143, "Terminated.\n")],
)
def test_every_command_ends_a_signal_with_one_line(number: int, code: int, line: str):
    program = """
import signal
from builder.cli import main

@main.command()
def wait():
    print("ready", flush=True)
    signal.pause()

main(["wait"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", line)
    assert process.returncode == code
