"""Figure 5 of the paper for a run: normal, anomaly, re-rendered from theta^, error."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.artifacts import atomic_file
from trainer.checkpoint import Restored, newest_good
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.models import build_model
from trainer.render import render
from trainer.run import Run, read_run
from trainer.shards import ShardSamples, index_samples, read_normals
from trainer.state import load_model
from trainer.task import estimate, make_task, resized, to_signed

ROWS = 6
ERROR_SCALE = 4  # an error of a quarter of the grey range is full white


def draw_figure5(out: Path, data: Path | None, png: Path) -> tuple[str, float]:
    """Write the figure for the first held-out samples, or where none was held out, training ones.

    Returns which samples it shows, and their root mean squared error in grey levels of 0..255.
    Raises TrainerError when the run has no checkpoint or the dataset is not the one it was
    trained on.
    """
    run = read_run(out)
    restored = newest_good(out, run.config)
    if restored is None:
        raise TrainerError(f"{out}: has no checkpoint yet; let `trainer pretrain` go on")
    what = "held-out samples" if run.config.holdout else "training samples"
    folder = Path(run.data) if data is None else data
    anomaly, normal, rendered = _estimated(run, restored, folder)
    error = (rendered - anomaly).abs().mean(dim=1, keepdim=True) / 2  # of the grey range
    title = f"{run.config.arch}, L_{run.config.loss}, step {restored.record.step}, {what}"
    columns = ("normal", "anomaly", "from estimated parameters", f"error x {ERROR_SCALE}")
    shown = [(image + 1) / 2 for image in (normal, anomaly, rendered)]
    _draw([*shown, (error * ERROR_SCALE).clamp(0, 1)], columns, title, png)
    return what, float((rendered - anomaly).square().mean().sqrt() * 127.5)


@torch.inference_mode()
def _estimated(
    run: Run, restored: Restored, folder: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """I_ano, I_norm and f_ano(I_norm, theta^): float32 [rows, C, size_px, size_px] in [-1, 1]."""
    dataset, config = read_dataset(folder), run.config
    if dataset.content_sha256 != run.dataset.content_sha256:
        raise TrainerError(
            f"{folder}: is dataset {dataset.recipe.name} {dataset.content_sha256[:12]}, the run "
            f"was trained on {run.dataset.name} {run.dataset.content_sha256[:12]}; give --data"
        )
    first = dataset.samples - (config.holdout or dataset.samples)
    rows = range(first, min(first + ROWS, dataset.samples))
    samples = ShardSamples(folder, dataset, index_samples(folder, dataset, rows))
    normals = torch.from_numpy(read_normals(folder, dataset))
    task = make_task(config, dataset, torch.device("cpu"), normals)
    model = build_model(config.arch, dataset.theta.length)
    load_model(model, restored.tensors, config, restored.path)
    model.eval()

    images, _, normal_index = samples.batch(rows)
    anomaly = to_signed(resized(images, config.size_px))
    assert task.normals is not None
    normal = to_signed(task.normals[normal_index])
    rendered = render(normal, estimate(task, model, anomaly), task.coordinates)
    return anomaly, normal, rendered


def _draw(columns: list[torch.Tensor], names: tuple[str, ...], title: str, png: Path) -> None:
    from matplotlib.figure import Figure

    rows = len(columns[0])
    figure = Figure(figsize=(2 * len(columns), 2 * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, images) in enumerate(zip(names, columns, strict=True)):
        axes[0, column].set_title(name, fontsize=9)
        for row, image in enumerate(images):
            pixels = image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()
            axes[row, column].imshow(pixels, interpolation="nearest")
            axes[row, column].set_axis_off()
    with atomic_file(png) as file:
        figure.savefig(file, format="png", dpi=120)
