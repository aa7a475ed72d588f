"""`pretrain` from end to end: against a plain loop, over http, bad shards, painting, averaging."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trainer.samples
import trainer.saving
from tests.parameters_by_hand import write_parameters
from tests.shards_by_hand import flip_byte, write_dataset
from trainer.cache import Cache
from trainer.cli import Bytes
from trainer.config import Options
from trainer.dataset import ShardRecord, read_dataset
from trainer.errors import TrainerError
from trainer.faulty import Faults, faulty_server
from trainer.losses import direct_losses, heads
from trainer.metrics import read_metrics
from trainer.models import build_model
from trainer.order import Order, train_counts
from trainer.run import Duration
from trainer.setup import cache_of
from trainer.storage import Storage
from trainer.train import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


def options(data: Path | str, out: Path, **changes: object) -> Options:
    plain = Options(
        data=str(data),
        out=str(out),
        loss="direct",
        arch="resnet18",
        duration=Duration(epochs=1),
        batch_size=6,
        lr=1e-4,
        workers=0,
        holdout=2,
        precision="fp32",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "backbone.safetensors")


def plain_loop(
    hold: dict[str, list[np.ndarray]], data: Path, parts: int, steps: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What `pretrain` should do, in a few obvious lines: weights at the end and loss of each step.

    Batch norm is left to itself, so its running statistics are those of one part only.
    """
    dataset = read_dataset(data)
    counts = train_counts(np.array([shard.samples for shard in dataset.shards]), 2)
    order = Order(dataset.order_key, 0, counts, 16)
    torch.manual_seed(0)
    model = build_model("resnet18", dataset.theta.length)
    model.to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(model.parameters(), lr=1e-6)
    losses = []
    for step in range(steps):
        batch = order.samples(step * 12, step * 12 + 12)
        adam.zero_grad()
        total = torch.zeros(())
        for rows in np.array_split(batch, parts):
            images = np.stack([hold["images"][i] for i in rows]).astype(np.float32) / 127.5 - 1
            theta = torch.from_numpy(np.stack([hold["thetas"][i] for i in rows]))
            estimate = heads(model(torch.from_numpy(images).permute(0, 3, 1, 2)), 3)
            total = total + direct_losses(estimate, theta, 3)[0].sum() / 12
        total.backward()
        adam.step()
        losses.append(total.item())
    return model.state_dict(), losses


@pytest.mark.parametrize("parts", [1, 3])
def test_training_is_the_plain_loop(tmp_path: Path, parts: int) -> None:
    hold = write_dataset(tmp_path / "data", samples=30, samples_per_shard=7, size_px=32)
    given = options(tmp_path / "data", tmp_path / "run", batch_size=12, lr=1e-6)
    pretrain(replace(given, duration=Duration(steps=3), micro_batches=parts))
    expected, losses = plain_loop(hold, tmp_path / "data", parts, 3)
    (line,) = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    for name, tensor in weights(tmp_path / "run").items():
        if "num_batches" in name:
            assert tensor == 3  # a step is one batch, whatever its parts
        elif "running" not in name or parts == 1:
            # Adam's first steps are as long as lr whatever the gradient, also where it is noise.
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=6e-6)


def test_ragged_end_counts_each_sample_once(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", samples=15, samples_per_shard=7, size_px=32)
    out = tmp_path / "run"
    pretrain(options(tmp_path / "data", out, micro_batches=3, workers=1))  # 6, 6, 1
    record = json.loads((out / "checkpoint.json").read_text())["checkpoints"][0]
    assert (record["step"], record["samples_seen"]) == (3, 13)
    (epoch,) = json.loads((out / "ledger.json").read_text())["epochs"]
    assert epoch["complete"]
    assert epoch["samples"] == 13
    assert epoch["digest"] == epoch["expected_digest"]
    pretrain(options(tmp_path / "data", out, duration=Duration(epochs=2), micro_batches=3))
    epochs = json.loads((out / "ledger.json").read_text())["epochs"]
    assert [epoch["digest"] == epoch["expected_digest"] for epoch in epochs] == [True, True]


def test_short_step_tells_the_mean_of_its_samples(tmp_path: Path) -> None:
    hold = write_dataset(tmp_path / "data", samples=6, size_px=32)
    pretrain(options(tmp_path / "data", tmp_path / "run", batch_size=12, lr=1e-9))  # 4 samples
    torch.manual_seed(0)
    model = build_model("resnet18", read_dataset(tmp_path / "data").theta.length)
    images = torch.from_numpy(np.stack(hold["images"][:4]).astype(np.float32) / 127.5 - 1)
    theta = torch.from_numpy(np.stack(hold["thetas"][:4]))
    losses, _ = direct_losses(heads(model(images.permute(0, 3, 1, 2)), 3), theta, 3)
    (line,) = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert sum(line["terms"].values()) == pytest.approx(line["loss"], rel=1e-4)
    backbone = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert backbone["metrics"]["train_loss"] == line["loss"]


def test_cache_of_no_bytes_is_not_the_default(tmp_path: Path) -> None:
    given = options("data", tmp_path / "run", cache=tmp_path, cache_bytes=0)
    assert cache_of(given).max_bytes == 0
    assert cache_of(replace(given, cache_bytes=None)).max_bytes > 0


def test_faulty_server_costs_time_and_nothing_else(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", samples=20, samples_per_shard=4, size_px=32)
    pretrain(options(tmp_path / "data", tmp_path / "local"))
    faults = Faults(probability=0.3, kinds=("cut", "flip", "503"), ends=".tar")
    with faulty_server(tmp_path / "data", faults) as server:
        given = options(server.url, tmp_path / "remote", cache=tmp_path / "cache", window_shards=16)
        pretrain(given)
        assert sum(server.counts.faults.values()) > 0
    for name in ("backbone.safetensors", "ledger.json"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()


def test_bad_shard_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", samples=20, samples_per_shard=4, size_px=32)
    flip_byte(tmp_path / "data/data/train-00001-of-00005.tar", 600)
    given = options(tmp_path / "data", tmp_path / "run", micro_batches=3)
    with pytest.raises(TrainerError, match=r"train-00001-of-00005\.tar: SHA-256 differs"):
        pretrain(given)
    pretrain(replace(given, max_bad_ratio=0.25))
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert ledger["quarantined"] == ["data/train-00001-of-00005.tar"]
    assert [(e["samples"], e["expected_samples"]) for e in ledger["epochs"]] == [(14, 18)]
    said = capsys.readouterr().out
    assert (
        "Ledger: 4 of 18 samples missing; left out as bad: data/train-00001-of-00005.tar." in said
    )


@pytest.mark.parametrize("holdout", [8, 4])  # two shards, one of which is good, or the bad one
def test_bad_shard_of_held_out_samples_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], holdout: int
) -> None:
    write_dataset(tmp_path / "data", samples=20, samples_per_shard=4, size_px=32)
    flip_byte(tmp_path / "data/data/train-00004-of-00005.tar", 600)
    given = options(tmp_path / "data", tmp_path / "run", holdout=holdout, checkpoint_every=1)
    for ratio, more in ((0, ""), (0.1, "; with it 4 of 20 samples would be left out, more than")):
        with pytest.raises(TrainerError, match=f"00004-of-00005.tar: SHA-256 differs.*{more}"):
            pretrain(replace(given, max_bad_ratio=ratio, out=str(tmp_path / f"run-{ratio}")))
    capsys.readouterr()
    pretrain(replace(given, max_bad_ratio=0.2))
    told = capsys.readouterr()
    assert told.err.count("its held-out samples are left out: 4 of 20 samples so far") == 1
    assert "no shard was left out" in told.out  # of those trained on
    losses = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "holdout"]
    assert ("Held-out loss" in told.out) == bool(losses) == (holdout == 8)
    assert (tmp_path / "run/figure5/epoch-0001.png").is_file() == (holdout == 8)


@pytest.mark.parametrize("kept_bytes", [0, 10**6])
def test_held_out_shards_are_verified_once_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    write_dataset(tmp_path / "data", samples=20, samples_per_shard=10, size_px=32)
    opened = []
    plain = trainer.samples.open_shard

    def counted(storage: Storage, cache: Cache, record: ShardRecord) -> BinaryIO:
        opened.append(record.name)
        return plain(storage, cache, record)

    monkeypatch.setattr(trainer.samples, "open_shard", counted)
    monkeypatch.setattr(trainer.saving, "KEPT_BYTES", kept_bytes)
    given = options(tmp_path / "data", tmp_path / "run", holdout=10, batch_size=4)
    pretrain(replace(given, duration=Duration(steps=2), checkpoint_every=1))  # three batches each
    assert opened == ["data/train-00001-of-00002.tar"] * (1 if kept_bytes else 2)


def test_parameters_alone_train_as_their_images(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images")
    write_parameters(tmp_path / "parameters")
    found = {}
    for name in ("images", "parameters"):
        pretrain(options(tmp_path / name, tmp_path / f"run-{name}", loss="indirect"))
        lines = read_metrics(tmp_path / f"run-{name}")
        found[name] = {line["kind"]: line["loss"] for line in lines}
        found[f"ledger {name}"] = (tmp_path / f"run-{name}" / "ledger.json").read_text()
    # A grey level in a thousand is rounded otherwise, and two steps of Adam make more of it.
    assert found["parameters"] == pytest.approx(found["images"], rel=1e-2)
    assert found["ledger parameters"] == found["ledger images"]


def test_averaged_weights_are_exported_and_survive_a_resume(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", size_px=32)
    given = options(tmp_path / "data", tmp_path / "calm", ema=0.5, duration=Duration(steps=3))
    pretrain(given)
    resumed = replace(given, out=str(tmp_path / "resumed"))
    pretrain(replace(resumed, duration=Duration(steps=2)))
    pretrain(resumed)
    found, expected = weights(tmp_path / "resumed"), weights(tmp_path / "calm")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tensors = load_file(tmp_path / "calm" / "checkpoint-00000003.safetensors")
    name = "layer1.0.conv1.weight"
    assert torch.equal(expected[name], tensors[f"ema/{name}"])
    assert not torch.equal(expected[name], tensors[f"model/{name}"])
    with pytest.raises(TrainerError, match=r"was started with --ema 0\.5, now without --ema"):
        pretrain(replace(given, ema=None))


def test_cosine_and_warm_up_reach_the_optimizer(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", size_px=32)
    given = options(
        tmp_path / "data",
        tmp_path / "run",
        schedule="cosine",
        warmup_steps=1,
        duration=Duration(steps=3),
        checkpoint_every=1,
    )
    pretrain(given)
    rates = [line["lr"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5])  # warm-up 1 of 1, then cos 0, cos pi / 2
    with pytest.raises(TrainerError, match="--schedule cosine: its end must be known"):
        pretrain(replace(given, out=str(tmp_path / "other"), duration=Duration(minutes=1)))


def test_preflights_choice_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", size_px=32)
    out = tmp_path / "run"
    given = options(tmp_path / "data", out, duration=Duration(steps=1))
    pretrain(given)
    assert json.loads((out / "run.json").read_text())["compiled"] is None
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"compiled": False}))
    pretrain(replace(given, duration=Duration(steps=2), compile="measure"))
    assert "torch.compile" not in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["compiled"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": 7}, "--micro-batches 7: a batch of 6 cannot be cut so often"),
        (
            {"schedule": "cosine", "duration": Duration(steps=3), "warmup_steps": 3},
            "--warmup-steps 3: the cosine ends after 3 steps",
        ),
        ({"out": "http://localhost:1/run"}, "--out http://localhost:1/run: http cannot be written"),
        ({"loss": "cross_entropy"}, "the dataset holds parameters; train on it with --task param"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_dataset(tmp_path / "data", size_px=32)
    with pytest.raises(TrainerError) as error:
        pretrain(replace(options(tmp_path / "data", tmp_path / "run"), **changes))  # type: ignore[arg-type]
    assert message in error.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50GB", 50 * 10**9), ("1.5tb", 15 * 10**11), ("512 M", 512 * 10**6), ("7", 7), ("0", 0)],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert Bytes().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5PB", "1e9", "0x10", "5 GiB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="is not a size; write 50GB"):
        Bytes().convert(text, None, None)
