"""A real S3 service that tests start, break and revive.

SEMIFORMULA_LOCAL_S3 names a program whose `start` prints the shell exports of a service that keeps
its state in $S3_HOME, with run/NAME.pid for its four servers, and whose `stop` ends it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TOOL = os.environ.get("SEMIFORMULA_LOCAL_S3")
if TOOL is None:
    pytest.skip("SEMIFORMULA_LOCAL_S3 names no local S3 service", allow_module_level=True)
s3fs = pytest.importorskip("s3fs", reason="the extra [s3] is not installed")

# A home of its own: other programs of this machine may use the service's default one.
HOME = Path(os.environ.get("S3_HOME", f"{tempfile.gettempdir()}/semiformula-s3-{os.getuid()}"))


class Service:
    """The S3 service: four servers, each of which can be killed."""

    def start(self) -> dict[str, str]:
        run = subprocess.run([TOOL, "start"], check=True, stdout=subprocess.PIPE, text=True)
        words = shlex.split(run.stdout)
        return dict(word.split("=", 1) for word in words if "=" in word)

    def signal(self, server: str, number: int) -> None:
        os.kill(int((HOME / "run" / f"{server}.pid").read_text()), number)


@contextmanager
def running_service() -> Iterator[Service]:
    """Start the service, and let the environment name it and its credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_HOME", str(HOME))
        patch.setenv("S3_PORT", os.environ.get("S3_PORT", "9744"))
        found = Service()
        for name, value in found.start().items():
            patch.setenv(name, value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("SEMIFORMULA_RETRY_SECONDS", "60")
        yield found
        subprocess.run([TOOL, "stop"], check=True)


@contextmanager
def fresh_bucket() -> Iterator[str]:
    """The URL of a bucket that goes with the block."""
    name = f"test-{time.time_ns():x}"
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.mkdir(name)
    yield f"s3://{name}"
    store.rm(name, recursive=True)


def put_folder(folder: Path, url: str) -> None:
    """What a user's own client does."""
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = f"{url}/{path.relative_to(folder).as_posix()}"
            store.put_file(str(path), name.removeprefix("s3://"))
