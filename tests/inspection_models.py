"""Photographs of good parts and a tiny model of them, for the tests of fit, inspect and export."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from evaluator.artifacts import sha256_of_file
from evaluator.cli import main

ARCH, LAYERS = "shufflenet_v2_x0_5", ("maxpool", "stage2")  # 56 x 56 and 28 x 28, small
SIZE = (96, 64)  # width, height: not square on purpose


def write_parts(folder: Path, count: int, *, seed: int = 0, defect: bool = False) -> Path:
    """Noise on a ramp; a defect is a white square at x 60..75, y 20..35."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        ramp = np.linspace(60, 160, SIZE[0])[None, :, None]
        pixels = ramp + rng.normal(0, 6, (SIZE[1], SIZE[0], 3))
        if defect:
            pixels[20:36, 60:76] = 255
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def run(*words: object) -> Result:
    """The command line of the evaluator."""
    return CliRunner().invoke(main, [str(word) for word in words])


def tensors_of(folder: Path) -> Path:
    """The file of tensors beside model.json."""
    (path,) = folder.glob("model-*.safetensors")
    return path


def describe(path: Path) -> None:
    """Make name, length and hash of changed tensors right again."""
    digest = sha256_of_file(path)
    amend(path.parent, path.stat().st_size, digest)
    path.rename(path.with_name(f"model-{digest[:12]}.safetensors"))


def amend(folder: Path, size: int, digest: str) -> None:
    """Change what model.json says of its tensors."""
    record = json.loads((folder / "model.json").read_text())
    name = f"model-{digest[:12]}.safetensors"
    record["tensors"] = {"file": name, "bytes": size, "sha256": digest}
    (folder / "model.json").write_text(json.dumps(record))


def fit(normals: Path, out: Path, *more: object) -> Result:
    """`evaluator fit` with two layers of a random network; 5 of 20 held out, 1 of 5 rejected."""
    words = [
        "--backbone",
        "random:shufflenet_v2_x0_5",
        "--layers",
        "maxpool,stage2",
        "--dims",
        "12",
    ]
    words += [
        "--protocol",
        "paper",
        "--false-reject-rate",
        "0.2",
        "--held-out",
        "0.25",
        "--device",
        "cpu",
    ]
    return run("fit", "--normals", normals, "--out", out, *words, *more)
