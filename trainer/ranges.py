"""Fetches one remote file by ranges, several parts at a time, into an open local file.

What came of a part is kept: after a fault only the rest of that part is asked for again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from trainer.patience import Patience
from trainer.storage import Unfetched

PART_BYTES = 8 * 2**20
PARTS_AT_ONCE = 8
PIECE_BYTES = 2**18  # what is written at once
ANSWER_SECONDS = 20.0  # a server that says nothing for longer is asked again
# Within any so many seconds a connection brings as many bytes, or is given up for a new one.
DRIP_SECONDS, DRIP_BYTES = 10.0, 2**19
HEADWAY_BYTES, HEADWAY_SHARE = 2**16, 0.25  # one of both, and a try was not in vain


class Answer(NamedTuple):
    """A body on its way: the position of its first byte in the file, the file's size if known."""

    start: int
    total: int | None
    read: Callable[[int], Awaitable[bytes]]  # at most so many bytes, b"" at the end


Ask = Callable[[int, int], AbstractAsyncContextManager[Answer]]  # the bytes [start, stop)


class NoRanges(Exception):
    """The server sent the whole file where a part was asked for."""


class Piecewise(NamedTuple):
    """One file to fetch: how to ask for a range, where to write, whom to tell."""

    what: str  # "http://host/data.tar: could not read"
    ask: Ask
    descriptor: int
    size: int
    progress: Callable[[int], None]


async def fetch_parts(file: Piecewise) -> None:
    """Fetch all parts; raises Unfetched after the deadline, NoRanges, or TrainerError."""
    gate = asyncio.Semaphore(PARTS_AT_ONCE)

    async def part(start: int) -> None:
        async with gate:
            await _fetch_part(file, start, min(start + PART_BYTES, file.size))

    tasks = [asyncio.ensure_future(part(at)) for at in range(0, file.size, PART_BYTES)]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def fetch_whole(file: Piecewise) -> None:
    """Fetch from the first byte to the last in one request, from the start after a fault."""
    patience = Patience(file.what)
    while True:
        try:
            at = await _receive(file, 0, file.size, whole=True, came=[0])
            if at == file.size:
                return
            raise ConnectionError(f"{at} of {file.size} bytes came")
        except Exception as error:
            await _wait(patience, error, False)  # nothing of it is kept


async def _fetch_part(file: Piecewise, start: int, stop: int) -> None:
    patience, at = Patience(file.what), start
    while at < stop:
        came = [at]
        try:
            await _receive(file, at, stop, whole=False, came=came)
            if came[0] < stop:
                raise ConnectionError(f"{came[0] - start} of {stop - start} bytes of a part came")
        except NoRanges:
            raise
        except Exception as error:
            much = min(HEADWAY_BYTES, HEADWAY_SHARE * (stop - at))
            await _wait(patience, error, came[0] - at >= much)
        at = came[0]


async def _wait(patience: Patience, error: Exception, headway: bool) -> None:
    if isinstance(error, FileNotFoundError):
        raise error
    seconds = patience.pause(error, headway)
    if seconds is None:
        raise Unfetched(patience.over(error)) from None
    await asyncio.sleep(seconds)


async def _receive(file: Piecewise, start: int, stop: int, whole: bool, came: list[int]) -> int:
    """Write what one request brings; `came` holds how far, also when it fails."""
    at = start
    async with asyncio.timeout(ANSWER_SECONDS) as patience:
        async with file.ask(start, stop) as answer:
            if answer.start != start:
                if answer.start == 0 and not whole:
                    raise NoRanges
                raise ConnectionError(f"bytes from {answer.start} came, not from {start}")
            if answer.total is not None and answer.total != file.size:
                raise ConnectionError(f"it has {answer.total} bytes, expected {file.size}")
            clock = asyncio.get_running_loop().time
            patience.reschedule(clock() + DRIP_SECONDS)
            marked = at
            while at < stop and (piece := await answer.read(min(PIECE_BYTES, stop - at))):
                piece = piece[: stop - at]
                os.pwrite(file.descriptor, piece, at)
                at += len(piece)
                came[0] = at
                file.progress(len(piece))
                if at - marked >= DRIP_BYTES:
                    marked = at
                    patience.reschedule(clock() + DRIP_SECONDS)
    return at
