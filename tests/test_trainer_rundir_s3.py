"""Runs in a real S3 service: pushed through faults, taken on by a bare machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_service import Service, fresh_bucket, running_service
from tests.shards_by_hand import write_dataset
from trainer.bucket import Bucket
from trainer.faulty import Faults, faulty_server

STEPS = 8


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as service:
        yield service


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    """A fresh bucket."""
    with fresh_bucket() as url:
        yield url


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", samples=18, samples_per_shard=7, size_px=32)
    return tmp_path / "data"


def start(data: Path, out: str, cache: Path, steps: int, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainer", "pretrain", "--data", str(data), "--out", out]
    command += ["--loss", "direct", "--arch", "mobilenet_v2", "--batch-size", "4"]
    command += ["--holdout", "3", "--workers", "0", "--steps", str(steps), "--cache", str(cache)]
    command += ["--checkpoint-every", "2", "--device", "cpu"]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def train(data: Path, out: str, cache: Path, log: Path, steps: int = STEPS) -> str:
    process = start(data, out, cache, steps, log)
    code = process.wait(timeout=300)
    text = log.read_text()
    assert code == 0, text
    return text


def assert_whole(url: str, steps: list[int]) -> None:
    """Whether the bucket holds these checkpoints and the product, byte for byte as they say."""
    bucket = Bucket(url)
    index = json.loads(bucket.read("checkpoint.json"))
    assert [record["step"] for record in index["checkpoints"]] == steps
    product = json.loads(bucket.read("backbone.json"))["weights"]
    for record in [*index["checkpoints"], product]:
        data = bucket.read(record["file"])
        assert len(data) == record["bytes"]
        assert hashlib.sha256(data).hexdigest() == record["sha256"]
    named = {record["file"] for record in index["checkpoints"]}
    assert {name for name in bucket.names() if name.startswith("checkpoint-")} == named
    assert "ledger.json" in bucket.names()
    assert "metrics.jsonl" in bucket.names()
    assert "figure5/epoch-0001.png" in bucket.names()


def test_run_killed_here_goes_on_there(url: str, data: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log.txt", f"{url}/run"
    process = start(data, out, tmp_path / "here", 5000, log)
    bucket = Bucket(out)
    deadline = time.monotonic() + 120
    while "checkpoint.json" not in bucket.names():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    step = json.loads(bucket.read("checkpoint.json"))["checkpoints"][0]["step"]
    text = train(data, out, tmp_path / "there", log, steps=step + 4)
    assert f"{step + 4} steps of 4" in text
    assert "(4 steps in this call)" in text
    assert_whole(out, [step + 4, step + 2])
    calm = tmp_path / "calm"
    train(data, str(calm), tmp_path / "cache", log, steps=step + 4)
    bytes_of = (calm / "backbone.safetensors").read_bytes()
    assert bucket.read("backbone.safetensors") == bytes_of
    assert bucket.read("ledger.json") == (calm / "ledger.json").read_bytes()


def test_run_through_a_failing_proxy_is_whole(
    url: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(probability=0.15, kinds=("503", "reset", "cut", "flip"), seed=1)
    with faulty_server(os.environ["AWS_ENDPOINT_URL_S3"], faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        train(data, f"{url}/run", tmp_path / "cache", tmp_path / "log.txt")
        assert sum(server.counts.faults.values()) >= 3
    monkeypatch.undo()
    assert_whole(f"{url}/run", [8, 6])


def test_signal_waits_for_the_push(url: str, data: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log.txt", f"{url}/run"
    process = start(data, out, tmp_path / "cache", 5000, log)
    bucket = Bucket(out)
    deadline = time.monotonic() + 120
    while "checkpoint.json" not in bucket.names():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    step = json.loads(bucket.read("checkpoint.json"))["checkpoints"][0]["step"]
    assert log.read_text() == f"Stopped by SIGTERM at step {step}; the same command goes on.\n"


def test_product_that_cannot_be_sent_is_sent_by_the_same_command(
    service: Service, url: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "2")
    log, out = tmp_path / "log.txt", f"{url}/run"
    with faulty_server(os.environ["AWS_ENDPOINT_URL_S3"]) as server:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL_S3", server.url)
            process = start(data, out, tmp_path / "cache", 40, log)
        bucket = Bucket(out)
        deadline = time.monotonic() + 120
        while "checkpoint.json" not in bucket.names():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.faults = Faults(probability=1.0, kinds=("503",))
        assert process.wait(timeout=200) == 1
    lines = log.read_text().splitlines()
    assert lines[-1].startswith(f"Error: {out}/")
    assert "the run is finished and its backbone in " in lines[-1]
    assert all(line.startswith(("Warning: ", "Error: ")) or "trying for" in line for line in lines)
    text = train(data, out, tmp_path / "cache", log, steps=40)
    assert "(0 steps in this call)" in text
    assert_whole(out, [40, 38])
