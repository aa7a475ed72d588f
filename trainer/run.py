"""The run folder: its description run.json, and which options a resumed run may change."""

from __future__ import annotations

import fcntl
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from trainer import __version__
from trainer.artifacts import Model, Sha256, read_json
from trainer.choices import Arch, Components, Loss, Matching, Precision, Schedule
from trainer.dataset import Dataset
from trainer.errors import TrainerError

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
MIRROR_FILE = ".mirror.json"  # of a run in object storage
# What a trainer writes under the lock; `trainer show` writes its figure beside a running one.
WRITTEN_FILES = (RUN_FILE, "checkpoint*", "ledger.json", "curves.png", "backbone*")


class Config(Model):
    """What determines the weights, together with the dataset; fixed for the life of a run."""

    loss: Loss
    matching: Matching = Field(
        default="nearest", description="of true and estimated components in the direct loss"
    )
    components: Components = Field(default="all", description="which the direct loss counts")
    arch: Arch
    init_sha256: Sha256 | None = Field(default=None, description="of the weights begun with")
    size_px: int = Field(ge=16, le=4096)
    batch_size: int = Field(ge=2, le=65536)
    micro_batches: int = Field(ge=1, description="parts of a batch; batch norm works on a part")
    window_shards: int = Field(ge=1, description="shards whose samples are shuffled together")
    lr: float = Field(gt=0, le=10)
    schedule: Schedule
    warmup_steps: int = Field(ge=0)
    total_steps: int | None = Field(ge=1, description="where a cosine ends; null for constant")
    ema: float | None = Field(gt=0, lt=1, description="decay of the averaged weights; null: none")
    seed: int = Field(ge=0, lt=2**63)
    holdout: int = Field(ge=0)
    precision: Precision

    @model_validator(mode="after")
    def numbers_that_fit(self) -> Self:
        """A cosine has an end, a constant rate none; a part holds at least a sample."""
        if (self.schedule == "cosine") != (self.total_steps is not None):
            raise ValueError("expected total_steps with the cosine schedule, and only with it")
        if self.micro_batches > self.batch_size:
            raise ValueError(
                f"{self.micro_batches} micro_batches of a batch of {self.batch_size} samples"
            )
        return self


class DatasetRef(Model):
    """Which dataset, by hash; the shape of its samples."""

    name: str
    contents: Literal["images", "parameters", "labels"]
    content_sha256: Sha256
    recipe_sha256: Sha256 | None = Field(description="null for a labelled dataset")
    samples: int = Field(ge=1)
    size_px: int = Field(ge=1)
    channels: Literal[1, 3]
    components: int | None = Field(ge=1, description="null for a labelled dataset")
    classes: list[str] | None = Field(description="of a labelled dataset, else null")


class Duration(Model):
    """When a run ends: exactly one of the three is set; a resumed run may ask for another."""

    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def exactly_one(self) -> Self:
        """Two durations would end a run at the first, none never."""
        if sum(value is not None for value in (self.epochs, self.steps, self.minutes)) != 1:
            raise ValueError("expected exactly one of epochs, steps and minutes")
        return self


class Run(Model):
    """`run.json`: written when a run starts, and again when it resumes with another duration."""

    format: Literal["semiformula-run"]
    format_version: Literal[2]
    trainer_version: str
    config: Config
    dataset: DatasetRef
    data: str = Field(description="the dataset's URL or absolute path; `trainer show` looks there")
    duration: Duration
    compiled: bool | None = Field(description="what the preflight chose; null: it was not asked")
    versions: dict[str, str]


def dataset_ref(dataset: Dataset) -> DatasetRef:
    """The part of dataset.json that a run remembers."""
    return DatasetRef(
        name=dataset.recipe.name,
        contents=dataset.contents,
        content_sha256=dataset.content_sha256,
        recipe_sha256=dataset.recipe_sha256,
        samples=dataset.samples,
        size_px=dataset.image.size_px,
        channels=dataset.image.channels,
        components=dataset.theta.components,
        classes=dataset.classes or None,
    )


def read_run(out: Path) -> Run:
    """RUN/run.json; TrainerError when the folder is no run of ours."""
    if not (out / RUN_FILE).exists():
        raise TrainerError(f"{out}: holds no {RUN_FILE}; expected a folder of `trainer pretrain`")
    return read_json(Run, out / RUN_FILE)


def previous_run(out: Path) -> Run | None:
    """What is trained in the locked folder, None for a fresh one; TrainerError for any other."""
    if (out / RUN_FILE).exists():
        return read_run(out)
    if any(entry.name not in (LOCK_FILE, MIRROR_FILE) for entry in out.iterdir()):
        raise TrainerError(f"{out}: is not empty and holds no {RUN_FILE}; give another --out")
    return None


def new_run(
    config: Config, dataset: Dataset, data: str, duration: Duration, compiled: bool | None = None
) -> Run:
    """The description of a run that starts or goes on now; `data` is a URL or an absolute path."""
    return Run(
        format="semiformula-run",
        format_version=2,
        trainer_version=__version__,
        config=config,
        dataset=dataset_ref(dataset),
        data=data,
        duration=duration,
        compiled=compiled,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "torchvision")},
        },
    )


def refuse_other_run(out: Path, before: Run, run: Run) -> None:
    """TrainerError naming the dataset or the first option that differs, with both values."""
    was, now = before.dataset, run.dataset
    if was.content_sha256 != now.content_sha256:
        raise TrainerError(
            f"{out}: was trained on dataset {was.name} {was.content_sha256[:12]}, --data is "
            f"{now.name} {now.content_sha256[:12]}; give another --out"
        )
    for name in Config.model_fields:
        old, asked = getattr(before.config, name), getattr(run.config, name)
        if old != asked:
            if name == "total_steps":  # the duration's, where the rate is a cosine
                raise TrainerError(
                    f"{out}: was started with a cosine over {old} steps, asked for {asked}; "
                    "give the same duration, or another --out"
                )
            raise TrainerError(
                f"{out}: was started {given(name, old)}, now {given(name, asked)}; use the same "
                "(what is not given is the default), or give another --out"
            )


def given(name: str, value: object) -> str:
    """A key of Config and its value as the option that gives it.

    >>> given("size_px", 64), given("loss", "cross_entropy"), given("ema", None)
    ('with --size 64', 'with --task classify', 'without --ema')
    """
    if value is None:
        return f"without --{name.removesuffix('_sha256')}"
    if (name, value) == ("loss", "cross_entropy"):
        return "with --task classify"
    if name == "init_sha256":
        return f"with --init of sha256 {str(value)[:12]}"
    option = {"size_px": "size", "window_shards": "window"}.get(name, name.replace("_", "-"))
    return f"with --{option} {value}"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run folder alone, rid of what a killed trainer left half written.

    TrainerError when another process trains in it. A POSIX lock, because the loader's workers do
    not inherit it: they outlive a killed trainer by seconds, and the same command must go on at
    once.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK_FILE).open("a")  # nothing of a folder that may not be ours is changed
    except OSError as error:
        raise TrainerError(f"{out}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise TrainerError(f"{out}: another `trainer pretrain` is at work there") from None
        for name in WRITTEN_FILES:
            for path in out.glob(f".{name}.tmp-*"):
                path.unlink(missing_ok=True)
        try:
            yield
        finally:
            if made and out.is_dir() and [entry.name for entry in out.iterdir()] == [LOCK_FILE]:
                (out / LOCK_FILE).unlink()  # what was asked for was refused
                out.rmdir()
