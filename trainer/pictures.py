"""The pictures of a run: curves.png from its metrics, figure 5 of the paper from its network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trainer.artifacts import atomic_file
from trainer.cache import Cache
from trainer.dataset import Dataset
from trainer.index import BadShard
from trainer.metrics import read_metrics
from trainer.paint import paint
from trainer.render import render
from trainer.run import Run
from trainer.samples import read_now
from trainer.shards import read_normals
from trainer.storage import Storage
from trainer.task import Task, estimate, resized, to_signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_FILE = "curves.png"
CURVE_POINTS = 1000  # a longer run is drawn in means of neighbouring lines
DPI = 120
ROWS = 6  # of figure 5
ERROR_SCALE = 4  # an error of a quarter of the grey range is full white
CELL_PX = 224  # about so large is an image drawn, in whole multiples of its own size
GAP_PX, LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 6, 12, 72, 64, 12
COLUMNS = ("normal", "anomaly", "from estimated parameters", f"error × {ERROR_SCALE}")
WAITS = {"shards": "shards", "decode": "decode", "handoff": "hand-off"}
TRAINING: dict[str, Any] = {"color": "0.5", "linewidth": 1, "label": "training"}
HELD_OUT: dict[str, Any] = {"color": "C0", "marker": "o", "markersize": 4, "label": "held out"}

Pixels = npt.NDArray[np.uint8]
Rows = list[dict[str, Any]]


def draw_curves(out: Path, title: str) -> None:
    """RUN/curves.png: loss, accuracy where there is one, learning rate, throughput, waiting."""
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    train = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "holdout"]
    if not train:
        return
    panels = {_draw_loss: 3.0, _draw_rate: 1.0, _draw_throughput: 1.2, _draw_waits: 1.2}
    if "accuracy" in train[0]["terms"]:
        panels = {_draw_loss: 3.0, _draw_accuracy: 2.0, **panels}
    heights = list(panels.values())
    figure = Figure(figsize=(8, 0.8 + 1.25 * sum(heights)), layout="constrained", dpi=DPI)
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    drawn = thinned(train)
    for draw, axis in zip(panels, axes, strict=True):
        draw(axis, drawn, held_out)
        axis.grid(True, alpha=0.3)
    figure.suptitle(title)
    axes[0].set_xlim(0, max(line["step"] for line in lines) * 1.02)
    axes[-1].set_xlabel("step")
    epochs = train[-1]["epoch"] / train[-1]["step"]
    top = axes[0].secondary_xaxis("top", functions=(lambda x: x * epochs, lambda x: x / epochs))
    top.set_xlabel("epoch")
    _save(figure, out / CURVES_FILE)


class Shown(NamedTuple):
    """What figure 5 is drawn of: uint8 [rows, H, W, C] each, at the dataset's size."""

    images: torch.Tensor
    normals: torch.Tensor


def read_shown(
    storage: Storage,
    cache: Cache,
    dataset: Dataset,
    holdout: int,
    left_out: Callable[[int, BadShard], None] | None = None,
) -> Shown:
    """The first held-out samples, or where none is held out the dataset's first, at most ROWS.

    The images of a parameter-only dataset are painted here. TrainerError for a damaged shard,
    unless `left_out` has it left out.
    """
    first = dataset.samples - (holdout or dataset.samples)
    rows = range(first, min(first + ROWS, dataset.samples))
    batch = read_now(storage, cache, dataset, rows, left_out)
    table = torch.from_numpy(read_normals(storage, cache, dataset))
    normals = table[batch.normal]
    images = batch.images
    if dataset.contents == "parameters":
        images = paint(normals, batch.theta)
    return Shown(images, normals)


def draw_epoch(
    out: Path,
    run: Run,
    epoch: int,
    step: int,
    task: Task,
    model: torch.nn.Module,
    shown: Shown,
) -> None:
    """RUN/figure5/epoch-NNNN.png for the network as it is after `epoch` epochs (1, 2, ...)."""
    path = out / "figure5" / f"epoch-{epoch:04d}.png"
    title = f"{title_of(run)}, epoch {epoch}, step {step}, {samples_of(run)}"
    draw_figure5(reconstructed(task, model, shown), title, path)


def samples_of(run: Run) -> str:
    """Which samples a run's figure 5 shows."""
    return "held-out samples" if run.config.holdout else "training samples"


def title_of(run: Run) -> str:
    """What is trained, for the title of a picture."""
    loss = {"cross_entropy": "cross entropy"}.get(run.config.loss, f"L_{run.config.loss}")
    return f"{run.config.arch}, {loss}, {run.dataset.name} at {run.config.size_px} px"


@torch.inference_mode()
def reconstructed(
    task: Task, model: torch.nn.Module, shown: Shown
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """I_norm, I_ano and f_ano(I_norm, theta^): float32 [n, C, size_px, size_px] in [-1, 1].

    The model is asked in eval mode and left in the mode that it was in.
    """
    training = model.training
    model.eval()
    anomaly, normal = (
        to_signed(resized(part.to(task.device), task.size_px))
        for part in (shown.images, shown.normals)
    )
    rendered = render(normal, estimate(task, model, anomaly), task.coordinates)
    model.train(training)
    return normal.cpu(), anomaly.cpu(), rendered.cpu()


def draw_figure5(
    figure5: tuple[torch.Tensor, torch.Tensor, torch.Tensor], title: str, png: Path
) -> float:
    """Write the figure; returns the root mean squared error in grey levels of 0..255."""
    from matplotlib.figure import Figure

    normal, anomaly, rendered = figure5
    squared = (rendered - anomaly).square().mean(dim=(1, 2, 3))  # [n]
    error = (rendered - anomaly).abs().mean(dim=1, keepdim=True).expand_as(anomaly)
    columns = [_grey(part) for part in (normal, anomaly, rendered, error * ERROR_SCALE - 1)]
    count, size_px = columns[0].shape[:2]
    scale = max(1, round(CELL_PX / size_px))
    cell_px = size_px * scale
    sheet = _sheet(columns, scale)

    height, width = sheet.shape[0] + TOP_PX + BOTTOM_PX, sheet.shape[1] + LEFT_PX + RIGHT_PX
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes(
        (LEFT_PX / width, BOTTOM_PX / height, sheet.shape[1] / width, sheet.shape[0] / height)
    )
    axes.imshow(sheet, interpolation="nearest")
    pitch, centre = cell_px + GAP_PX, (cell_px - 1) / 2
    axes.set_xticks([centre + pitch * i for i in range(len(columns))], COLUMNS)
    rows = [f"{127.5 * value**0.5:.1f}" for value in squared.tolist()]
    axes.set_yticks([centre + pitch * i for i in range(count)], rows)
    axes.tick_params(length=0, labelsize=9, top=False, labeltop=True, labelbottom=False)
    axes.tick_params(axis="y", labelleft=False, labelright=True)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10, y=1 - 8 / height, va="top")
    figure.text(
        1 - RIGHT_PX / width, 1 - (TOP_PX - 6) / height, " rms,\n grey levels",
        fontsize=7, ha="left", va="bottom",
    )  # fmt: skip
    _save(figure, png)
    return float(squared.mean().sqrt() * 127.5)


def _sheet(columns: list[Pixels], scale: int) -> Pixels:
    """The images side by side on white, each enlarged by a whole number: uint8 [H, W, 3]."""
    count, size_px = columns[0].shape[:2]
    pitch = size_px * scale + GAP_PX
    shape = (count * pitch - GAP_PX, len(columns) * pitch - GAP_PX, 3)
    sheet = np.full(shape, 255, np.uint8)
    for j, images in enumerate(columns):
        for i, image in enumerate(images):
            large = image.repeat(scale, axis=0).repeat(scale, axis=1)
            top, left = i * pitch, j * pitch
            sheet[top : top + len(large), left : left + len(large)] = large
    return sheet


def _grey(images: torch.Tensor) -> Pixels:
    """float32 [n, C, H, W] in [-1, 1] to uint8 [n, H, W, C], cut to the range."""
    levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def _draw_loss(axes: Axes, train: Rows, held_out: Rows) -> None:
    if "unpainted" in train[0]["terms"]:
        unpainted = [{"step": r["step"], "loss": r["terms"]["unpainted"]} for r in train]
        _plot(axes, unpainted, "loss", color="0.8", linewidth=1, label="training, nothing painted")
    _plot(axes, train, "loss", **TRAINING)
    _plot(axes, held_out, "loss", **HELD_OUT)
    axes.set_ylabel("loss (log scale)")
    _log_scale(axes)
    axes.legend(loc="upper right", ncols=3, fontsize=8)


def _draw_accuracy(axes: Axes, train: Rows, held_out: Rows) -> None:
    for rows, style in ((train, TRAINING), (held_out, HELD_OUT)):
        shares = [{"step": r["step"], "share": 100 * r["terms"]["accuracy"]} for r in rows]
        _plot(axes, shares, "share", **style)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 102)


def _draw_rate(axes: Axes, train: Rows, held_out: Rows) -> None:
    _plot(axes, train, "lr", color="C2")
    axes.set_ylabel("learning\nrate")
    axes.set_ylim(0, None)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_throughput(axes: Axes, train: Rows, held_out: Rows) -> None:
    _plot(axes, train, "images_per_s", color="C1")
    axes.set_ylabel("images/s")
    axes.set_ylim(0, 1.1 * max(line["images_per_s"] for line in train))


def _draw_waits(axes: Axes, train: Rows, held_out: Rows) -> None:
    shares = [[100 * line["waits"][name] for line in train] for name in WAITS]
    axes.stackplot([line["step"] for line in train], shares, labels=WAITS.values(), alpha=0.8)
    axes.set_ylabel("waiting for\ndata, %")
    axes.set_ylim(0, max(5, *(100 * line["data_wait"] * 1.5 for line in train)))
    axes.legend(loc="upper right", ncols=3, fontsize=8)


def _plot(axes: Axes, rows: Rows, key: str, **style: Any) -> None:
    if rows:
        axes.plot([line["step"] for line in rows], [line[key] for line in rows], **style)


def _log_scale(axes: Axes) -> None:
    """A log axis whose labels are plain numbers, several of them however small the range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.15)  # room for the legend
    narrow = high < 10 * low
    axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def thinned(train: Rows) -> Rows:
    """At most CURVE_POINTS lines: means of neighbours, at the last one's step."""
    size = -(-len(train) // CURVE_POINTS)
    return [_mean(train[start : start + size]) for start in range(0, len(train), size)]


def _mean(rows: Rows) -> dict[str, Any]:
    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        return float(sum(values) / len(values))

    keys = ("loss", "terms", "lr", "images_per_s", "data_wait", "waits")
    return {"step": rows[-1]["step"], **{key: mean([row[key] for row in rows]) for key in keys}}


def _save(figure: Figure, png: Path) -> None:
    with atomic_file(png) as file:
        figure.savefig(file, format="png", dpi=DPI)
