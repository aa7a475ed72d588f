"""`trainer restate`: a backbone's batch norm statistics, taken anew from unpainted photographs.

Training sees painted images at its own size; an inspection sees unpainted ones at another. The
running statistics can be those of the latter without training again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.artifacts import read_json, sha256_of, verify_file
from trainer.cache import Cache, default_bytes, default_folder
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.export import BACKBONE_FILE, WEIGHTS_FILE, Backbone, write_backbone
from trainer.initial import begin_with, some_of
from trainer.models import ARCHITECTURES, build_model
from trainer.run import RUN_FILE
from trainer.shards import read_normals
from trainer.storage import open_storage
from trainer.task import resized, to_signed

BATCH = 32


@torch.no_grad()
def restate(run: Path, data: str, out: Path, *, size_px: int | None, images: int) -> str:
    """Write RUN's backbone to `out` with statistics of at most `images` normals; a line of summary.

    Means and variances are averaged over batches of 32, each counting alike. Raises TrainerError
    for a run without a whole backbone, a dataset of fewer than two normals, and an `out` that holds
    a run.
    """
    if not (run / BACKBONE_FILE).is_file():
        raise TrainerError(f"{run}: holds no {BACKBONE_FILE}; it is written when a run ends")
    if out.resolve() == run.resolve():
        raise TrainerError(f"--out {out}: is the run itself; give another folder")
    backbone = read_json(Backbone, run / BACKBONE_FILE)
    verify_file(run / WEIGHTS_FILE, backbone.weights.bytes, backbone.weights.sha256)
    model = build_model(backbone.arch, 1)
    begin_with(model, backbone.arch, run / WEIGHTS_FILE)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms  # every architecture of ours has them
    storage = open_storage(data)
    dataset = read_dataset(storage)
    if dataset.contents == "labels":
        raise TrainerError(f"--data {data}: a labelled dataset keeps no normal photographs apart")
    cache = Cache(default_folder(), default_bytes(default_folder()))
    table = torch.from_numpy(some_of(read_normals(storage, cache, dataset), images))
    if len(table) < 2:
        raise TrainerError(f"--data {data}: one normal photograph; statistics take two at least")
    own = (out / RUN_FILE).exists()
    if not own and (out / BACKBONE_FILE).exists():
        own = read_json(Backbone, out / BACKBONE_FILE).training.restated_images is None
    if own:
        raise TrainerError(f"--out {out}: holds a run's own backbone; give another folder")
    edge = size_px or dataset.image.size_px
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    model.train()
    whole = len(table) - len(table) % BATCH if len(table) >= BATCH else len(table)
    for batch in table[:whole].split(BATCH):
        pixels = to_signed(resized(batch, edge)).expand(-1, 3, -1, -1)
        model(pixels.contiguous(memory_format=torch.channels_last))
    head = ARCHITECTURES[backbone.arch].classifier
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(head)}
    bytes_ = save(state, {"format": "semiformula-backbone"})
    training = backbone.training.model_copy(
        update={
            "restated_images": whole,
            "restated_size_px": edge,
            "restated_dataset_sha256": dataset.content_sha256,
        }
    )
    weights = backbone.weights.model_copy(
        update={"bytes": len(bytes_), "sha256": sha256_of(bytes_)}
    )
    written = backbone.model_copy(update={"weights": weights, "training": training})
    write_backbone(out, written, bytes_)
    return f"{out}: statistics of {len(norms)} batch norms from {whole} normals at {edge} px"
