"""Ray as an engine: one task a shard on the cores of a cluster, some of whose nodes may die."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from builder.errors import BuilderError

if TYPE_CHECKING:  # imported on the cluster's nodes: without numpy and pydantic until a task runs
    from builder.work import Done, Engine

RETRIES = 3  # how often a shard's task may lose its worker process or node
AHEAD = 2  # tasks a core that are handed out: the next is there before the last is done
QUIET_SECONDS = 120.0  # a longer wait for a node with a core is announced
_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes: only small records pass
_ANSWER_SECONDS = 5.0


def ray_engine(address: str | None, jobs: int | None) -> Engine:
    """Tasks of a Ray cluster: that at `address` or $RAY_ADDRESS, else one started here.

    `jobs` bounds how many shards are built at once; None takes all cores. The dataset's URL must
    be one that every node reaches. Raises BuilderError when Ray is missing or does not answer, for
    a node that does not see the plan, and for a shard whose worker died `RETRIES` times more.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_COLOR_PREFIX="0")
    if address is None:
        # The only way to bind all of a local cluster to 127.0.0.1; read when ray is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError:
        raise BuilderError(
            "ray is not installed; pip install 'semiformula[ray]' brings all it needs"
        ) from None

    def run(
        url: str, indices: Sequence[int], deep: bool, say: Callable[[str], None]
    ) -> Generator[Done, None, None]:
        if "://" not in url:
            url = str(Path(url).absolute())
        # Ray states dead workers and nodes on stdout, which is for our summary alone.
        with (
            redirect_stdout(sys.stderr),
            # Ray leaves its logs behind otherwise.
            TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
            _cluster(ray, address, jobs, folder),
        ):
            yield from _results(ray, url, indices, deep, jobs, say)

    return run


@contextmanager
def _cluster(ray: Any, address: str | None, jobs: int | None, folder: str) -> Iterator[None]:
    """Join a cluster, or start one on 127.0.0.1 that ends with the block."""
    heeded = signal.getsignal(signal.SIGTERM)
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "namespace": "semiformula",
    }
    where = f"--address {address}: no Ray cluster joined"
    if address is None:
        from builder.workers import usable_cores

        where = "no Ray cluster started here"
        common |= {
            "num_cpus": jobs or usable_cores(),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_temp_dir": folder,
        }
    else:
        _refuse_silent(address)
    try:
        ray.init(address=address or "local", **common)
    except (OSError, RuntimeError, ValueError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise BuilderError(f"{where} ({line})") from None
    try:
        signal.signal(signal.SIGTERM, heeded)  # Ray puts its own in place
        yield
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Ray itself tries a closed port for a minute and ends with a page."""
    match = re.fullmatch(r"(?:ray://)?(?P<host>[^/\s]+):(?P<port>\d{1,5})", address)
    if match is None:
        return
    try:
        with socket.create_connection((match["host"], int(match["port"])), _ANSWER_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise BuilderError(
            f"--address {address}: no answer ({error}); `ray status` on the head node states it"
        ) from None


def _results(
    ray: Any,
    url: str,
    indices: Sequence[int],
    deep: bool,
    jobs: int | None,
    say: Callable[[str], None],
) -> Generator[Done, None, None]:
    # The name alone travels: every node imports its own builder.
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_build)
    left = iter(indices)
    waiting: dict[Any, int] = {}
    alive, told = time.monotonic(), False
    try:
        while True:
            # Asked each time: the cluster may grow, or lose a node.
            cores = int(ray.cluster_resources().get("CPU", 0))
            if cores:
                alive, told = time.monotonic(), False
            elif time.monotonic() - alive >= QUIET_SECONDS and not told:
                told = True
                say(
                    f"no node of the Ray cluster has had a core for {QUIET_SECONDS:.0f} s; "
                    "`ray status` on its head node lists them; waiting on"
                )
            wanted = jobs or AHEAD * max(cores, 1)
            for index in islice(left, max(0, wanted - len(waiting))):
                waiting[task.remote(url, index, deep)] = index
            if not waiting:
                return
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=min(10.0, QUIET_SECONDS))
            for reference in done:
                yield _result(ray, reference, waiting.pop(reference), url)
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _result(ray: Any, reference: Any, index: int, url: str) -> Done:
    try:
        found = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        line = str(error).strip().splitlines()[-1]
        raise BuilderError(f"shard {index} of {url}: a Ray task failed ({line})") from None
    except ray.exceptions.RayError as error:
        raise BuilderError(
            f"shard {index} of {url}: its Ray worker died {RETRIES + 1} times "
            f"({type(error).__name__}; out of memory?); what is finished is kept: run the same "
            "command again"
        ) from None
    if isinstance(found, str):
        raise BuilderError(found)
    done: Done = found
    return done


def _build(url: str, index: int, deep: bool) -> Done | str:
    """In a worker of the cluster: the shard, or why not."""
    os.environ["NUMBA_NUM_THREADS"] = "1"  # one core a task; before numba is imported
    from builder.place import PLAN
    from builder.storage import open_storage
    from builder.work import build_shard

    try:
        return build_shard(url, index, deep)
    except BuilderError as error:
        import ray

        node = ray.util.get_node_ip_address()
        if "://" not in url and not open_storage(url).exists(PLAN):
            return (
                f"Ray node {node} does not see {url}; give a URL that every node reaches: a folder "
                "of a shared file system, s3:// or gs://"
            )
        return f"Ray node {node}: {error.message}"
