"""`trainer show`: figure 5 of the paper for a run, from its newest good checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from trainer.cache import Cache, default_bytes, default_folder
from trainer.checkpoint import newest_good
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.mirror import pull
from trainer.models import build_model
from trainer.pictures import draw_figure5, read_shown, reconstructed, samples_of, title_of
from trainer.run import read_run
from trainer.state import load_model, under
from trainer.storage import is_remote, local_path, open_storage
from trainer.task import make_task


def show(run: str, data: str | None, png: Path) -> tuple[str, float]:
    """`show_folder` of a run folder here or in object storage."""
    if not is_remote(run):
        return show_folder(local_path(run), data, png)
    with tempfile.TemporaryDirectory(prefix="semiformula-show-") as folder:
        pull(open_storage(run.rstrip("/")), Path(folder))
        return show_folder(Path(folder), data, png)


def show_folder(out: Path, data: str | None, png: Path) -> tuple[str, float]:
    """Write the figure for the first held-out samples, or where none was held out, training ones.

    `data` is where the dataset is now, folder or URL, if not where the run found it. Returns which
    samples are shown, and their root mean squared error in grey levels of 0..255. Raises
    TrainerError when the run has no checkpoint, learns classes, or the dataset is another one.
    """
    if not out.is_dir():
        raise TrainerError(f"{out}: no such folder; expected one of `trainer pretrain`")
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
    storage = open_storage(run.data if data is None else data)
    dataset = read_dataset(storage)
    if dataset.content_sha256 != run.dataset.content_sha256:
        raise TrainerError(
            f"{storage.url}: is dataset {dataset.recipe.name} {dataset.content_sha256[:12]}, the "
            f"run was trained on {run.dataset.name} {run.dataset.content_sha256[:12]}; give --data"
        )
    cache = Cache(default_folder(), default_bytes(default_folder()))
    shown = read_shown(storage, cache, dataset, config.holdout)
    model = build_model(config.arch, dataset.theta.length)
    averaged = under("ema/", restored.tensors)
    weights = {f"model/{name}": tensor for name, tensor in averaged.items()} or restored.tensors
    load_model(model, weights, config, restored.path)
    task = make_task(config, dataset, torch.device("cpu"), None)
    title = f"{title_of(run)}, step {restored.record.step}, {samples_of(run)}"
    return samples_of(run), draw_figure5(reconstructed(task, model, shown), title, png)
