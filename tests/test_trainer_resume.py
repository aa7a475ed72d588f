"""What a kill, a signal or another machine leaves: the same command goes on from it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tests.shards_by_hand import sha256, write_dataset
from trainer.config import Options
from trainer.errors import TrainerError
from trainer.metrics import MetricsLog, read_metrics
from trainer.run import Duration
from trainer.train import pretrain

PRODUCTS = ("backbone.json", "backbone.safetensors", "checkpoint-00000002.safetensors")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A finished run of two steps, each with a checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("resume")
    write_dataset(folder / "data", size_px=32)
    options = Options(
        data=str(folder / "data"),
        out=str(folder / "run"),
        loss="direct",
        arch="mobilenet_v2",
        duration=Duration(steps=2),
        batch_size=4,
        workers=0,
        holdout=3,
        checkpoint_every=1,
    )
    pretrain(options)
    return options


def copied(run: Options, folder: Path) -> Options:
    """The same run in a folder to be changed."""
    shutil.copytree(run.out, folder / "run")
    return replace(run, out=str(folder / "run"))


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def newest(run: Options) -> dict[str, object]:
    return json.loads((Path(run.out) / "checkpoint.json").read_text())["checkpoints"][0]


def poison(run: Options, name: str, value: torch.Tensor | None) -> None:
    """Replace or remove a tensor of the newest checkpoint, with a hash that agrees."""
    record = newest(run)
    path = Path(run.out) / str(record["file"])
    tensors = load_file(path)
    del tensors[name]
    path.write_bytes(save(tensors if value is None else tensors | {name: value}))
    record |= {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes())}
    edit(Path(run.out) / "checkpoint.json", checkpoints=[record])


def losses(run: Options) -> list[tuple[str, int, float]]:
    return [(line["kind"], line["step"], line["loss"]) for line in read_metrics(Path(run.out))]


def killed_before_rename(run: Options, name: str, time_of: int) -> None:
    """Train in a child that dies by SIGKILL with the file `name` written, but not yet in place."""
    child = os.fork()
    if child == 0:
        rename, times = Path.replace, itertools.count(1)

        def strike(self: Path, target: Path) -> Path:
            if target.name == name and next(times) == time_of:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.replace = strike  # type: ignore[method-assign, assignment]
        try:
            pretrain(run)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "time_of"),
    [
        ("run.json", 1),
        ("checkpoint-00000001.safetensors", 1),
        ("checkpoint.json", 1),
        ("checkpoint.json", 2),
        ("curves.png", 1),
        ("backbone.safetensors", 1),
        ("backbone.json", 1),
    ],
)
def test_run_killed_inside_a_write_resumes_to_the_same_files(
    run: Options, tmp_path: Path, name: str, time_of: int
) -> None:
    killed = replace(run, out=str(tmp_path / "run"))
    killed_before_rename(killed, name, time_of)
    assert list(Path(killed.out).glob(f".{name}.tmp-*"))
    pretrain(killed)
    assert {path.name for path in Path(killed.out).iterdir()} == {
        path.name for path in Path(run.out).iterdir()
    }
    for product in PRODUCTS:
        assert (Path(killed.out) / product).read_bytes() == (Path(run.out) / product).read_bytes()
    assert losses(killed) == losses(run)


def test_shorter_duration_after_a_signal_exports_the_loss_of_the_end(
    run: Options, tmp_path: Path
) -> None:
    stopped = copied(run, tmp_path)
    log = Path(stopped.out) / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines] == ["train", "holdout"] * 2
    log.write_text("".join(lines[:-1]))  # a signal came before the held-out samples were through
    record = newest(stopped) | {"metrics_bytes": log.stat().st_size}
    edit(Path(stopped.out) / "checkpoint.json", checkpoints=[record])
    pretrain(replace(stopped, duration=Duration(steps=1)))
    losses = [
        json.loads((folder / "backbone.json").read_text())["metrics"]["holdout_loss"]
        for folder in (Path(stopped.out), Path(run.out))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_held_out_loss_that_is_not_finite_stops_the_run(run: Options, tmp_path: Path) -> None:
    broken = copied(run, tmp_path)
    # Training normalises by the batch; only the held-out loss sees the running variance.
    poison(broken, "model/features.0.1.running_var", torch.full((32,), float("nan")))
    before = newest(broken)
    with pytest.raises(TrainerError) as error:
        pretrain(replace(broken, duration=Duration(steps=3)))
    assert error.value.message == (
        "step 3: held-out loss not finite (nan); the last checkpoint is of step 2: "
        "try a lower --lr or --precision fp32 in a new --out"
    )
    assert newest(broken) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rng/cpu", None, "rng/cpu is missing, expected torch.uint8 (5056,)"),
        ("rng/cpu", torch.zeros(3), "rng/cpu is torch.float32 (3,), expected torch.uint8 (5056,)"),
        (
            "optimizer/features.0.1.bias/exp_avg",
            torch.zeros(31),
            "features.0.1.bias/exp_avg is torch.float32 (31,), expected torch.float32 (32,)",
        ),
        ("optimizer/features.0.1.bias/step", None, "step is missing, expected torch.float32 ()"),
    ],
)
def test_checkpoint_with_an_altered_tensor_is_refused(
    run: Options, tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    other = copied(run, tmp_path)
    poison(other, name, value)
    with pytest.raises(TrainerError) as error:
        pretrain(other)
    assert message in error.value.message


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_auto_precision_stays_what_the_run_was_started_with(
    run: Options, tmp_path: Path, precision: str
) -> None:
    other = copied(run, tmp_path)
    config = json.loads((Path(run.out) / "run.json").read_text())["config"]
    edit(Path(other.out) / "run.json", config=config | {"precision": precision})
    pretrain(other)
    assert (
        json.loads((Path(other.out) / "run.json").read_text())["config"]["precision"] == precision
    )


def test_other_torch_is_told_in_one_line(
    run: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(run, tmp_path)
    edit(Path(other.out) / "run.json", versions={"torch": "0.1"})
    pretrain(other)
    assert capsys.readouterr().err == (
        f"Warning: torch was 0.1, is {version('torch')}: the run goes on, but not bit for bit as "
        "an uninterrupted one.\n"
    )


def test_refused_checkpoint_leaves_run_json_as_it_was(run: Options, tmp_path: Path) -> None:
    other = copied(run, tmp_path)
    edit(Path(other.out) / "checkpoint.json", arch="resnet18")
    before = (Path(other.out) / "run.json").read_bytes()
    with pytest.raises(TrainerError, match="the files are of two runs"):
        pretrain(replace(other, duration=Duration(steps=9)))
    assert (Path(other.out) / "run.json").read_bytes() == before


@pytest.mark.parametrize("key", ["format", "format_version"])
@pytest.mark.parametrize("name", ["run.json", "checkpoint.json"])
def test_file_without_a_format_is_refused(
    run: Options, tmp_path: Path, name: str, key: str
) -> None:
    other = copied(run, tmp_path)
    content = json.loads((Path(other.out) / name).read_text())
    del content[key]
    (Path(other.out) / name).write_text(json.dumps(content))
    with pytest.raises(TrainerError, match=rf"{name}: {key} is None, this version reads"):
        pretrain(other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"\xff\xfe\n", "line 2: not readable as JSON"),
        (b'{"kind": "tra\n', "line 2: not readable as JSON"),
        (b"7\n", "line 2: kind is None, expected one of train, holdout"),
        (b'{"kind": []}\n', "line 2: kind is [], expected one of train, holdout"),
        (b'{"kind": "holdout", "step": 1}\n', "line 2: key 'samples': Field required"),
        (b'{"kind": "holdout", "step": NaN}\n', "line 2: key 'step': Input should be"),
    ],
)
def test_damaged_line_of_metrics_is_refused(
    run: Options, tmp_path: Path, damage: bytes, message: str
) -> None:
    lines = (Path(run.out) / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], damage, *lines[2:]]))
    with pytest.raises(TrainerError) as error:
        read_metrics(tmp_path)
    assert f"metrics.jsonl: {message}" in error.value.message


def test_cut_last_line_of_metrics_is_forgiven(run: Options, tmp_path: Path) -> None:
    data = (Path(run.out) / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(data[:-9])
    assert read_metrics(tmp_path) == read_metrics(Path(run.out))[:-1]


def test_run_goes_on_without_lines_of_metrics_that_are_missing(
    run: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = (Path(run.out) / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(first + b'{"kind": "tra')
    log = MetricsLog(tmp_path, 10**6)
    log.append("holdout", step=7, samples=28, loss=0.5, terms={})
    log.close()
    assert "metrics.jsonl: shorter than its checkpoint says" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path)] == [json.loads(first)["step"], 7]


def test_damaged_metrics_are_refused_before_training(run: Options, tmp_path: Path) -> None:
    other = copied(run, tmp_path)
    path = Path(other.out) / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"steps": 1', b'"steps": 0', 1))
    with pytest.raises(TrainerError, match="line 1: key 'steps': Input should be greater"):
        pretrain(replace(other, duration=Duration(steps=3)))
    assert not (Path(other.out) / "checkpoint-00000003.safetensors").exists()
