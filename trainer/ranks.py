"""The processes of a run: who this one is, and what they tell one another.

torchrun starts them and sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without it there
is one, and every function here does nothing. Gradients go through DDP; all else is a few words
over gloo, on CPU tensors, that each process says at the same places.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import TrainerError
from trainer.stops import Stop, Stopped

PEER_MINUTES = 60  # how long one process may keep the others waiting: a save to slow storage
FAREWELL_SECONDS = 5.0  # how long a process that fails tries to tell the others
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PEER_FAULTS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")


class Word(NamedTuple):
    """What a process says before each step; what counts is the largest of each."""

    leaving: int = 0  # world size - rank of one that fails: the first of them tells why
    signal: int = 0
    waiting: int = 0  # its samples are not at hand yet
    over: int = 0  # by the clock of process 0 the minutes are up
    due: int = 0  # by the clock of process 0 a checkpoint is due after this step


class Left(Exception):
    """Another process failed, and tells why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; `control` and `node` are gloo groups."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    control: Any = None
    node: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.rank == 0

    def agree(self, word: Word) -> Word:
        """The largest of what all processes say; raises Left or Stopped when one leaves.

        One that fails says so in `farewell`, in the place of its next word: whatever the others
        meet here for, they hear it. Of several that fail the first by rank is told.
        """
        if self.world == 1:
            return word
        said = torch.tensor(word, dtype=torch.int64)
        with peers():
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self.control)
        heard = Word(*said.tolist())
        if heard.leaving and not word.leaving:
            if heard.signal:
                raise Stopped(heard.signal)
            raise Left
        return heard

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; on the tensor's device."""
        if self.world > 1:
            with peers():
                dist.all_reduce(tensor, group=None if tensor.is_cuda else self.control)
        return tensor

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all processes."""
        found = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            with peers():
                dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return list(found.tolist())

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of process 0."""
        if self.world > 1:
            with peers():
                for tensor in tensors:
                    dist.broadcast(tensor, 0, group=None if tensor.is_cuda else self.control)

    def share(self, text: str | None) -> str:
        """The text of process 0; the others give None."""
        return self._share(text, 0, self.control)

    def share_on_node(self, text: str | None) -> str:
        """The text of the node's process 0; the others give None."""
        return self._share(text, self.rank - self.local_rank, self.node)

    def node_barrier(self) -> None:
        """Wait for all processes of this node, and all others."""
        self.agree(Word())

    def _share(self, text: str | None, source: int, group: Any) -> str:
        self.agree(Word())  # one that failed before it came here tells so now
        if group is not None:
            size = torch.tensor([len((text or "").encode())])
            with peers():
                dist.broadcast(size, source, group=group)
                data = torch.zeros(int(size), dtype=torch.uint8)
                if text:
                    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
                dist.broadcast(data, source, group=group)
            text = bytes(data.tolist()).decode()
        assert text is not None
        return text


@contextmanager
def joined(cuda: bool) -> Iterator[Ranks]:
    """Join the processes that torchrun started; alone, no process group is made.

    Raises TrainerError for an environment that torchrun would not set.
    """
    rank, world, local_rank, local_world = environment()
    if world == 1:
        yield Ranks()
        return
    wait = timedelta(minutes=PEER_MINUTES)
    if cuda and local_rank < torch.cuda.device_count():  # where not, `pick_device` says so
        torch.cuda.set_device(local_rank)
    with peers():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=wait)
        control = dist.new_group(backend="gloo", timeout=wait)
        nodes = [
            dist.new_group(list(range(start, start + local_world)), backend="gloo", timeout=wait)
            for start in range(0, world, local_world)
        ]
    try:
        node = nodes[rank // local_world] if local_world > 1 else None
        yield Ranks(rank, world, local_rank, local_world, control, node)
    finally:
        dist.destroy_process_group()


def environment() -> tuple[int, int, int, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; those of one process where none is set."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    except ValueError:
        rank, world, local_rank, local_world = -1, 0, 0, 1
    if not (
        0 <= rank < world
        and 0 <= local_rank < local_world <= world
        and rank % local_world == local_rank
        and world % local_world == 0
    ):
        found = ", ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES)
        raise TrainerError(
            f"{found}: expected what torchrun sets, with as many processes on each node; "
            "start with torchrun, or unset them"
        )
    return rank, world, local_rank, local_world


@contextmanager
def told(ranks: Ranks, stop: Stop) -> Iterator[None]:
    """Let the others know when this process fails, so that one line is said and none waits.

    The first of those that fail raises its error, the others end quietly with the same code.
    """
    try:
        yield
    except Left:
        raise SystemExit(1) from None
    except (Exception, Stopped) as error:
        if isinstance(error, RuntimeError) and ranks.world > 1 and of_a_peer(error):
            raise lost_peer() from None
        number = error.signal if isinstance(error, Stopped) else 0
        if not farewell(ranks, number):
            raise SystemExit(128 + number if number else 1) from None
        raise


def farewell(ranks: Ranks, number: int) -> bool:
    """Tell the others that this process leaves; False when a process before it leaves, too."""
    if ranks.world == 1:
        return True
    mine = ranks.world - ranks.rank
    said = torch.tensor(Word(leaving=mine, signal=number), dtype=torch.int64)
    try:  # in vain where the others are inside a step: they find the connection closed
        work = dist.all_reduce(said, dist.ReduceOp.MAX, group=ranks.control, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=FAREWELL_SECONDS))
    except RuntimeError:
        return True
    return int(said[0]) == mine


@contextmanager
def peers() -> Iterator[None]:
    """Turn torch's many words for a peer that is gone into a TrainerError."""
    try:
        yield
    except RuntimeError as error:
        if not of_a_peer(error):
            raise
        raise lost_peer(error) from None


def of_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed, also one inside DDP's backward."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in PEER_FAULTS)


def lost_peer(error: RuntimeError | None = None) -> TrainerError:
    """The error of a process whose peer is gone."""
    why = f" ({str(error).splitlines()[0][:120]})" if error is not None and str(error) else ""
    return TrainerError(
        f"another process of this run is gone{why}; if it left no line of its own it was killed: "
        "the same command goes on from the last checkpoint"
    )


def summed_gradients(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses ours
    """DDP's hook: gradients are summed, for the weights of the rows already make it a mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
