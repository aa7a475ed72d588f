"""The decode-once cache: right or absent, within its bytes, shared, and nothing left of it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.shards_by_hand import write_dataset
from tests.slots import Slots, dataset_of
from trainer.dataset import Dataset
from trainer.decoded import Decoded, decoded_cache, row_bytes, row_count
from trainer.errors import TrainerError
from trainer.node import DataOptions, node
from trainer.order import Order
from trainer.samples import Samples
from trainer.storage import open_storage

PLENTY = 10**6
ROW = 896  # 16 * 16 * 3 + 4 * 19 + 12 = 856, rounded up to 64


def cache(folder: Path, dataset: Dataset, max_bytes: int = PLENTY):  # type: ignore[no-untyped-def]
    return decoded_cache(folder, max_bytes, dataset, 0, lambda: None, lambda path: str(path))


def bytes_room_for(rows: int) -> int:
    return 4096 + rows * (ROW + 1)


def opened(tmp_path: Path) -> tuple[Dataset, dict, Slots]:
    held = write_dataset(tmp_path / "data")
    dataset = dataset_of(tmp_path / "data")
    return dataset, held, Slots(tmp_path / "data", dataset)


def test_decoded_samples_are_those_of_the_shards(tmp_path: Path) -> None:
    dataset, held, slots = opened(tmp_path)
    with cache(tmp_path / "cache", dataset) as decoded:
        samples = Samples(dataset, slots, decoded)
        samples.batch(range(10))
        slots.asked.clear()
        batch = samples.batch([9, 0, 5])
    assert slots.asked == []
    for row, index in enumerate([9, 0, 5]):
        np.testing.assert_array_equal(batch.images[row].numpy(), held["images"][index])
        np.testing.assert_array_equal(batch.theta[row].numpy(), held["thetas"][index])
    assert batch.normal.tolist() == [0, 0, 2]
    assert batch.index.tolist() == [9, 0, 5]


def test_first_samples_that_fit_are_kept(tmp_path: Path) -> None:
    dataset, _, slots = opened(tmp_path)
    assert row_bytes(dataset) == ROW
    with cache(tmp_path, dataset, bytes_room_for(6)) as decoded:
        samples = Samples(dataset, slots, decoded)
        samples.batch(range(10))
        slots.asked.clear()
        samples.batch([5])
        assert slots.asked == []
        samples.batch([6])
        assert slots.asked == [1]


@pytest.mark.parametrize("size", [0, bytes_room_for(1) - 1])
def test_no_room_for_a_sample_is_no_cache(tmp_path: Path, size: int) -> None:
    dataset, _, _ = opened(tmp_path)
    with cache(tmp_path, dataset, size) as decoded:
        assert decoded is None
    assert row_count(dataset, bytes_room_for(1)) == 1


def test_complete_tells_of_shards_all_of_whose_samples_are_kept(tmp_path: Path) -> None:
    dataset, _, slots = opened(tmp_path)  # shards of 4, 4 and 2
    with cache(tmp_path, dataset, bytes_room_for(9)) as decoded:
        samples = Samples(dataset, slots, decoded)
        samples.batch([0, 1, 2])
        assert [decoded.complete(shard) for shard in range(3)] == [False, False, False]
        samples.batch([3, 4, 5, 6, 7, 8, 9])
        assert [decoded.complete(shard) for shard in range(3)] == [True, True, False]


@pytest.mark.parametrize("place", [0, 500, 800, 846, 855])  # image, theta, normal, checksum
def test_damaged_row_is_decoded_again(tmp_path: Path, place: int) -> None:
    dataset, held, slots = opened(tmp_path)
    with cache(tmp_path, dataset) as decoded:
        samples = Samples(dataset, slots, decoded)
        samples.batch(range(10))
        position = decoded.start + 5 * ROW + place
        byte = os.pread(decoded.file, 1, position)[0]
        os.pwrite(decoded.file, bytes([byte ^ 1]), position)
        assert decoded.complete(1)
        slots.asked.clear()
        batch = samples.batch([4, 5, 6])
        assert slots.asked == [1]
        np.testing.assert_array_equal(batch.images.numpy(), np.stack(held["images"][4:7]))
        np.testing.assert_array_equal(batch.theta.numpy(), np.stack(held["thetas"][4:7]))
        slots.asked.clear()
        samples.batch([5])
        assert slots.asked == []


def test_row_without_its_flag_does_not_count(tmp_path: Path) -> None:
    dataset, _, slots = opened(tmp_path)
    with cache(tmp_path, dataset) as decoded:
        samples = Samples(dataset, slots, decoded)
        samples.batch([5])
        os.pwrite(decoded.file, b"\0", 5)
        image, theta = np.empty((16, 16, 3), np.uint8), np.empty(19, np.float32)
        assert decoded.read(5, image, theta) is None


def test_ranks_share_what_one_of_them_decoded(tmp_path: Path) -> None:
    dataset, held, slots = opened(tmp_path)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    steps = context.Barrier(2)
    child = context.Process(target=second_rank, args=(tmp_path, dataset, theirs, steps))
    child.start()

    def share(path: str | None) -> str:
        ours.send(path)
        return str(path)

    with decoded_cache(tmp_path / "c", PLENTY, dataset, 0, steps.wait, share) as decoded:
        assert list((tmp_path / "c").iterdir()) == []
        Samples(dataset, slots, decoded).batch([2, 3])
        ours.send("go on")
        np.testing.assert_array_equal(ours.recv(), held["images"][3])
        again = pickle.loads(pickle.dumps(decoded))
        assert not again.complete(0)
        os.close(again.file)
    child.join()
    ours.close()
    theirs.close()


def second_rank(folder, dataset, pipe, steps):  # type: ignore[no-untyped-def]
    with decoded_cache(
        folder / "c", PLENTY, dataset, 1, steps.wait, lambda path: pipe.recv()
    ) as decoded:
        pipe.recv()
        image, theta = np.empty((16, 16, 3), np.uint8), np.empty(19, np.float32)
        assert decoded.read(3, image, theta) == 0
        pipe.send(image)


def test_disk_without_room_is_one_line(tmp_path: Path) -> None:
    opened(tmp_path)
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    code += "from tests.test_trainer_decoded import limited; limited()"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # One page of flags and ten rows.
    assert "no room for 13056 bytes of decoded images (File too large); give" in run.stdout
    assert list((tmp_path / "cache").iterdir()) == []


def limited() -> None:
    dataset = dataset_of(Path(sys.argv[1]) / "data")
    with pytest.raises(TrainerError) as error, cache(Path(sys.argv[1]) / "cache", dataset):
        pass
    print(error.value.message)


def test_file_has_no_name_and_its_bytes_are_bounded(tmp_path: Path) -> None:
    dataset, _, _ = opened(tmp_path)
    with cache(tmp_path / "cache", dataset, bytes_room_for(6)) as decoded:
        assert list((tmp_path / "cache").iterdir()) == []
        about = os.fstat(decoded.file)
        assert about.st_nlink == 0
        assert about.st_size <= bytes_room_for(6)
        assert about.st_blocks * 512 >= about.st_size  # reserved
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(decoded.file)


def test_full_disk_in_the_midst_costs_the_row_alone(tmp_path: Path) -> None:
    dataset, held, _ = opened(tmp_path)
    with (tmp_path / "read-only").open("wb") as file:
        file.truncate(PLENTY)
    number = os.open(tmp_path / "read-only", os.O_RDONLY)
    decoded = Decoded(number, dataset, 10)  # every write fails
    decoded.write(1, held["images"][1], held["thetas"][1], 0)
    assert decoded.read(1, np.empty((16, 16, 3), np.uint8), np.empty(19, np.float32)) is None
    os.close(number)


def test_disk_that_fails_is_one_line(tmp_path: Path) -> None:
    dataset, held, _ = opened(tmp_path)
    image, theta = np.empty((16, 16, 3), np.uint8), np.empty(19, np.float32)
    path = tmp_path / "rows"
    number = os.open(path, os.O_RDWR | os.O_CREAT)
    Decoded(number, dataset, 10).write(1, held["images"][1], held["thetas"][1], 0)
    os.pwrite(number, b"x", 4096 + ROW)
    os.close(number)
    for mode in (os.O_RDONLY, os.O_WRONLY):  # the damaged row cannot be cleared; not be read
        number = os.open(path, mode)
        decoded = Decoded(number, dataset, 10)
        with pytest.raises(TrainerError, match=r"decoded images cannot be used \(Bad file desc"):
            decoded.read(1, image, theta)
        os.close(number)


def test_file_never_had_a_name(tmp_path: Path) -> None:
    dataset, _, _ = opened(tmp_path)
    with cache(tmp_path / "cache", dataset) as decoded:
        assert "decoded-" not in Path(decoded.path).readlink().name


def test_file_system_without_nameless_files_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, held, slots = opened(tmp_path)
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # EISDIR, as without it
    with cache(tmp_path / "cache", dataset) as decoded:
        assert list((tmp_path / "cache").iterdir()) == []
        Samples(dataset, slots, decoded).batch([5])
        image, theta = np.empty((16, 16, 3), np.uint8), np.empty(19, np.float32)
        assert decoded.read(5, image, theta) == 2
        np.testing.assert_array_equal(image, held["images"][5])


def test_shard_that_is_decoded_is_not_asked_for_until_a_row_is_damaged(tmp_path: Path) -> None:
    dataset, held, slots = opened(tmp_path)
    storage = open_storage(str(tmp_path / "data"))
    order = Order(dataset.order_key, 0, np.array([4, 4, 2]), window_shards=3)
    options = DataOptions(str(tmp_path / "data"), tmp_path / "cache", 10**6, PLENTY)
    path = slots.slots[1].path
    with cache(tmp_path / "cache", dataset) as decoded:
        Samples(dataset, slots, decoded).batch([4, 5, 6, 7])
        path.rename(path.with_suffix(".away"))
        with node(
            options, storage, dataset, order, 0, 0, lambda: None, str, decoded=decoded
        ) as shards:
            samples = Samples(dataset, shards, decoded)
            batch = samples.batch(range(10))
            np.testing.assert_array_equal(batch.images.numpy(), np.stack(held["images"]))
            os.pwrite(decoded.file, b"\xff", decoded.start + 6 * ROW)
            path.with_suffix(".away").rename(path)
            batch = samples.batch(range(10))
            np.testing.assert_array_equal(batch.images.numpy(), np.stack(held["images"]))
            samples.close()
