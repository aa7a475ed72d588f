"""What the tests of publish-files share: a dataset by the command line, and a published copy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from builder.publish.facts import Options
from builder.publish.files import publish_files
from builder.storage import Folder

OPTIONS = Options(
    title="Small defects",
    authors=("A. Publisher", "B. Publisher"),
    repo="someone/small",
    date="2026-05-31",
)
RECIPE = """
format = "semiformula-recipe"
format_version = 1
name = "small"
samples = 20
samples_per_shard = 6
size_px = 32
[prior]
sigma = { kind = "softplus_normal" }
"""


def built(photographs: Path, out: Path, *options: str, recipe: str = RECIPE) -> Path:
    """A dataset as `builder build` makes it."""
    text = out.with_suffix(".toml")
    text.write_text(recipe, "utf-8")
    command = [sys.executable, "-m", "builder", "build", str(text), "--jobs", "1", *options]
    command += ["--normals", str(photographs), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def published_copy(dataset: Path, out: Path, options: Options = OPTIONS) -> Path:
    """The dataset, copied and published."""
    shutil.copytree(dataset, out)
    publish_files(Folder(out), options)
    return out
