"""Samples: what was written is what is read, from slots as the node gives them."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.classes_by_hand import write_class_set
from tests.shards_by_hand import flip_byte, write_dataset
from tests.slots import Slots, dataset_of
from trainer import images
from trainer.cache import Cache
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.images import decode_image
from trainer.index import BadShard
from trainer.node import Slot
from trainer.samples import IDLE_BATCHES, Samples, read_now, samples_now
from trainer.storage import open_storage


def open_samples(folder: Path) -> tuple[Samples, Slots]:
    dataset = dataset_of(folder)
    slots = Slots(folder, dataset)
    return Samples(dataset, slots), slots


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def encoded(pixels: np.ndarray, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("suffix", "channels"), [("webp", 3), ("webp", 1), ("png", 3), ("png", 1)])
def test_batch_gives_what_was_written(tmp_path: Path, suffix: str, channels: int) -> None:
    held = write_dataset(tmp_path, suffix=suffix, channels=channels)
    batch = open_samples(tmp_path)[0].batch([7, 0, 9])
    assert batch.index.tolist() == [7, 0, 9]
    for row, index in enumerate([7, 0, 9]):
        np.testing.assert_array_equal(batch.images[row].numpy(), held["images"][index])
        np.testing.assert_array_equal(batch.theta[row].numpy(), held["thetas"][index])
    assert batch.normal.tolist() == [1, 0, 0]
    assert (batch.seconds >= 0).all()


def test_batch_of_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    held = write_dataset(tmp_path, suffix="jpg", size_px=32)
    batch = open_samples(tmp_path)[0].batch(range(10))
    for image, pixels in zip(batch.images.numpy(), held["images"], strict=True):
        plain = np.asarray(Image.open(io.BytesIO(encoded(pixels, "JPEG"))))
        np.testing.assert_array_equal(image, plain)


def test_batch_leaves_quarantined_shards_out(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    samples, slots = open_samples(tmp_path)
    slots.quarantined = {1}  # samples 4 to 7
    batch = samples.batch([5, 0, 9, 4])
    assert batch.index.tolist() == [0, 9]
    assert batch.images.shape == (2, 16, 16, 3)
    assert samples.batch([5, 4]).images.shape == (0, 16, 16, 3)


def test_batch_asks_once_for_each_shard(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    samples, slots = open_samples(tmp_path)
    samples.batch([0, 9, 1, 8, 2])
    assert slots.asked == [0, 2]


def test_batch_of_nothing_is_empty(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    assert open_samples(tmp_path)[0].batch([]).theta.shape == (0, 19)


@pytest.mark.parametrize("change", ["touched", "cut", "replaced", "gone"])
def test_shard_changed_after_verification_is_refused(tmp_path: Path, change: str) -> None:
    write_dataset(tmp_path)
    samples, slots = open_samples(tmp_path)
    samples.batch([7])
    path = slots.slots[1].path
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "cut":
        os.truncate(path, 1000)
    elif change == "replaced":
        samples.close()
        path.with_suffix(".new").write_bytes(path.read_bytes())
        path.with_suffix(".new").rename(path)
    else:
        samples.close()
        path.unlink()
    message = "No such file" if change == "gone" else "was changed after it had been verified"
    with pytest.raises(TrainerError, match=message):
        samples.batch([7])


def test_shard_verified_anew_is_opened_anew(tmp_path: Path) -> None:
    held = write_dataset(tmp_path)
    samples, slots = open_samples(tmp_path)
    samples.batch([7])
    path = slots.slots[1].path
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)
    slots.slots = Slots(tmp_path, samples.dataset).slots
    np.testing.assert_array_equal(samples.batch([7]).images[0].numpy(), held["images"][7])


def test_files_of_idle_shards_are_closed(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    samples, _ = open_samples(tmp_path)
    before = open_files()
    samples.batch(range(10))
    assert open_files() == before + 3
    for _ in range(IDLE_BATCHES + 1):
        samples.batch([0])
    assert open_files() == before + 1
    samples.close()
    assert open_files() == before


def test_files_of_evicted_shards_are_closed(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    samples, slots = open_samples(tmp_path)
    before = open_files()
    samples.batch(range(10))
    slots.slots[1].path.unlink()
    samples.batch([0])
    assert open_files() == before + 2
    slots.slots[2].path.unlink()
    found = []

    def shard(number: int, stop: Callable[[], bool]) -> Slot | None:
        stop()  # as a node does that waits: the next shard may need the room
        found.append(open_files())
        return slots.slots[number]

    slots.shard = shard  # type: ignore[method-assign]
    samples.batch([1])
    assert found == [before + 1]
    samples.close()


def test_shard_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    samples, slots = open_samples(tmp_path)
    plain = slots.shard

    def shard(number: int, stop: Callable[[], bool]) -> Slot | None:
        if number == 2:  # sample 0 was read by then
            os.utime(slots.slots[0].path, ns=(1, 1))
        return plain(number, stop)

    slots.shard = shard  # type: ignore[method-assign]
    with pytest.raises(TrainerError, match=r"00000-of-00003.tar: was changed after it had been"):
        samples.batch([0, 9])


def other_size(data: bytes) -> bytes:
    return encoded(np.zeros((16, 17, 3), np.uint8), "WEBP", lossless=True)


def bomb(data: bytes) -> bytes:
    """A PNG header that promises 60,000 x 60,000 pixels, under a WebP's name."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(
        ">I4sIIBBBBB", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_size, "image of 17 x 16 pixels, mode RGB; dataset.json says 16 x 16"),
        (bomb, "not readable as WEBP"),
        (lambda data: data[:40], "not readable as WEBP"),
    ],
)
def test_bad_image_is_refused_with_shard_and_key(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    target = "000000005.webp"
    write_dataset(tmp_path, edit=lambda member, data: change(data) if member == target else data)
    with pytest.raises(TrainerError) as error:
        open_samples(tmp_path)[0].batch([0, 5])
    assert message in error.value.message
    assert "train-00001-of-00003.tar: 000000005" in error.value.message
    assert "\n" not in error.value.message


ODD = {
    "cut JPEG": ("jpg", lambda p: encoded(p, "JPEG")[:-200], "not readable as JPEG"),
    "JPEG cut and closed": ("jpg", lambda p: encoded(p, "JPEG")[:20] + b"\xff\xd9", "not readable"),
    "grey JPEG": ("jpg", lambda p: encoded(p[..., 0], "JPEG"), "mode L"),
    "JPEG of four colours": ("jpg", lambda p: _cmyk(p), "mode CMYK"),
    "WebP with alpha": ("webp", lambda p: _alpha(p), "mode RGBA"),
    "wide JPEG": ("jpg", lambda p: encoded(p[:16], "JPEG"), "32 x 16 pixels"),
}


def _cmyk(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def _alpha(pixels: np.ndarray) -> bytes:
    return encoded(np.dstack([pixels, pixels[..., 0]]), "WEBP", lossless=True)


@pytest.mark.parametrize("name", ODD)
def test_odd_image_is_refused_with_and_without_the_fast_decoders(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, make, message = ODD[name]
    data = make(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    lines = []
    for fast in (images.FAST, {}):
        monkeypatch.setattr(images, "FAST", fast)
        with pytest.raises(TrainerError) as error:
            decode_image(data, suffix, 32, 3, "here")
        lines.append(error.value.message)
    assert message in lines[0]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("suffix", "form", "options"),
    [
        ("webp", "WEBP", {"lossless": True, "method": 0, "quality": 0}),
        ("webp", "WEBP", {"quality": 80}),
        ("jpg", "JPEG", {"quality": 95, "subsampling": 0}),
        ("jpg", "JPEG", {"quality": 75, "subsampling": 2, "progressive": True}),
    ],
)
def test_fast_decoder_gives_the_pixels_of_pillow(
    suffix: str, form: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imagecodecs")
    assert suffix in images.FAST
    ramp = np.add.outer(np.arange(61), np.arange(61))[:, :, None] * np.array([1, 2, 3])
    noise = np.random.default_rng(1).integers(0, 40, (61, 61, 3))
    data = encoded((ramp + noise).astype(np.uint8), form, **options)
    fast = decode_image(data, suffix, 61, 3, "here")
    monkeypatch.setattr(images, "FAST", {})
    np.testing.assert_array_equal(fast, decode_image(data, suffix, 61, 3, "here"))


@pytest.mark.parametrize("wanted", [[3], [8, 9], [9, 0, 5]])
def test_read_now_gives_verified_samples(tmp_path: Path, wanted: list[int]) -> None:
    held = write_dataset(tmp_path / "data")
    batch = read_now(
        open_storage(str(tmp_path / "data")),
        Cache(tmp_path / "cache", 10**6),
        dataset_of(tmp_path / "data"),
        wanted,
    )
    assert batch.index.tolist() == wanted
    for image, index in zip(batch.images.numpy(), wanted, strict=True):
        np.testing.assert_array_equal(image, held["images"][index])


def test_read_now_refuses_a_damaged_shard_and_reads_no_other(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    dataset = dataset_of(tmp_path)
    flip_byte(tmp_path / dataset.shards[1].name, 700)  # samples 4 to 7
    storage, cache = open_storage(str(tmp_path)), Cache(tmp_path / "cache", 10**6)
    before = open_files()
    assert read_now(storage, cache, dataset, [3, 8]).index.tolist() == [3, 8]
    with pytest.raises(TrainerError, match=r"00001-of-00003.tar: SHA-256 differs"):
        read_now(storage, cache, dataset, [3, 4])
    assert open_files() == before


def test_bad_shard_outside_of_the_stream_can_be_left_out(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    dataset = dataset_of(tmp_path)
    flip_byte(tmp_path / dataset.shards[1].name, 700)  # samples 4 to 7
    storage, cache = open_storage(str(tmp_path)), Cache(tmp_path / "cache", 10**6)
    told: list[tuple[int, str]] = []

    def left_out(shard: int, error: BadShard) -> None:
        told.append((shard, error.message))

    with samples_now(storage, cache, dataset, left_out) as samples:
        assert samples.batch([3, 4, 8]).index.tolist() == [3, 8]
        assert samples.batch([5, 6]).index.tolist() == []
    [(shard, line)] = told
    assert shard == 1
    assert "00001-of-00003.tar: SHA-256 differs" in line


def test_shard_is_verified_once_for_many_batches(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    dataset = dataset_of(tmp_path)
    cache = Cache(tmp_path / "cache", 10**6)
    before = open_files()
    with samples_now(open_storage(str(tmp_path)), cache, dataset) as samples:
        for index in range(10):
            assert samples.batch([index]).index.tolist() == [index]
    assert cache.counters.verified_bytes == sum(shard.bytes for shard in dataset.shards)
    assert open_files() == before


def test_labelled_samples_have_a_label_and_no_parameters(tmp_path: Path) -> None:
    images, labels = write_class_set(tmp_path)
    dataset = read_dataset(tmp_path)
    batch = Samples(dataset, Slots(tmp_path, dataset)).batch([7, 0, 9])
    assert batch.normal.tolist() == [labels[7], labels[0], labels[9]] == [1, 0, 1]
    assert batch.theta.shape == (3, 0)
    np.testing.assert_array_equal(batch.images.numpy(), np.stack([images[i] for i in (7, 0, 9)]))
