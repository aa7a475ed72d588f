"""Painting on the device: against the oracle, and against what the builder itself wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from builder.artifacts import parse_model as parse_builder
from builder.build import build
from builder.recipe import Recipe, load_recipe
from builder.sources import find_source
from tests import naive
from tests.shards_by_hand import draw_theta
from tests.slots import Slots, dataset_of, index
from trainer import paint as module
from trainer.images import decode_image
from trainer.models import build_model
from trainer.paint import paint
from trainer.run import Config
from trainer.samples import Samples, never
from trainer.task import losses_of, make_task, on_device

SIZE, SAMPLES = 48, 96


@pytest.mark.parametrize("channels", [1, 3])
def test_paint_agrees_with_the_oracle(channels: int) -> None:
    rng = np.random.default_rng(1)
    normals = rng.integers(0, 256, (6, 24, 24, channels)).astype(np.uint8)
    thetas = np.stack([draw_theta(rng, 30, channels) for _ in range(6)])
    painted = paint(torch.from_numpy(normals), torch.from_numpy(thetas)).numpy()
    exact = np.stack([naive.render(n, t) for n, t in zip(normals, thetas, strict=True)])
    apart = np.abs(painted.astype(int) - exact)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


def test_paint_rounds_half_up() -> None:
    # s = 0: the normal image itself, whatever else.
    normals = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    theta = torch.tensor([[1.0, 0, 0, 0.5, 0.5, 0, 1, 0]])
    assert torch.equal(paint(normals, theta), normals)
    # Opaque at the peak, in the middle: v = 1/255 is grey level 128, v = 0 is 127.5 and so 128.
    middle = torch.zeros((2, 5, 5, 1), dtype=torch.uint8)
    dots = torch.tensor([[1 / 255, 0, 0, 0.01, 0.01, 0, 1, 1], [0, 0, 0, 0.01, 0.01, 0, 1, 1]])
    assert paint(middle, dots)[:, 2, 2, 0].tolist() == [128, 128]


def test_paint_in_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    normals = torch.from_numpy(rng.integers(0, 256, (5, 16, 16, 3)).astype(np.uint8))
    theta = torch.from_numpy(np.stack([draw_theta(rng, 3, 3) for _ in range(5)]))
    whole = paint(normals, theta)
    monkeypatch.setitem(module.CHUNK_VALUES, "cpu", 1)
    assert torch.equal(paint(normals, theta), whole)


def test_paint_of_nothing_is_nothing() -> None:
    empty = paint(torch.empty((0, 8, 8, 3), dtype=torch.uint8), torch.empty((0, 19)))
    assert empty.shape == (0, 8, 8, 3)


@pytest.fixture(scope="module")
def both(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Samples, Samples]:
    """The same recipe and photographs as images and as parameters."""
    root = tmp_path_factory.mktemp("both")
    source = find_source(str(photographs), None, "CC0-1.0")
    small = {"samples": SAMPLES, "samples_per_shard": 40, "size_px": SIZE}
    recipe = parse_builder(Recipe, {**load_recipe("paper").model_dump(), **small}, "small")
    opened = []
    for contents in ("images", "parameters"):
        build(recipe, source, root / contents, jobs=1, contents=contents)  # type: ignore[arg-type]
        dataset = dataset_of(root / contents)
        opened.append(Samples(dataset, Slots(root / contents, dataset)))
    return opened[0], opened[1]


def table_of(samples: Samples) -> torch.Tensor:
    """The normal images, uint8 [N, H, W, C]."""
    slot = samples.node.shard(0, never)
    assert slot is not None
    path = slot.path.parent.parent / samples.dataset.normals.shards[0].name
    data = path.read_bytes()
    return torch.stack(
        [
            torch.from_numpy(decode_image(data[start : start + size], "webp", SIZE, 3, "here"))
            for start, size, *_ in index(path).tolist()
        ]
    )


def config_of(loss: str) -> Config:
    return Config(
        loss=loss,  # type: ignore[arg-type]
        arch="resnet18",
        size_px=SIZE,
        batch_size=SAMPLES,
        micro_batches=1,
        window_shards=1,
        lr=1e-3,
        schedule="constant",
        warmup_steps=0,
        total_steps=None,
        ema=None,
        seed=0,
        holdout=0,
        precision="fp32",
    )


def test_parameter_only_set_gives_the_samples_of_the_image_set(
    both: tuple[Samples, Samples],
) -> None:
    order = np.random.default_rng(3).permutation(SAMPLES).tolist()
    images, parameters = (samples.batch(order) for samples in both)
    assert parameters.images.shape == (SAMPLES, 0, 0, 3)
    assert torch.equal(images.theta, parameters.theta)
    assert torch.equal(images.normal, parameters.normal)
    painted = paint(table_of(both[1])[parameters.normal], parameters.theta)
    apart = (painted.int() - images.images.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-4


@pytest.mark.parametrize("loss", ["direct", "indirect"])
def test_losses_of_the_parameter_only_set_are_those_of_the_image_set(
    both: tuple[Samples, Samples], loss: str
) -> None:
    found = []
    for samples in both:
        dataset = samples.dataset
        task = make_task(config_of(loss), dataset, torch.device("cpu"), table_of(samples))
        torch.manual_seed(0)
        model = build_model("resnet18", dataset.theta.length).eval()
        with torch.no_grad():
            batch = on_device(task, samples.batch(range(SAMPLES)))
            found.append(losses_of(task, model, batch)[0].double().mean().item())
    assert found[1] == pytest.approx(found[0], rel=1e-6)
