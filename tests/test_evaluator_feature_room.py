"""The features' folder: what goes when it is full, what stays, what killed runs leave."""

import os
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluator.errors import EvaluatorError
from evaluator.feature_files import write_features
from evaluator.features import FeatureCache, _creating, feature_kind
from evaluator.networks import Network
from tests.evaluator_features import (
    CPU,
    FILE_BYTES,
    PROTOCOL,
    SHAPES,
    WEIGHTS,
    TwoLayers,
    make_network,
    photographs,
    read_all,
    stored,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", 2**30)


@pytest.fixture
def images(tmp_path: Path) -> list[tuple[Path, str]]:
    return photographs(tmp_path / "photographs")


def test_least_recently_used_files_go_first(cache, images):
    read_all(cache, make_network(), images)
    by_photograph = {path.stem: path for path in stored(cache.folder)}
    for age_s, (_, digest) in zip((10, 30, 20), images, strict=True):
        os.utime(by_photograph[digest], (10**9 - age_s, 10**9 - age_s))
    small = FeatureCache(cache.folder, 2 * FILE_BYTES)
    read_all(small, make_network(), images[1:2])  # the oldest, used now
    assert {path.stem for path in stored(cache.folder)} == {images[0][1], images[1][1]}
    assert small.statistics.removed == 1
    assert small.statistics.stored_bytes == 2 * FILE_BYTES


def test_files_in_use_stay_above_the_limit(cache, images, tmp_path):
    small = FeatureCache(cache.folder, 0)
    others = photographs(tmp_path / "others", seed=1)
    with small.features(
        make_network(), WEIGHTS, "tiny", images, PROTOCOL, "float32", 2, lambda n: None
    ) as features:
        before = features.layers[0].read(0, 8)
        read_all(small, make_network(), others)  # as another process would
        assert {path.stem for path in stored(cache.folder)} == {digest for _, digest in images}
        np.testing.assert_array_equal(features.layers[0].read(0, 8), before)
    assert stored(cache.folder) == []


def test_files_of_others_are_never_removed(cache, images):
    weights = cache.folder / "run" / "backbone.safetensors"
    beside = cache.folder / ("a" * 64) / "backbone.safetensors"
    paper = cache.folder / "leases" / "flat.txt"
    for path in (weights, beside, paper):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"weights")
    read_all(FeatureCache(cache.folder, 0), make_network(), images)
    assert stored(cache.folder) == sorted([weights, beside])
    assert paper.exists()


def test_what_a_killed_writer_left_is_removed(cache, images):
    read_all(cache, make_network(), images)
    group = stored(cache.folder)[0].parent
    left = group / f".{'0' * 64}.safetensors.{'1' * 16}.tmp"
    left.write_bytes(b"half")
    (cache.folder / "leases" / ("1" * 16)).write_text(f"{group.name}/x\n")
    read_all(cache, make_network(), images)
    assert not left.exists()
    assert [path.name for path in (cache.folder / "leases").iterdir()] == ["lock"]


KILLED = """
import sys
from pathlib import Path
from evaluator.feature_room import lease, temporary_path
folder = Path(sys.argv[1])
mine = folder / ("a" * 64) / ("b" * 64 + ".safetensors")
with lease(folder, [mine]) as holder:
    temporary_path(mine, holder).write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_respected_until_it_is_killed(cache, images):
    group = cache.folder / ("a" * 64)
    group.mkdir(parents=True)
    mine, nobodys = (f"{letter * 64}.safetensors" for letter in "bc")
    (group / mine).write_bytes(b"x")
    (group / nobodys).write_bytes(b"x")
    strict = FeatureCache(cache.folder, 0)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(cache.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        read_all(strict, make_network(), images)
        names = sorted(path.name for path in group.iterdir())
        assert names[1:] == [mine]
        assert names[0].endswith(".tmp")
        process.send_signal(signal.SIGKILL)
    read_all(strict, make_network(), images)
    assert list(group.iterdir()) == []


def test_two_runs_on_one_folder_at_once(cache, images):
    barrier = threading.Barrier(2)

    def run(network: Network) -> list[np.ndarray]:
        barrier.wait()
        return read_all(FeatureCache(cache.folder, 0), network, images, batch_size=1)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, [make_network(), make_network()])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


class Interrupts(TwoLayers):
    """Stops like ctrl-C at the third photograph."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.seen == 2:
            raise KeyboardInterrupt
        return super().forward(images)


def test_interrupted_run_leaves_whole_files_only(cache, images):
    network = make_network()
    interrupted = Network(
        "tiny", Interrupts(), network.layers, SHAPES, network.mean, network.std, CPU
    )
    with pytest.raises(KeyboardInterrupt):
        read_all(cache, interrupted, images, batch_size=1)
    kept = len(stored(cache.folder))
    assert kept in (1, 2)  # the second was being written, or had not begun to be
    assert list(cache.folder.glob("*/.*")) == []
    read_all(cache, network, images)
    assert network.extractor.seen == 3 - kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is full")
def test_full_disk_is_one_line(cache, images):
    # Writing to a temporary file that leads to /dev/full gives the error of a full disk.
    kind = feature_kind(make_network(), WEIGHTS, "tiny", PROTOCOL, "float32")
    cache.folder.mkdir()
    temporary = cache.folder / "x.tmp"
    temporary.symlink_to("/dev/full")
    values = [np.zeros((h, w, c), np.float32) for c, h, w in SHAPES]
    with (
        pytest.raises(EvaluatorError, match=r"No space left on device.; make room, or") as caught,
        _creating(cache.folder, 3, kind),
    ):
        write_features(cache.folder / "x", temporary, kind, "0" * 64, values)
    assert "\n" not in caught.value.message
    assert not temporary.is_symlink()


def test_disk_that_takes_no_more_is_one_line_and_leaves_nothing(cache, images):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES - 1, hard))
    try:
        with pytest.raises(
            EvaluatorError, match=r"cannot keep .* GiB .* of 3 photographs"
        ) as caught:
            read_all(cache, make_network(), images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in caught.value.message
    assert [path for path in cache.folder.glob("*/*") if path.name != "lock"] == []


def test_folder_that_is_a_file_is_one_line(tmp_path, images):
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(EvaluatorError, match="cache: cannot be used for cached features"):
        read_all(FeatureCache(tmp_path / "cache", 0), make_network(), images)


def test_file_that_vanishes_in_use_is_one_line(cache, images):
    with cache.features(
        make_network(), WEIGHTS, "tiny", images, PROTOCOL, "float32", 2, lambda n: None
    ) as features:
        stored(cache.folder)[0].unlink()
        with pytest.raises(EvaluatorError, match=r"cannot be read .*; run again"):
            features.layers[0].read(0, 8)
        stored(cache.folder)[0].write_bytes(b"short")
        with pytest.raises(EvaluatorError, match=r"run again"):
            features.layers[0].read(0, 8)
