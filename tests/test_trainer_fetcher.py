"""The fetcher alone: when it tells a fault, how it begins, and how far ahead it looks."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.shards_by_hand import write_dataset
from tests.test_trainer_node import after, running
from trainer.cache import Cache
from trainer.dataset import read_dataset
from trainer.errors import TrainerError
from trainer.faulty import Faults, faulty_server
from trainer.fetcher import State
from trainer.fetcher import _next_uses as next_uses_of
from trainer.order import Order
from trainer.storage import open_storage
from trainer.table import make_table

SHARDS, SAMPLES = 6, 24  # four samples a shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", samples=SAMPLES)
    return tmp_path / "set"


def test_fault_is_told_before_what_else_is_on_its_way(folder: Path, tmp_path: Path) -> None:
    (folder / "data/train-00003-of-00006.tar").unlink()
    with (
        faulty_server(folder, Faults(plan={".tar": ["drip..."]})) as server,
        running(server.url, tmp_path / "cache", window_shards=6) as (found, _, _),
        pytest.raises(TrainerError, match=r"00003-of-00006.tar: is not there"),
    ):
        found.shard(3, after(4))


def test_parent_that_ends_while_it_sends_the_plan_leaves_no_traceback() -> None:
    table = make_table(1, 1, 1, 0)
    program = f"from trainer.fetcher import main; main({table.descriptor}, 0)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps({"url": "x" * 1000})[:500],
        capture_output=True,
        pass_fds=[table.descriptor],
        cwd=Path(__file__).parent.parent,
    )
    assert (run.returncode, run.stderr) == (0, b"")


def test_next_uses_reach_as_far_as_the_cache(folder: Path, tmp_path: Path) -> None:
    dataset = read_dataset(folder)
    order = Order(dataset.order_key, 0, np.full(SHARDS, 4), 2)
    hashes = [[dataset.shards[s].sha256 for s in order.window_at(at).shards] for at in (8, 16)]
    size = max(shard.bytes for shard in dataset.shards)
    for cache_bytes, expected in ((1, hashes[0]), (3 * size, hashes[0] + hashes[1])):
        state = State(
            make_table(SHARDS, 1, 4, position=9),
            open_storage(str(folder)),
            Cache(tmp_path, cache_bytes),
            dataset,
            order,
            0.0,
            [],
        )
        assert next_uses_of(state) == expected
