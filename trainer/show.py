"""`trainer show`: figure 5 of the paper for a run, from its newest good checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.checkpoint import newest_good
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.models import build_model
from trainer.pictures import ROWS, draw_figure5, reconstructed, title_of
from trainer.run import Run, read_run
from trainer.shards import ShardSamples, index_samples, read_normals
from trainer.state import load_model
from trainer.task import make_task


def show_run(out: Path, data: str | None, png: Path) -> tuple[str, float]:
    """Write the figure for the first held-out samples, or where none was held out, training ones.

    Returns which samples it shows, and their root mean squared error in grey levels of 0..255.
    Raises TrainerError when the run has no checkpoint, learns classes, or the dataset is not the
    one that it was trained on.
    """
    run = read_run(out)
    config = run.config
    if config.loss == "cross_entropy":
        raise TrainerError(
            f"{out}: learns the classes of {run.dataset.name}; figure 5 shows parameters, "
            "which a labelled dataset has none of"
        )
    restored = newest_good(out, config)
    if restored is None:
        raise TrainerError(f"{out}: has no checkpoint yet; let `trainer pretrain` go on")
    what = "held-out samples" if config.holdout else "training samples"
    folder = Path(run.data if data is None else data)
    dataset = read_dataset(folder)
    refuse_other_dataset(folder, run, dataset.recipe.name, dataset.content_sha256)
    first = dataset.samples - (config.holdout or dataset.samples)
    rows = range(first, min(first + ROWS, dataset.samples))
    samples = ShardSamples(folder, dataset, index_samples(folder, dataset, rows))
    normals = torch.from_numpy(read_normals(folder, dataset))
    images, _, normal = samples.batch(rows)

    task = make_task(config, dataset, torch.device("cpu"), None)
    model = build_model(config.arch, dataset.theta.length)
    load_model(model, restored.tensors, config, restored.path)
    figure5 = reconstructed(task, model, images, normals[normal])
    title = f"{title_of(run)}, step {restored.record.step}, {what}"
    return what, draw_figure5(figure5, title, png)


def refuse_other_dataset(where: Path, run: Run, name: str, content_sha256: str) -> None:
    """TrainerError when the run was trained on another dataset."""
    if content_sha256 != run.dataset.content_sha256:
        raise TrainerError(
            f"{where}: is dataset {name} {content_sha256[:12]}, the run was trained on "
            f"{run.dataset.name} {run.dataset.content_sha256[:12]}; give --data"
        )
