"""What several test files need: fixed seeds, a folder of photographs, a small dataset."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.load_profile("ci")

# A shell starts background jobs with SIGINT ignored, and the programs under test would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SERVICES = ("_s3", "_slurm", "_ray")


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's; without it nothing is shared
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Processes share the tests by file; the files of one service stay in one process.

    `make test` takes two: many tests wait for servers, schedulers and subprocesses.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrService(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((service for service in SERVICES if service in file), file)

    return ByFileOrService(config, log)


def write_photographs(folder: Path, count: int = 6, size: tuple[int, int] = (48, 40)) -> Path:
    """Colour gradients with noise, in two categories, as PNG and BMP files."""
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = size
        ramp = np.linspace(0, 200, width)[None, :, None] * np.array([1.0, 0.7, 0.4])
        pixels = ramp + rng.normal(20, 10, (height, width, 3))
        path = folder / ("wood" if i % 2 else "steel") / f"{i:03d}.{'bmp' if i % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: tiny networks run faster, and forked children are safe."""
    import torch  # here, because most tests need none

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _own_scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables of normals are not shared with other runs on this machine."""
    os.environ["SEMIFORMULA_SCRATCH"] = str(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six normal photographs, three each in `steel` and `wood`. Not to be changed."""
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def dataset(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty samples of 32 x 32 in four shards, built by the builder. Not to be changed."""
    from builder.artifacts import parse_model
    from builder.build import build
    from builder.recipe import Recipe, load_recipe
    from builder.sources import find_source

    small = {**load_recipe("fine").model_dump(), **SMALL}
    out = tmp_path_factory.mktemp("dataset") / "small"
    source = find_source(str(photographs), None, "CC0-1.0")
    build(parse_model(Recipe, small, "small"), source, out, jobs=1)
    return out


SMALL = {"samples": 20, "samples_per_shard": 6, "size_px": 32}
