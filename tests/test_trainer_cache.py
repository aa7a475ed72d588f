"""The cache of shards: verified, bounded, shared by processes, and clean after any kill."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.shards_by_hand import cut, flip_byte
from trainer import ranges
from trainer.cache import Cache, default_bytes, default_folder
from trainer.dataset import ShardRecord
from trainer.errors import TrainerError
from trainer.faulty import Faults, FaultyServer, faulty_server
from trainer.index import BadShard
from trainer.storage import Folder, Storage, open_storage

pytest.importorskip("aiohttp", reason="the extra [http] is not installed")

SIZE = 50_000


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "DRIP_SECONDS", 0.3)
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight objects of 50,000 bytes."""
    rng = np.random.default_rng(0)
    (tmp_path / "served/data").mkdir(parents=True)
    for i in range(8):
        (tmp_path / f"served/data/train-0000{i}-of-00008.tar").write_bytes(rng.bytes(SIZE))
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with faulty_server(folder) as server:
        yield server


@pytest.fixture
def remote(server: FaultyServer) -> Storage:
    return open_storage(server.url)


def records(folder: Path) -> list[ShardRecord]:
    found = []
    for path in sorted((folder / "data").iterdir()):
        data = path.read_bytes()
        found.append(
            ShardRecord(
                name=f"data/{path.name}",
                samples=1,
                bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
    return found


def here(cache: Cache, shards: list[ShardRecord]) -> set[int]:
    return {i for i, shard in enumerate(shards) if cache.path(shard).exists()}


def size_of(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_size if entry.name != "lock" else 0
        except FileNotFoundError:
            continue
    return total


def test_shard_is_fetched_once_and_verified_each_time(
    folder: Path, server: FaultyServer, remote: Storage, tmp_path: Path
) -> None:
    cache, shards = Cache(tmp_path / "cache", 10**6), records(folder)
    for _ in range(3):
        with cache.get(remote, shards[0]) as opened:
            assert opened.file.read() == (folder / shards[0].name).read_bytes()
    assert server.counts.requests == 1
    assert sorted(path.name for path in cache.folder.iterdir()) == [
        f"{shards[0].sha256}.tar",
        "lock",
    ]
    counters = cache.counters
    assert (counters.fetched_bytes, counters.hits, counters.damaged) == (SIZE, 2, 0)
    assert counters.verified_bytes == 3 * SIZE
    # The stamp of a file that is in use must not change.
    before = cache.path(shards[0]).stat()
    cache.get(remote, shards[0]).close()
    after = cache.path(shards[0]).stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert before.st_atime_ns < after.st_atime_ns


@pytest.mark.parametrize("damage", [lambda p: flip_byte(p, 70), lambda p: cut(p, 3)])
def test_damaged_file_is_fetched_again_and_counted(
    folder: Path, remote: Storage, tmp_path: Path, damage
) -> None:
    cache, shards = Cache(tmp_path / "cache", 10**6), records(folder)
    cache.get(remote, shards[0]).close()
    damage(cache.path(shards[0]))
    with cache.get(remote, shards[0]) as opened:
        assert opened.file.read() == (folder / shards[0].name).read_bytes()
    assert (cache.counters.damaged, cache.counters.fetched_bytes) == (1, 2 * SIZE)


def test_foreign_files_go_first_then_those_used_again_last(
    folder: Path, remote: Storage, tmp_path: Path
) -> None:
    cache, shards = Cache(tmp_path / "cache", 5 * SIZE), records(folder)
    for i in (0, 1, 2, 3, 4):
        cache.get(remote, shards[i]).close()
        time.sleep(0.01)
    cache.get(remote, shards[0]).close()  # used last
    soon = [shards[i].sha256 for i in (5, 3, 6, 7, 2, 4)]
    for i, left in (
        (5, {0, 2, 3, 4, 5}),  # 1 is foreign, and was used before 0
        (6, {2, 3, 4, 5, 6}),
        (7, {2, 3, 5, 6, 7}),  # 4 is used again last
        (1, {1, 3, 5, 6, 7}),
    ):
        cache.get(remote, shards[i], lambda: soon).close()
        assert here(cache, shards) == left
        assert size_of(cache.folder) == int((cache.folder / "lock").read_bytes()) <= 5 * SIZE
    assert cache.counters.evictions == 4


def test_victims_are_chosen_for_several_shards_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "set/data").mkdir(parents=True)
    for i in range(96):
        (tmp_path / f"set/data/train-{i:05d}-of-00096.tar").write_bytes(b"%d" % (1000 + i))
    shards, storage = records(tmp_path / "set"), Folder(tmp_path / "set")
    cache, order = Cache(tmp_path / "cache", 4 * 64), [shard.sha256 for shard in shards]
    asked = [0]

    def next_uses() -> list[str]:
        asked[0] += 1
        return order

    for shard in shards[:65]:
        cache.get(storage, shard, next_uses).close()
    assert here(cache, shards) == {*range(63), 64}
    cache.get(storage, shards[61]).close()  # one of the next four victims
    with cache.get(storage, shards[60]):  # another, now in use
        for shard in shards[65:67]:
            cache.get(storage, shard, next_uses).close()
    assert here(cache, shards) == {*range(59), 60, 61, 64, 65, 66}
    assert asked[0] == 1
    for shard in shards[67:]:
        cache.get(storage, shard, next_uses).close()
        assert size_of(cache.folder) <= 4 * 64
    assert 4 < asked[0] < 12
    assert here(cache, shards) >= set(range(25))


def test_sum_is_never_too_small_and_mends_itself(
    folder: Path, remote: Storage, tmp_path: Path
) -> None:
    cache, shards = Cache(tmp_path / "cache", 2 * SIZE), records(folder)
    (folder / shards[0].name).unlink()
    with pytest.raises(BadShard):
        cache.get(remote, shards[0])
    lock = cache.folder / "lock"
    assert int(lock.read_bytes()) == SIZE  # given up, and not taken off
    cache.get(remote, shards[1]).close()
    cache.get(remote, shards[2]).close()
    assert (here(cache, shards), int(lock.read_bytes())) == ({1, 2}, 2 * SIZE)
    lock.write_bytes(b"?")
    cache.get(remote, shards[3]).close()
    assert int(lock.read_bytes()) == 2 * SIZE == size_of(cache.folder)
    lock.write_bytes(b"0")  # as if files had been laid there by hand
    Cache(tmp_path / "cache", 2 * SIZE).get(remote, shards[4]).close()
    assert int(lock.read_bytes()) == 2 * SIZE == size_of(cache.folder)


def test_room_is_waited_for_while_another_run_goes_on(
    folder: Path, remote: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = (Cache(tmp_path / "cache", 2 * SIZE) for _ in range(2))
    shards, end = records(folder), time.monotonic() + 3.0
    held = [other.get(remote, shards[0]), other.get(remote, shards[1])]

    def go_on() -> None:
        while time.monotonic() < end:
            time.sleep(0.1)
            other.get(remote, shards[0]).close()
        held[0].close()

    thread = threading.Thread(target=go_on)
    thread.start()
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "2")
    cache.get(remote, shards[2]).close()
    thread.join()
    assert time.monotonic() > end
    held[1].close()


def test_file_in_use_is_not_evicted(
    folder: Path, remote: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "0.3")
    cache, shards = Cache(tmp_path / "cache", 2 * SIZE + 10), records(folder)
    with cache.get(remote, shards[0]), cache.get(remote, shards[1]) as second:
        with pytest.raises(TrainerError, match=r"no room for 50000 bytes in .* --cache-bytes"):
            cache.get(remote, shards[2])
        assert here(cache, shards) == {0, 1}
        freed = threading.Timer(0.2, second.close)
        freed.start()
        monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "5")
        cache.get(remote, shards[2]).close()
        freed.join()
        assert here(cache, shards) == {0, 2}


def test_shard_larger_than_the_limit_is_one_line_at_once(
    folder: Path, remote: Storage, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", SIZE - 1)
    with pytest.raises(
        TrainerError, match=r"no room for a shard of 50000 bytes; --cache-bytes is 49999"
    ):
        cache.get(remote, records(folder)[0])


def test_folder_that_cannot_be_used_is_one_line(
    folder: Path, remote: Storage, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name, why in (("file/cache", "Not a directory"), ("file", "File exists")):
        line = (
            rf"{name}: the cache cannot be used \({why}\); .* another --cache or SEMIFORMULA_CACHE"
        )
        with pytest.raises(TrainerError, match=line):
            Cache(tmp_path / name, 10**6).get(remote, records(folder)[0])


@pytest.mark.parametrize("fault", ["flip", "changed", "whole", "503", "cut", "empty", "reset"])
def test_fault_on_the_way_costs_time_alone(folder: Path, tmp_path: Path, fault: str) -> None:
    shards = records(folder)
    with faulty_server(folder, Faults(plan={"": [fault]})) as server:
        cache = Cache(tmp_path / "cache", 10**6)
        with cache.get(open_storage(server.url), shards[0]) as opened:
            assert opened.file.read() == (folder / shards[0].name).read_bytes()
        assert cache.counters.damaged == (fault in ("flip", "changed"))


def test_object_that_changes_midway_is_fetched_again(
    folder: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PART_BYTES", 10_000)
    shards = records(folder)
    wanted = (folder / shards[0].name).read_bytes()
    (folder / shards[0].name).write_bytes(wanted[::-1])  # what the first three requests see
    server.replace(shards[0].name, wanted, after_requests=3)
    cache = Cache(tmp_path / "cache", 10**6)
    with cache.get(open_storage(server.url), shards[0]) as opened:
        assert opened.file.read() == wanted
    assert cache.counters.damaged == 1


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("flip...", r"the SHA-256 of what came is not that of dataset.json"),
        ("503...", r"could not read in \d+ tr"),
    ],
)
def test_shard_that_stays_bad_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, line: str
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "0.5")
    with faulty_server(folder, Faults(plan={"": [fault]})) as server:
        cache = Cache(tmp_path / "cache", 10**6)
        with pytest.raises(BadShard, match=line) as error:
            cache.get(open_storage(server.url), records(folder)[0])
    assert "\n" not in error.value.message
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]


def test_missing_object_is_one_line_at_once(folder: Path, remote: Storage, tmp_path: Path) -> None:
    shard = records(folder)[0]
    (folder / shard.name).unlink()
    start = time.monotonic()
    with pytest.raises(BadShard, match=r"is not there, but dataset.json lists it"):
        Cache(tmp_path / "cache", 10**6).get(remote, shard)
    assert time.monotonic() - start < 1


PROGRAM = """
import random, sys, time
from pathlib import Path
from tests.test_trainer_cache import records
from trainer import ranges
from trainer.cache import Cache
from trainer.storage import open_storage
url, served, folder, limit, seed, rounds = sys.argv[1:]
ranges.DRIP_SECONDS = 60.0
shards, storage = records(Path(served)), open_storage(url)
cache, choice = Cache(Path(folder), int(limit)), random.Random(int(seed))
for _ in range(int(rounds)):
    shard = choice.choice(shards)
    with cache.get(storage, shard) as opened:
        assert len(opened.file.read()) == shard.bytes
        time.sleep(choice.random() / 100)
print(cache.counters.fetched_bytes)
"""


def reader(server: FaultyServer, folder: Path, cache: Path, *words: object) -> subprocess.Popen:
    given = [server.url, folder, cache, *words]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, given)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"SEMIFORMULA_RETRY_SECONDS": "60"},
        stdout=subprocess.PIPE,
    )


def wait_until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_process_leaves_a_reservation_that_the_next_removes(
    folder: Path, tmp_path: Path
) -> None:
    shards, cache = records(folder), Cache(tmp_path / "cache", 10 * SIZE)
    with faulty_server(folder, Faults(plan={"": ["drip..."]})) as server:
        killed = reader(server, folder, cache.folder, 10 * SIZE, 0, 1)
        wait_until(lambda: cache.folder.is_dir() and list(cache.folder.glob("*.part")))
        [part] = cache.folder.glob("*.part")
        wait_until(lambda: part.stat().st_size == SIZE)  # counts from the first moment
        cache.sweep()
        assert part.exists()  # its writer lives
        killed.kill()
        killed.communicate()
        assert part.exists()
        server.faults = Faults()
        cache.get(open_storage(server.url), shards[0]).close()
        assert not part.exists()


def test_abandoned_cache_holds_no_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMIFORMULA_RETRY_SECONDS", "0.3")
    cache = Cache(tmp_path / "cache", 10**6)
    with faulty_server(folder, Faults(plan={"": ["hang..."]}, hang_seconds=0.3)) as server:
        storage = open_storage(server.url)
        with cache.get(storage, records(folder)[1]):
            pass
        thread = threading.Thread(target=cache.get, args=(storage, records(folder)[0]))
        thread.start()
        wait_until(lambda: list(cache.folder.glob("*.part")))
        cache.abandon()
        assert list(cache.folder.glob("*.part")) == []
        with pytest.raises(TrainerError, match="abandoned"):
            cache.get(storage, records(folder)[2])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "excepthook", lambda args: None)  # it cannot be renamed
            thread.join()


def test_abandoned_parts_may_vanish_meanwhile(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10**6)

    class Vanishing:
        def unlink(self) -> None:
            cache._parts.clear()  # as the threads of a fetcher do

    cache._parts.update({Vanishing(), Vanishing(), Vanishing()})  # type: ignore[arg-type]
    cache.abandon()


def test_processes_that_want_the_same_shards_fetch_each_once(
    folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    readers = [reader(server, folder, tmp_path / "cache", 10**6, seed, 30) for seed in range(2)]
    fetched = [int(one.communicate()[0]) for one in readers]
    assert [one.returncode for one in readers] == [0, 0]
    assert sum(fetched) == 8 * SIZE == server.counts.bytes


@pytest.mark.slow
def test_limit_holds_and_no_byte_is_wrong_with_processes_killed_at_random(
    folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    limit, cache = 4 * SIZE, tmp_path / "cache"
    rng = np.random.default_rng(0)
    readers = [reader(server, folder, cache, limit, seed, 10**6) for seed in range(3)]
    wait_until(lambda: cache.is_dir())
    most, end, started = 0, time.monotonic() + 3, 3
    while time.monotonic() < end:
        most = max(most, size_of(cache))
        assert all(one.poll() is None for one in readers)
        if rng.random() < 0.02:
            number = int(rng.integers(3))
            readers[number].send_signal(signal.SIGKILL)
            readers[number].communicate()
            readers[number] = reader(server, folder, cache, limit, started, 10**6)
            started += 1
        time.sleep(0.005)
    for one in readers:
        one.kill()
        one.communicate()
    assert 2 * SIZE < most <= limit
    Cache(cache, limit).sweep()
    assert list(cache.glob("*.part")) == []
    for path in cache.glob("*.tar"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMIFORMULA_CACHE", str(tmp_path / "none/here"))
    assert default_folder() == tmp_path / "none/here"
    assert default_bytes(default_folder()) > 0
    (tmp_path / "file").write_bytes(b"")
    assert default_bytes(tmp_path / "file") > 0  # local data need no cache
    assert default_bytes(tmp_path / "file/below") > 0
    monkeypatch.delenv("SEMIFORMULA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache/semiformula"
