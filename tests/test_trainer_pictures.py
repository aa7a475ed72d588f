"""The pictures of a run: what is drawn, of which numbers, for which runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.runs_by_hand import config_by_hand, run_by_hand
from tests.shards_by_hand import write_dataset
from trainer.artifacts import write_json
from trainer.cache import Cache
from trainer.checkpoint import save_checkpoint
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.metrics import MetricsLog
from trainer.models import build_model
from trainer.pictures import (
    Shown,
    draw_curves,
    draw_epoch,
    draw_figure5,
    read_shown,
    reconstructed,
    thinned,
)
from trainer.run import dataset_ref
from trainer.show import show
from trainer.state import training_state
from trainer.storage import open_storage
from trainer.task import make_task

pytestmark = pytest.mark.usefixtures("one_thread")


def pixels_of(png: Path) -> np.ndarray:
    with Image.open(png) as image:
        return np.asarray(image.convert("RGB"))


def write_lines(out: Path, count: int, terms: dict[str, float]) -> None:
    log = MetricsLog(out, 0)
    for step in range(1, count + 1):
        log.append(
            "train", step=step, steps=1, samples=4 * step, epoch=step / 10, loss=1 / step,
            terms=terms, grad_norm=1.0, lr=0.001, images_per_s=100.0, data_wait=0.5,
            waits={"shards": 0.25, "decode": 0.25, "handoff": 0.0}, device=0.5,
        )  # fmt: skip
    log.append("holdout", step=count, samples=4 * count, loss=1.0, terms=terms)
    log.close()


@pytest.mark.parametrize(
    ("terms", "panels"),
    [({"unpainted": 0.5}, 4), ({"components": 0.1, "scale": 0.1}, 4), ({"accuracy": 0.75}, 5)],
)
def test_curves_have_a_panel_for_each_number(
    tmp_path: Path, terms: dict[str, float], panels: int
) -> None:
    write_lines(tmp_path, 30, terms)
    draw_curves(tmp_path, "title")
    height = pixels_of(tmp_path / "curves.png").shape[0]
    heights = {4: 0.8 + 1.25 * 6.4, 5: 0.8 + 1.25 * 8.4}  # inches, at 120 pixels each
    assert height == round(120 * heights[panels])


def test_curves_of_one_line_are_drawn(tmp_path: Path) -> None:
    write_lines(tmp_path, 1, {})
    draw_curves(tmp_path, "title")
    assert (tmp_path / "curves.png").exists()


def test_run_without_a_line_has_no_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    draw_curves(tmp_path, "title")
    assert not (tmp_path / "curves.png").exists()


def test_thinned_lines_are_means_of_neighbours() -> None:
    lines = [
        {
            "step": step, "loss": float(step), "terms": {"unpainted": 2.0 * step}, "lr": 0.5,
            "images_per_s": 1.0, "data_wait": 0.0, "waits": {"shards": 0.0},
        }
        for step in range(1, 2002)
    ]  # fmt: skip
    found = thinned(lines)  # in threes, the last one is short
    assert len(found) == 667
    assert (found[0]["step"], found[0]["loss"], found[0]["terms"]) == (3, 2.0, {"unpainted": 4.0})
    assert (found[-1]["step"], found[-1]["loss"]) == (2001, 2000.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, samples=9, samples_per_shard=4, size_px=32)
    return folder


def shown_of(data: Path, cache: Path, holdout: int) -> Shown:
    storage = open_storage(str(data))
    return read_shown(storage, Cache(cache, 0), read_dataset(storage), holdout)


@pytest.mark.parametrize(("holdout", "rows"), [(2, [7, 8]), (8, [1, 2, 3, 4, 5, 6]), (0, range(6))])
def test_shown_samples_are_the_first_held_out(
    tmp_path: Path, holdout: int, rows: list[int]
) -> None:
    hold = write_dataset(tmp_path / "data", samples=9, samples_per_shard=4, size_px=32)
    shown = shown_of(tmp_path / "data", tmp_path / "cache", holdout)
    assert np.array_equal(shown.images.numpy(), np.stack([hold["images"][row] for row in rows]))


class Exact(nn.Module):
    """Gives the raw outputs of parameters that paint nothing: s is 0 but for 1e-9."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return torch.cat((torch.zeros(len(images), 18), torch.full((len(images), 1), -20.0)), 1)


def test_network_that_paints_nothing_shows_the_normal_image(data: Path, tmp_path: Path) -> None:
    shown = shown_of(data, tmp_path / "cache", 2)
    task = make_task(config_by_hand(), read_dataset(data), torch.device("cpu"), None)
    model = Exact().train()
    normal, anomaly, rendered = reconstructed(task, model, shown)
    assert model.training
    torch.testing.assert_close(rendered, normal, atol=1e-4, rtol=0)
    error = draw_figure5((normal, anomaly, rendered), "title", tmp_path / "figure.png")
    levels = shown.images.double() - shown.normals.double()
    assert error == pytest.approx(float(levels.square().mean().sqrt()), rel=1e-3)


def test_figure_shows_every_pixel_as_a_square(tmp_path: Path) -> None:
    """32 pixels are drawn 7 times as large, beside one another with gaps of 6."""
    rng = torch.Generator().manual_seed(0)
    parts = tuple(torch.rand((2, 3, 32, 32), generator=rng) * 2 - 1 for _ in range(3))
    draw_figure5(parts, "title", tmp_path / "figure.png")  # type: ignore[arg-type]
    picture = pixels_of(tmp_path / "figure.png")
    assert picture.shape == (2 * 224 + 6 + 64 + 12, 4 * 224 + 3 * 6 + 12 + 72, 3)
    for column, part in enumerate(parts):
        for row in range(2):
            top, left = 64 + row * 230 + 3, 12 + column * 230 + 3
            found = picture[top : top + 224 : 7, left : left + 224 : 7].astype(int)
            expected = ((part[row] + 1) * 127.5).permute(1, 2, 0).numpy()
            assert np.abs(found - expected).max() <= 1


def test_epoch_is_drawn_into_a_folder_of_its_own(data: Path, tmp_path: Path) -> None:
    task = make_task(config_by_hand(), read_dataset(data), torch.device("cpu"), None)
    shown = shown_of(data, tmp_path / "cache", 2)
    draw_epoch(tmp_path, run_by_hand(), 3, 40, task, Exact().train(), shown)
    assert [path.name for path in (tmp_path / "figure5").iterdir()] == ["epoch-0003.png"]


def finished_run(data: Path, out: Path, **changes: object) -> Path:
    """A run folder with one checkpoint of random weights."""
    out.mkdir(parents=True)
    run = run_by_hand(arch="mobilenet_v2", holdout=2, **changes)
    dataset = dataset_ref(read_dataset(data))
    write_json(out / "run.json", run.model_copy(update={"data": str(data), "dataset": dataset}))
    model = build_model("mobilenet_v2", 19)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    averaged = build_model("mobilenet_v2", 19).state_dict() if run.config.ema else None
    save_checkpoint(
        out, run.config, training_state(model, optimizer, averaged), step=1, samples_seen=4,
        seconds=1.0, metrics_bytes=0,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("ema", [None, 0.9])
def test_show_draws_a_run(data: Path, tmp_path: Path, ema: float | None) -> None:
    out = finished_run(data, tmp_path / "run", ema=ema)
    what, error = show(str(out), None, tmp_path / "figure.png")
    assert what == "held-out samples"
    assert 0 < error < 255
    assert pixels_of(tmp_path / "figure.png").shape[0] == 2 * 224 + 6 + 76


def test_show_takes_urls_for_the_run_and_the_dataset(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMIFORMULA_CACHE", str(tmp_path / "cache"))
    out = finished_run(data, tmp_path / "run")
    for folder in (out, data):
        to = open_storage(f"memory://{tmp_path.name}/{folder.name}")
        for path in folder.rglob("*"):
            if path.is_file():
                to.put(path.relative_to(folder).as_posix(), path)
    urls = [f"memory://{tmp_path.name}/{folder.name}" for folder in (out, data)]
    found = show(*urls, tmp_path / "url.png")
    assert found == show(str(out), None, tmp_path / "local.png")
    assert (tmp_path / "url.png").read_bytes() == (tmp_path / "local.png").read_bytes()


def test_show_refuses_a_run_of_classes(data: Path, tmp_path: Path) -> None:
    out = finished_run(data, tmp_path / "run", loss="cross_entropy")
    with pytest.raises(TrainerError, match="learns the classes of by-hand; figure 5 shows") as e:
        show(str(out), None, tmp_path / "figure.png")
    assert "\n" not in e.value.message


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("other-data", "is dataset by-hand .{12}, the run was trained on by-hand .{12}; give"),
        ("no-checkpoint", "has no checkpoint yet; let `trainer pretrain` go on"),
        ("no-run", r"holds no run\.json; expected a folder of `trainer pretrain`"),
        ("no-folder", "no such folder; expected one of `trainer pretrain`"),
    ],
)
def test_show_says_what_is_missing(data: Path, tmp_path: Path, damage: str, said: str) -> None:
    out = finished_run(data, tmp_path / "run")
    if damage == "other-data":
        write_dataset(tmp_path / "other", samples=9, size_px=32, seed=1)
        run = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps(run | {"data": str(tmp_path / "other")}))
    elif damage == "no-checkpoint":
        (out / "checkpoint.json").unlink()
    elif damage == "no-run":
        (out / "run.json").unlink()
    else:
        shutil.rmtree(out)
    with pytest.raises(TrainerError, match=said) as error:
        show(str(out), None, tmp_path / "figure.png")
    assert "\n" not in error.value.message
