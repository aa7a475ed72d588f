"""Files that are altered while they are verified, and names that are no files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.shards_by_hand import flip_byte, write_dataset
from trainer.cache import Cache
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.index import BadShard
from trainer.shards import open_shard, read_normals
from trainer.storage import Folder
from trainer.verified import Counters, stamp_of

SHARD = "data/train-00001-of-00003.tar"
NORMALS = "normals/normals-00000-of-00001.tar"


class Meddler(Counters):
    """Alters a file's last byte, which no reader looks at, once its hash was taken."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def add(self, **more: float) -> None:
        super().add(**more)
        if "verified_bytes" in more:
            time.sleep(0.02)  # the clock of a file system is coarse
            flip_byte(self.path, -1)


def test_shard_altered_behind_the_hash_does_not_look_as_it_was_verified(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    cache = Cache(tmp_path / "cache", 0)
    cache.counters = Meddler(tmp_path / SHARD)
    with open_shard(Folder(tmp_path), cache, read_dataset(tmp_path).shards[1]) as opened:
        assert opened.stamp != stamp_of((tmp_path / SHARD).stat())


def test_normals_altered_behind_the_hash_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    cache = Cache(tmp_path / "cache", 0)
    cache.counters = Meddler(tmp_path / NORMALS)
    with pytest.raises(BadShard, match=rf"{NORMALS}: was changed while it was read"):
        read_normals(Folder(tmp_path), cache, read_dataset(tmp_path))


def test_cache_file_altered_behind_the_hash_does_not_look_as_it_was_verified(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path)
    cache, shard = Cache(tmp_path / "cache", 10**6), read_dataset(tmp_path).shards[1]
    cache.get(Folder(tmp_path), shard).close()
    cache.counters = Meddler(cache.path(shard))  # of one that is here
    with cache.get(Folder(tmp_path), shard) as opened:
        assert opened.stamp != stamp_of(cache.path(shard).stat())
    cache.path(shard).unlink()
    cache.counters = Meddler(cache.path(shard).with_suffix(".part"))  # of one that comes
    with cache.get(Folder(tmp_path), shard) as opened:
        assert opened.stamp != stamp_of(cache.path(shard).stat())


@pytest.mark.parametrize("name", [SHARD, NORMALS, "dataset.json"])
def test_pipe_in_a_dataset_is_one_line(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path)
    dataset, storage, cache = read_dataset(tmp_path), Folder(tmp_path), Cache(tmp_path / "c", 0)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    readers = {
        SHARD: lambda: open_shard(storage, cache, dataset.shards[1]),
        NORMALS: lambda: read_normals(storage, cache, dataset),
        "dataset.json": lambda: read_dataset(storage),
    }
    with pytest.raises(TrainerError, match=rf"{name}: cannot be read \(Not a plain file\)"):
        readers[name]()


def test_pipe_in_the_cache_is_one_line(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    cache, shard = Cache(tmp_path / "cache", 10**6), read_dataset(tmp_path).shards[0]
    cache.folder.mkdir()
    os.mkfifo(cache.path(shard))
    with pytest.raises(TrainerError, match=r"cannot be used \(Not a plain file\); mend it or give"):
        cache.get(Folder(tmp_path), shard)
