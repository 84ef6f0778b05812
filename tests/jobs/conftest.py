"""Jobs that tests start as processes of their own."""

import contextlib
import subprocess
from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture
def jobs() -> "Iterator[list[subprocess.Popen[str]]]":
    """Collect the jobs that a test starts; none is left running when it fails."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for job in started:
        if job.poll() is None:
            for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            job.wait()
