"""The fetcher of a node: what it publishes, what it reports, and that nothing is left of it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import slots
from tests.parameters_by_hand import write_parameters
from tests.shards_by_hand import flip_byte, npy_bytes, write_dataset
from trainer.dataset import Dataset, read_dataset
from trainer.errors import TrainerError
from trainer.faulty import Faults, faulty_server
from trainer.node import DataOptions, Node, Slot, node, shards_in_flight
from trainer.order import Order, train_counts
from trainer.stops import Stopped
from trainer.storage import open_storage

SHARDS, SAMPLES = 6, 24  # four samples a shard
PARENT = """
import os, sys, time
from pathlib import Path
from tests.test_trainer_node import running
with running(sys.argv[1], Path(sys.argv[2])) as (node, dataset, order):
    for shard in order.window_at(0).shards:
        node.shard(shard, lambda: False)
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def running(
    url: str,
    cache: Path,
    position: int = 0,
    window_shards: int = 2,
    holdout: int = 0,
    cache_bytes: int = 10**9,
    max_bad_ratio: float = 0.0,
    **more: float,
) -> Iterator[tuple[Node, Dataset, Order]]:
    """A node of one process."""
    storage = open_storage(url)
    dataset = read_dataset(storage)
    counts = train_counts(np.array([shard.samples for shard in dataset.shards]), holdout)
    order = Order(dataset.order_key, 0, counts, window_shards)
    options = DataOptions(url, cache, cache_bytes, max_bad_ratio=max_bad_ratio)
    with node(
        options,
        storage,
        dataset,
        order,
        position,
        0,
        lambda: None,
        str,
        **more,  # type: ignore
    ) as found:
        yield found, dataset, order


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", samples=SAMPLES)
    return tmp_path / "set"


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def walk(
    found: Node, order: Order, epochs: int, batch: int = 4, first: int = 0
) -> dict[int, Slot | None]:
    """Consume the stream from an epoch on, and see that each slot is the shard asked for."""
    seen: dict[int, Slot | None] = {}
    size = order.train_samples
    for position in range(first * size, (first + epochs) * size, batch):
        for index in order.samples(position, position + batch).tolist():
            slot = seen[index // 4] = found.shard(index // 4, after(20))
            assert slot is None or slot.first == index // 4 * 4
        found.advance(position + batch)
    return seen


@pytest.mark.parametrize("write", [write_dataset, write_parameters])
def test_slots_are_what_the_shards_hold(tmp_path: Path, write: Callable[..., object]) -> None:
    write(tmp_path, samples=10)
    with running(str(tmp_path), tmp_path / "cache", holdout=1) as (found, dataset, _):
        for shard, record in enumerate(dataset.shards):
            slot = found.shard(shard, after(20))
            assert slot is not None
            path = tmp_path / record.name
            about = path.stat()
            assert (slot.path, slot.first) == (path, 4 * shard)
            assert slot.stamp == (about.st_size, about.st_mtime_ns, about.st_ino)
            np.testing.assert_array_equal(slot.rows, slots.index(path))
            assert found.shard(shard, after(0)) is slot
            with pytest.raises(ValueError, match="read-only"):
                slot.rows[0, 0] = 1
        assert found.quarantined() == []
        figures = found.figures()
    assert figures.verified_bytes >= sum(record.bytes for record in dataset.shards)
    assert (figures.fetched_bytes, figures.hits, figures.evictions) == (0, 0, 0)
    assert not (tmp_path / "cache").exists()


def test_two_windows_are_at_hand_and_no_more(folder: Path, tmp_path: Path) -> None:
    with running(str(folder), tmp_path / "cache") as (found, _, order):
        windows = order.windows(0)
        first, second, third = (next(windows).shards for _ in range(3))
        for shard in (*first, *second):
            assert found.shard(shard, after(20)) is not None
        for shard in third:
            with pytest.raises(Stopped):
                found.shard(shard, after(0.2))
        found.advance(7)
        with pytest.raises(Stopped):
            found.shard(third[0], after(0.2))
        found.advance(8)
        assert found.shard(third[0], after(20)) is not None
        assert found.shard(second[0], after(0)) is not None
        with pytest.raises(Stopped):
            found.shard(first[0], after(0.2))


def test_slot_stays_as_it_was_while_its_reader_waits_for_others(
    folder: Path, tmp_path: Path
) -> None:
    with running(str(folder), tmp_path / "cache") as (found, _, order):
        first = order.window_at(0).shards[0]
        slot = found.shard(first, after(20))
        assert slot is not None
        before = slot.rows.copy()
        for window, _ in zip(order.windows(0), range(5), strict=False):
            found.advance(window.start)
            for shard in window.shards:
                assert found.shard(shard, after(20)) is not None
        np.testing.assert_array_equal(slot.rows, before)


def test_every_epoch_is_verified_anew(folder: Path, tmp_path: Path) -> None:
    total = sum(path.stat().st_size for path in (folder / "data").iterdir())
    with running(str(folder), tmp_path / "cache", end=3 * SAMPLES) as (found, _, order):
        assert set(walk(found, order, 3)) == set(range(SHARDS))
        assert found.figures().verified_bytes == 3 * total


def test_batch_beyond_two_windows_is_served(tmp_path: Path) -> None:
    write_dataset(tmp_path, samples=10)
    with running(str(tmp_path), tmp_path, window_shards=1, ahead=64) as (found, _, order):
        walk(found, order, 20, batch=64)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 5),
    ahead=st.integers(1, 60),
)
def test_slots_are_enough_for_all_windows_in_flight(
    counts: list[int], window: int, ahead: int
) -> None:
    order = Order("k", 0, np.array(counts), window)
    most = shards_in_flight(order, ahead)
    for position in range(0, 2 * order.train_samples):
        flight = [order.window_at(position)]
        while len(flight) < 2 or flight[-1].stop < position + ahead:
            flight.append(order.window_at(flight[-1].stop))
        assert len({shard for window in flight for shard in window.shards}) <= most


def test_damage_is_one_line_in_whoever_waits(folder: Path, tmp_path: Path) -> None:
    with running(str(folder), tmp_path / "cache") as (found, _, order):
        bad = order.window_at(16).shards[0]
        flip_byte(folder / f"data/train-0000{bad}-of-00006.tar", 700)
        for shard in (*order.window_at(0).shards, *order.window_at(8).shards):
            assert found.shard(shard, after(20)) is not None  # what is good, is served
        found.advance(8)
        with pytest.raises(TrainerError, match=rf"train-0000{bad}-of-.*: SHA-256 differs"):
            found.shard(bad, after(20))


def test_damage_after_the_first_epoch_is_found(folder: Path, tmp_path: Path) -> None:
    with running(str(folder), tmp_path / "cache", window_shards=6) as (found, _, order):
        walk(found, order, 1)
        for number in range(6):
            flip_byte(folder / f"data/train-0000{number}-of-00006.tar", 700)
        with pytest.raises(TrainerError, match=r"SHA-256 differs"):
            walk(found, order, 3, first=1)


def test_shard_that_stays_bad_is_quarantined_and_reported(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "data/train-00002-of-00006.tar").unlink()
    with running(str(folder), tmp_path, max_bad_ratio=0.17) as (found, _, order):
        seen = walk(found, order, 2)
        assert [shard for shard, slot in seen.items() if slot is None] == [2]
        assert found.quarantined() == ["data/train-00002-of-00006.tar"]
        assert found.figures().quarantined_samples == 4
    assert capfd.readouterr().err == (
        f"Warning: {folder}/data/train-00002-of-00006.tar: no such file, but dataset.json lists "
        "it; the shard is left out: 4 of 24 samples so far\n"
    )
    flip_byte(folder / "data/train-00003-of-00006.tar", 700)
    with (
        running(str(folder), tmp_path, max_bad_ratio=0.17) as (found, _, order),
        pytest.raises(TrainerError, match=r"; with it 8 of 24 samples would be left out, more th"),
    ):
        walk(found, order, 1)


def test_ill_formed_shard_is_quarantined_too(tmp_path: Path) -> None:
    def spoil(member: str, data: bytes) -> bytes:
        return npy_bytes(np.zeros(19)) if member == "000000005.theta.npy" else data

    write_dataset(tmp_path, samples=12, edit=spoil)
    with running(str(tmp_path), tmp_path, max_bad_ratio=0.5) as (found, _, order):
        assert [shard for shard, slot in walk(found, order, 1).items() if slot is None] == [1]
    with (
        running(str(tmp_path), tmp_path) as (found, _, order),
        pytest.raises(TrainerError, match=r"000000005: theta\.npy holds"),
    ):
        walk(found, order, 1)


def test_other_processes_see_the_same(folder: Path, tmp_path: Path) -> None:
    with running(str(folder), tmp_path / "cache") as (found, _, order):
        shard = order.window_at(0).shards[0]
        program = (
            "import pickle, sys\n"
            "node = pickle.load(sys.stdin.buffer)\n"
            f"print(node.shard({shard}, lambda: False).first)"
        )
        run = subprocess.run(
            [sys.executable, "-c", program], input=pickle.dumps(found), capture_output=True
        )
        assert (run.stdout, run.stderr) == (b"%d\n" % (4 * shard), b"")
        child = os.fork()
        if child == 0:  # as a loader's worker
            slot = found.shard(shard, after(20))
            os._exit(0 if slot is not None and slot.first == 4 * shard else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_local_ranks_share_one_fetcher(folder: Path, tmp_path: Path) -> None:
    storage = open_storage(str(folder))
    with running(str(folder), tmp_path / "cache") as (first, dataset, order):
        path = f"/proc/{os.getpid()}/fd/{first._table.descriptor}"
        options = DataOptions(str(folder), tmp_path / "cache", 10**9)
        with node(
            options, storage, dataset, order, 0, 1, lambda: None, lambda said: said or path
        ) as second:
            shard = order.window_at(0).shards[0]
            slot = second.shard(shard, after(20))
            assert slot is not None
            np.testing.assert_array_equal(slot.rows, first.shard(shard, after(20)).rows)  # type: ignore


def test_fault_of_the_fetcher_itself_is_one_line(folder: Path, tmp_path: Path) -> None:
    (folder / "data/train-00002-of-00006.tar").unlink()
    with (
        running(str(folder), tmp_path, max_bad_ratio="all") as (found, _, order),  # type: ignore
        pytest.raises(TrainerError, match=r"^fetching the data failed \(TypeError: .*\)$"),
    ):
        walk(found, order, 1)


def fetchers() -> set[int]:
    """The fetchers on this machine that are children of this process, or orphans."""
    found = set()
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes()
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        if b"trainer.fetcher" in words and parent in (1, os.getpid()):
            found.add(int(process.name))
    return found


def fetchers_below(temporary: Path) -> list[int]:
    """The fetchers with this TMPDIR, whosever children: tests beside these have their own."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"trainer.fetcher" in words and f"TMPDIR={temporary}".encode() in environment:
            found.append(int(process.name))
    return found


def test_killed_fetcher_is_one_line(folder: Path, tmp_path: Path) -> None:
    before = fetchers()
    with running(str(folder), tmp_path / "cache") as (found, _, order):
        assert found.shard(order.window_at(0).shards[0], after(20)) is not None
        [fetcher] = fetchers() - before
        os.kill(fetcher, signal.SIGKILL)
        beyond = next(shard for shard in order.window_at(16).shards)
        with pytest.raises(TrainerError, match=r"was ended from outside.*; the same command"):
            found.shard(beyond, after(20))
    assert fetchers() == before


def test_signals_for_the_group_do_not_end_the_fetcher(folder: Path, tmp_path: Path) -> None:
    before = fetchers()
    with running(str(folder), tmp_path / "cache") as (found, _, order):
        [fetcher] = fetchers() - before
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(fetcher, number)  # at its start, too
        walk(found, order, 1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(fetcher, number)
        walk(found, order, 1, first=1)
    assert fetchers() == before


def open_files() -> set[str]:
    return {entry.name for entry in os.scandir("/proc/self/fd")}


def test_nothing_is_left_of_a_node(folder: Path, tmp_path: Path) -> None:
    before, opened, files = fetchers(), open_files(), set(tmp_path.rglob("*"))
    with running(str(folder), tmp_path / "cache") as (found, _, order):
        walk(found, order, 1)
    del found
    assert (fetchers(), open_files(), set(tmp_path.rglob("*"))) == (before, opened, files)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_killed_parent(folder: Path, tmp_path: Path, number: int) -> None:
    """Local data in place, and remote data in the midst of a fetch."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    slow = Faults(plan={"5.tar": ["drip..."], "1.tar": ["drip..."], "3.tar": ["drip..."]})
    with faulty_server(folder, slow) as server:
        for url in (str(folder), server.url):
            parent = subprocess.Popen(
                [sys.executable, "-c", PARENT, url, tmp_path / "cache"],
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parent.parent,
                env=os.environ | {"TMPDIR": str(temporary)},
            )
            assert parent.stdout is not None
            if url == str(folder):
                assert parent.stdout.readline() == b"ready\n"
            else:
                wait_until(lambda: list((tmp_path / "cache").glob("*.part")))
            assert fetchers_below(temporary)
            parent.send_signal(number)
            parent.communicate()
            wait_until(lambda: not fetchers_below(temporary), 5)
            assert list(temporary.iterdir()) == []
            assert list((tmp_path / "cache").glob("*.part")) == []


def wait_until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_remote_shards_are_read_from_the_network_once(folder: Path, tmp_path: Path) -> None:
    total = sum(path.stat().st_size for path in (folder / "data").iterdir())
    with faulty_server(folder) as server:
        with running(server.url, tmp_path / "cache", end=4 * SAMPLES) as (found, _, order):
            walk(found, order, 4)
            figures = found.figures()
        assert (figures.fetched_bytes, figures.evictions) == (total, 0)
        assert figures.hits == 3 * SHARDS
        with running(server.url, tmp_path / "cache", end=SAMPLES) as (found, _, order):
            walk(found, order, 1)
            assert (found.figures().fetched_bytes, found.figures().hits) == (0, SHARDS)


def bytes_of(paths: Iterable[Path]) -> int:
    """The size of files, of which some may be removed meanwhile."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_small_cache_is_never_exceeded(folder: Path, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in (folder / "data").iterdir())
    with faulty_server(folder) as server:
        with running(server.url, tmp_path, window_shards=1, cache_bytes=3 * size) as found_all:
            found, _, order = found_all
            for epoch in range(3):
                for position in range(epoch * SAMPLES, (epoch + 1) * SAMPLES, 4):
                    for index in order.samples(position, position + 4).tolist():
                        assert found.shard(index // 4, after(20)) is not None
                    found.advance(position + 4)
                    assert bytes_of(tmp_path.glob("*.*a*")) <= 3 * size
            assert found.figures().evictions > 0
        with (
            pytest.raises(TrainerError, match=rf"--cache-bytes {2 * size - 1}: .* take up to"),
            running(server.url, tmp_path, window_shards=1, cache_bytes=2 * size - 1),
        ):
            pass


def test_faults_on_the_way_cost_time_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "20")
    kinds = ("503", "reset", "cut", "flip", "changed", "empty", "whole")
    with faulty_server(folder) as server:
        server.faults = Faults(probability=0.4, kinds=kinds, plan={"dataset.json": [""]})
        with running(server.url, tmp_path / "cache") as (found, dataset, order):
            for shard, slot in walk(found, order, 1).items():
                assert slot is not None
                assert slot.path.name == f"{dataset.shards[shard].sha256}.tar"
                data = (folder / dataset.shards[shard].name).read_bytes()
                assert slot.path.read_bytes() == data
        assert sum(server.counts.faults.values()) > 0


def test_damaged_cache_file_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    with faulty_server(folder) as server:
        for damaged in (0, 1):
            with running(server.url, tmp_path / "cache", end=SAMPLES) as (found, _, order):
                seen = walk(found, order, 1)
                assert found.figures().damaged == damaged
            slot = seen[3]
            assert slot is not None
            flip_byte(slot.path, 900)
