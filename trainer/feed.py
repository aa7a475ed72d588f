"""The parts of the next step, as they come from the loader; they wait until all processes agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from trainer.config import Options
from trainer.decoded import decoded_cache
from trainer.loader import Stream, batches_from, next_batch
from trainer.node import DataOptions, Node, node
from trainer.progress import Progress
from trainer.samples import Batch, Samples
from trainer.setup import Setup
from trainer.step import part_indices
from trainer.stops import Stopped


@dataclass
class Feed:
    """The loader's stream, and the parts of the next step that came already."""

    node: Node
    stream: Stream
    count: int  # parts a step
    parts: list[Batch] = field(default_factory=list)

    def fill(self, seconds: float, stop: Callable[[], bool]) -> bool:
        """Wait for the parts of a step; False when they have not come in time, or `stop` says so.

        Nothing is lost by giving up: what came stays, what comes is taken at the next call.
        """
        deadline = time.monotonic() + seconds

        def give_up() -> bool:
            return stop() or time.monotonic() > deadline

        while len(self.parts) < self.count:
            try:
                self.parts.append(next_batch(self.stream, give_up))
            except Stopped:
                return False
        return True

    @property
    def seconds(self) -> torch.Tensor:
        """What the makers of the parts at hand spent: float64 [3], as in Batch.

        Where none has come, it is the shards that are waited for.
        """
        if not self.parts:
            return torch.tensor([torch.inf, 0.0, 0.0])
        return torch.stack([part.seconds for part in self.parts]).sum(dim=0)

    def take(self) -> Iterator[tuple[Batch, bool]]:
        """The parts at hand, each once, with whether more follow; none is kept."""
        parts, self.parts = self.parts, []
        parts.reverse()
        while parts:
            yield parts.pop(), len(parts) > 0


@contextmanager
def feeding(this: Setup, at: Progress, options: Options) -> Iterator[Feed]:
    """Start this node's fetcher and this process's loader where the run stands."""
    ranks = this.ranks
    data = DataOptions(
        data=options.data,
        cache=this.cache.folder,
        cache_bytes=this.cache.max_bytes,
        decoded_bytes=options.decoded_bytes,
        max_bad_ratio=options.max_bad_ratio,
        workers=options.workers,
    )
    local, barrier, share = ranks.local_rank, ranks.node_barrier, ranks.share_on_node
    with (
        decoded_cache(
            data.cache, data.decoded_bytes, this.dataset, local, barrier, share
        ) as decoded,
        node(
            data,
            this.storage,
            this.dataset,
            this.order,
            at.cursor,
            local,
            barrier,
            share,
            ahead=2 * this.run.config.batch_size,
            end=min(this.end.sample, this.end.step * this.run.config.batch_size),
            decoded=decoded,
        ) as shards,
        batches_from(
            Samples(this.dataset, shards, decoded),
            part_indices(this.order, this.cut, this.end, at.step, at.cursor),
            options.workers,
            this.task.device.type == "cuda",
            held=len(this.cut.own) + 1,
        ) as stream,
    ):
        yield Feed(shards, stream, len(this.cut.own))
