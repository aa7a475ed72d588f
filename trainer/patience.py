"""Which faults of a remote storage are worth another try, when, and until when."""

from __future__ import annotations

import errno
import os
import random
import sys
import time

from trainer.errors import TrainerError

QUIET_SECONDS = 10.0  # a longer wait is announced
LONGEST_PAUSE_SECONDS = 20.0

# Answers of 4xx that another try may change.
_TRANSIENT = {"RequestTimeout", "SlowDown", "BadDigest", "IncompleteBody", "OperationAborted"}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Patience:
    """How long one operation has been failing.

    The clock starts at the first failure: a download of an hour may fail at its end and be tried
    again.
    """

    def __init__(self, what: str) -> None:
        self.what = what  # "s3://bucket/data.tar: could not read"
        self.attempts = 0
        self._first = 0.0
        self._told = False
        self._allowed = retry_seconds()

    def pause(self, error: BaseException, headway: bool = False) -> float | None:
        """How many seconds to wait before the next try; None when the time is over.

        Full jitter: a thousand processes must not come back at the same moment. After a try that
        made `headway` the clock starts anew. Raises TrainerError for what cannot mend itself.
        """
        line = line_of(error)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise TrainerError(f"{self.what} ({line}); free space on this machine") from None
        if is_final(error):
            raise TrainerError(f"{self.what} ({line}); check the credentials and the URL") from None
        now = time.monotonic()
        if headway:
            self.attempts, self._first = 0, 0.0
        self.attempts += 1
        self._first = self._first or now
        seconds = random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.2 * 2.0**self.attempts))
        left = self._allowed - (now - self._first)
        if seconds > left:
            return None
        if now - self._first > QUIET_SECONDS and not self._told:
            self._told = True
            print(f"{self.what} ({line}); trying for {left:.0f} s more", file=sys.stderr)
        return seconds

    def over(self, error: BaseException) -> str:
        """The line for a deadline that has passed."""
        tries = "1 try" if self.attempts == 1 else f"{self.attempts} tries"
        return (
            f"{self.what} in {tries} over {time.monotonic() - self._first:.0f} s ({line_of(error)})"
        )


def retry_seconds() -> float:
    """How long a failing remote operation is tried again, from SEMIFORMULA_RETRY_SECONDS."""
    given = os.environ.get("SEMIFORMULA_RETRY_SECONDS", "120")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1e9:
        raise TrainerError(f"SEMIFORMULA_RETRY_SECONDS={given}: expected seconds, such as 120")
    return seconds


def is_final(error: BaseException) -> bool:
    """Whether trying again is of no use: no credentials, wrong ones, not allowed, ill-formed."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}:
        return True
    status, code = answer_of(error)
    if status:
        return 400 <= status < 500 and status not in (408, 409, 429) and code not in _TRANSIENT
    return isinstance(error, PermissionError | NotImplementedError | TypeError | ValueError)


def line_of(error: BaseException) -> str:
    """What an error says, in one line of bounded length."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())[:200].rstrip(".")


def answer_of(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the code of an S3 service's answer; 0 and "" for other errors."""
    answer = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(answer, dict):
        status = getattr(error, "status", 0)  # aiohttp's
        return status if isinstance(status, int) else 0, ""
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(answer.get("Error", {}).get("Code", ""))
