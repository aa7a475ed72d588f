"""Training data in a real S3 service, directly and through a proxy that fails on purpose."""

from __future__ import annotations

import io
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.s3_service import Service, fresh_bucket, put_folder, running_service
from tests.shards_by_hand import write_dataset
from trainer import ranges
from trainer.bucket import Bucket
from trainer.cache import Cache
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.faulty import Faults, faulty_server
from trainer.node import DataOptions, node
from trainer.order import Order
from trainer.shards import open_shard, read_normals

SAMPLES = 24


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
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", samples=SAMPLES)
    return tmp_path / "set"


@pytest.fixture
def proxy(service: Service, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Stands before the service from now on, and does nothing wrong yet."""
    with faulty_server(os.environ["AWS_ENDPOINT_URL_S3"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        yield server


def train_through(url: str, cache: Path, epochs: int = 1, **options: float) -> dict[str, float]:
    """Consume epochs of the stream; every slot's file is the shard, byte for byte."""
    storage = Bucket(url)
    dataset = read_dataset(storage)
    order = Order(dataset.order_key, 0, np.array([s.samples for s in dataset.shards]), 2)
    wanted = DataOptions(url, cache, 10**9, **options)
    end = time.monotonic() + 60
    with node(
        wanted, storage, dataset, order, 0, 0, lambda: None, str, end=epochs * SAMPLES
    ) as found:
        for position in range(0, epochs * SAMPLES, 4):
            for index in order.samples(position, position + 4).tolist():
                slot = found.shard(index // 4, lambda: time.monotonic() > end)
                if slot is not None:
                    assert slot.path.stem == dataset.shards[index // 4].sha256
            found.advance(position + 4)
        return vars(found.figures()) | {"quarantined": len(found.quarantined())}


def test_storage_gives_and_takes_files(url: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ranges, "PART_BYTES", 2**20)
    storage = Bucket(f"{url}/runs/a")
    data = np.random.default_rng(0).bytes(5 * 2**20 + 17)
    (tmp_path / "a").write_bytes(data)
    storage.put("deep/a.bin", tmp_path / "a")
    storage.put("b.json", b"{}")
    storage.put("empty", b"")
    assert storage.names() == ["b.json", "deep/a.bin", "empty"]
    assert storage.names("deep") == ["deep/a.bin"]
    assert storage.names("none") == []
    assert (storage.read("b.json"), storage.read("empty")) == (b"{}", b"")
    assert storage.read("deep/a.bin") == data
    with (tmp_path / "b").open("w+b") as file:
        storage.fetch("deep/a.bin", len(data), file)
    assert (tmp_path / "b").read_bytes() == data
    storage.delete("b.json")
    storage.delete("b.json")
    with (tmp_path / "b").open("w+b") as file:
        for operation in (storage.read, lambda name: storage.fetch(name, 2, file)):
            with pytest.raises(FileNotFoundError):
                operation("b.json")


def test_epochs_read_the_network_once(url: str, folder: Path, tmp_path: Path) -> None:
    put_folder(folder, f"{url}/set")
    total = sum(path.stat().st_size for path in (folder / "data").iterdir())
    figures = train_through(f"{url}/set", tmp_path / "cache", epochs=3)
    assert (figures["fetched_bytes"], figures["hits"]) == (total, 12)
    storage = Bucket(f"{url}/set")
    dataset = read_dataset(storage)
    normals = read_normals(storage, Cache(tmp_path / "cache", 10**9), dataset)
    np.testing.assert_array_equal(normals, read_normals_of(folder))


def read_normals_of(folder: Path) -> np.ndarray:
    [path] = (folder / "normals").iterdir()
    with tarfile.open(path) as tar:
        images = [
            np.asarray(Image.open(io.BytesIO(tar.extractfile(m).read())))  # type: ignore[union-attr]
            for m in tar
            if m.name.endswith(".webp")
        ]
    return np.stack(images)


@pytest.mark.parametrize("kinds", [["503"], ["reset", "cut", "empty"], ["flip", "changed"]])
def test_faults_of_the_way_cost_time_alone(
    url: str, folder: Path, tmp_path: Path, proxy, kinds: list[str]
) -> None:
    put_folder(folder, f"{url}/set")
    shards = ("train-00001-of-00006.tar", "train-00004-of-00006.tar")
    proxy.faults = Faults(plan={shard: ["", *kinds] for shard in shards})
    figures = train_through(f"{url}/set", tmp_path / "cache")
    assert figures["quarantined"] == 0
    assert sum(proxy.counts.faults.values()) > 0


def test_shard_that_stays_bad_is_one_line_or_quarantined(
    url: str, folder: Path, tmp_path: Path, proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "1")
    put_folder(folder, f"{url}/set")
    proxy.faults = Faults(plan={"train-00003-of-00006.tar": ["flip..."]})
    with pytest.raises(TrainerError, match=r"set/data/train-00003-of-.*the SHA-256 of what came"):
        train_through(f"{url}/set", tmp_path / "cache")
    figures = train_through(f"{url}/set", tmp_path / "cache", max_bad_ratio=0.2)
    assert (figures["quarantined"], figures["quarantined_samples"]) == (1, 4)


def test_killed_server_that_comes_back_is_waited_for(
    service: Service, url: str, folder: Path, tmp_path: Path
) -> None:
    put_folder(folder, f"{url}/set")
    storage, dataset = Bucket(f"{url}/set"), read_dataset(Bucket(f"{url}/set"))
    cache = Cache(tmp_path / "cache", 10**9)
    for number, server in enumerate(("proxy", "container", "object")):
        service.signal(server, signal.SIGKILL)
        revival = threading.Timer(0.5, service.start)
        revival.start()
        open_shard(storage, cache, dataset.shards[number]).close()
        revival.join()


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "guessed"}, "could not .*; check the credentials and the URL"),
        ({"AWS_ACCESS_KEY_ID": None}, r"could not .* \(.*credentials.*; check the credentials"),
    ],
    ids=["wrong-secret", "none"],
)
def test_credentials_that_do_not_fit_are_one_line_at_once(
    url: str,
    environment: dict[str, str | None],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where a credentials file would lie
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    start = time.monotonic()
    with (tmp_path / "a").open("w+b") as file:
        for operation in (
            lambda storage: read_dataset(storage),
            lambda storage: storage.fetch("a", 3, file),
            lambda storage: storage.names(),
            lambda storage: storage.put("a", b"1"),
            lambda storage: storage.delete("a"),
        ):
            with pytest.raises(TrainerError, match=line) as error:
                operation(Bucket(f"{url}/x"))
            assert "\n" not in error.value.message
    assert time.monotonic() - start < 10


def test_bucket_that_is_not_there_is_one_line_at_once(service: Service, tmp_path: Path) -> None:
    start = time.monotonic()
    with (tmp_path / "a").open("w+b") as file:
        for operation in (
            lambda storage: read_dataset(storage),
            lambda storage: storage.fetch("a", 3, file),
            lambda storage: storage.names(),
            lambda storage: storage.put("a", b"1"),
        ):
            with pytest.raises(TrainerError, match=r"s3://no-such-bucket/d: bucket 'no-such-buck"):
                operation(Bucket("s3://no-such-bucket/d"))
    assert time.monotonic() - start < 10


def test_dataset_that_is_not_there_is_one_line_at_once(url: str) -> None:
    with pytest.raises(TrainerError, match=rf"{url}/x: holds no dataset\.json; finish it"):
        read_dataset(Bucket(f"{url}/x"))
