"""Small experiments with their recipe, questions and photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

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


def small_experiments(folder: Path) -> Path:
    """One arm, of random weights, with its recipe and questions."""
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / "small.toml").write_text(RECIPE)
    (folder / "questions.toml").write_text(QUESTIONS)
    write_arm(folder, "10-random.toml", 'backbone = "random:resnet18:{seed}"')
    return folder
