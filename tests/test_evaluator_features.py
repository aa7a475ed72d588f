"""Cached features: computed once, equal to the network's, never trusted when damaged."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, safe_open
from torch import nn

from evaluator.errors import EvaluatorError
from evaluator.features import FeatureCache, feature_kind
from evaluator.networks import Network
from evaluator.protocols import PROTOCOLS, changed

pytestmark = pytest.mark.usefixtures("one_thread")

PROTOCOL = changed(PROTOCOLS["full"], resize_px=16)
WEIGHTS = "0" * 64
CPU = torch.device("cpu")
SHAPES = ((5, 8, 8), (7, 4, 4))
FILE_BYTES = 4096 + 4 * (5 * 64 + 7 * 16)


class TwoLayers(nn.Module):
    """Two strided convolutions; counts the photographs that it has seen."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.scale = scale
        self.seen = 0

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(images)
        fine = self.fine(images) * self.scale
        return {"fine": fine, "coarse": self.coarse(fine)}


def make_network(scale: float = 1.0) -> Network:
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return Network("tiny", TwoLayers(scale), ("fine", "coarse"), SHAPES, mean, std, CPU)


def photographs(folder: Path, count: int = 3, seed: int = 0) -> list[tuple[Path, str]]:
    rng = np.random.default_rng(seed)
    found = []
    folder.mkdir(exist_ok=True)
    for i in range(count):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
        found.append((path, sha256(path.read_bytes()).hexdigest()))
    return found


def pixels(images: list[tuple[Path, str]]) -> np.ndarray:
    lanczos = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.open(p).resize((16, 16), lanczos)) for p, _ in images])


def read_all(
    cache: FeatureCache,
    network: Network,
    images: list[tuple[Path, str]],
    *,
    dtype: str = "float32",
    batch_size: int = 2,
    weights: str = WEIGHTS,
    on_images=lambda count: None,
) -> list[np.ndarray]:
    with cache.features(
        network, weights, "tiny", images, PROTOCOL, dtype, batch_size, on_images
    ) as features:
        return [layer.read(0, layer.height) for layer in features.layers]


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", 2**30)


@pytest.fixture
def images(tmp_path: Path) -> list[tuple[Path, str]]:
    return photographs(tmp_path / "photographs")


def test_features_are_the_networks(cache, images):
    network = make_network()
    expected = network.extractor(
        torch.from_numpy(pixels(images)).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    )
    fine, coarse = read_all(cache, network, images)
    assert fine.shape == (3, 8, 8, 5)
    assert coarse.shape == (3, 4, 4, 7)
    for found, layer in ((fine, "fine"), (coarse, "coarse")):
        wanted = expected[layer].permute(0, 2, 3, 1).detach().numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_rows_are_a_part_of_the_layer(cache, images):
    with cache.features(
        make_network(), WEIGHTS, "tiny", images, PROTOCOL, "float32", 2, lambda n: None
    ) as features:
        fine = features.layers[0]
        assert (fine.images, fine.channels, fine.height, fine.width) == (3, 5, 8, 8)
        np.testing.assert_array_equal(fine.read(3, 5), fine.read(0, 8)[:, 3:5])
        assert fine.read(7, 8).dtype == np.float32


def test_second_run_asks_the_network_nothing(cache, images):
    first = read_all(cache, make_network(), images)
    network, heard = make_network(), []
    again = read_all(cache, network, images, on_images=heard.append)
    assert network.extractor.seen == 0
    assert sum(heard) == 3
    assert cache.statistics.found == cache.statistics.computed == 3
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_missing_photographs_are_computed(cache, images):
    read_all(cache, make_network(), images[:2])
    network = make_network()
    read_all(cache, network, images)
    assert network.extractor.seen == 1


def test_equal_photographs_are_computed_once(cache, images):
    path, digest = images[0]
    copy = path.with_name("copy.png")
    copy.write_bytes(path.read_bytes())
    network, heard = make_network(), []
    fine, _ = read_all(cache, network, [*images, (copy, digest)], on_images=heard.append)
    assert network.extractor.seen == 3
    assert sum(heard) == 4
    np.testing.assert_array_equal(fine[3], fine[0])


def test_order_is_the_one_asked_for(cache, images):
    forward, _ = read_all(cache, make_network(), images)
    backward, _ = read_all(cache, make_network(), images[::-1])
    np.testing.assert_array_equal(backward, forward[::-1])


def test_float16_rounds_to_the_nearest(cache, images):
    exact, _ = read_all(cache, make_network(), images)
    rounded, _ = read_all(cache, make_network(), images, dtype="float16")
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, exact.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    "change",
    [
        lambda kind: kind(weights="1" * 64),
        lambda kind: kind(arch="other"),
        lambda kind: kind(dtype="float16"),
        lambda kind: kind(protocol=changed(PROTOCOL, resize_px=17)),
        lambda kind: kind(protocol=changed(PROTOCOL, crop_px=15)),
        lambda kind: kind(protocol=changed(PROTOCOL, interpolation="bilinear")),
        lambda kind: kind(mean=(0.5, 0.5, 0.4)),
        lambda kind: kind(std=(0.5, 0.5, 0.4)),
        lambda kind: kind(layers=("fine", "other")),
    ],
)
def test_whatever_changes_the_values_has_a_folder_of_its_own(change):
    def kind(
        weights=WEIGHTS,
        arch="tiny",
        dtype="float32",
        protocol=PROTOCOL,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layers=("fine", "coarse"),
    ):
        network = Network("any name", nn.Identity(), layers, SHAPES, mean, std, CPU)
        return feature_kind(network, weights, arch, protocol, dtype).name

    assert re.fullmatch("[0-9a-f]{64}", kind())
    assert change(kind) != kind()


def test_blur_and_epsilon_share_the_features():
    network = make_network()
    names = {
        feature_kind(network, WEIGHTS, "tiny", protocol, "float32").name
        for protocol in (PROTOCOL, changed(PROTOCOL, blur_sigma_px=2.0, epsilon=0.1))
    }
    assert len(names) == 1


def test_file_is_a_safetensors_file_that_describes_itself(cache, images):
    fine, coarse = read_all(cache, make_network(), images[:1])
    (path,) = stored(cache.folder)
    assert path.stat().st_size == FILE_BYTES
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["fine"], fine[0])
    np.testing.assert_array_equal(tensors["coarse"], coarse[0])
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "semiformula-features"
    assert metadata["format_version"] == "1"
    assert metadata["image_sha256"] == images[0][1]
    assert sha256(metadata["description"].encode()).hexdigest() == path.parent.name


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        lambda data: data.replace(b'"format_version":"1"', b'"format_version":"2"'),
        lambda data: data[:4095] + b"\n" + data[4096:],
        lambda data: bytes(len(data)),
    ],
)
def test_damaged_file_is_computed_again(cache, images, damage):
    before = read_all(cache, make_network(), images)
    path = stored(cache.folder)[1]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    network = make_network()
    after = read_all(cache, network, images)
    assert network.extractor.seen == 1
    assert cache.statistics.damaged == 1
    assert "1 photographs computed" not in cache.summary()
    assert "(1 of them because their file was damaged)" in cache.summary()
    np.testing.assert_allclose(after[0], before[0], atol=1e-6)
    assert len(path.read_bytes()) == len(whole)


def test_another_photographs_file_is_not_taken(cache, images):
    read_all(cache, make_network(), images)
    first, second, _ = stored(cache.folder)
    second.write_bytes(first.read_bytes())
    network = make_network()
    read_all(cache, network, images)
    assert network.extractor.seen == 1


def test_photograph_that_changed_since_it_was_hashed_is_refused(cache, images):
    path, _ = images[1]
    Image.new("RGB", (20, 20)).save(path)
    with pytest.raises(EvaluatorError, match=re.escape(f"{path}: changed since it was checked")):
        read_all(cache, make_network(), images)


def test_features_that_are_not_finite_name_the_photograph(cache, images):
    with pytest.raises(EvaluatorError, match=r"'tiny': features of .*0\.png are not finite"):
        read_all(cache, make_network(float("nan")), images)
    assert stored(cache.folder) == []


def test_features_too_large_for_float16_are_refused(cache, images):
    large = make_network(1e6)
    with pytest.raises(EvaluatorError, match=r"0\.png are .* beyond float16's 65504; choose"):
        read_all(cache, large, images, dtype="float16")
    assert np.abs(read_all(cache, large, images)[0]).max() > 65504


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
    from evaluator.feature_files import write_features
    from evaluator.features import _creating

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
