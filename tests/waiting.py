"""Waiting for what other processes do, with a deadline, as the tests that start processes need it."""

import subprocess
import time
from collections.abc import Callable
from typing import Any


def wait_for(
    condition: Callable[[], Any],
    what: str,
    job: "subprocess.Popen[str] | None" = None,
    seconds: float = 400,
    poll: float = 0.05,
) -> Any:
    """Return what `condition` returns once that is true.

    Args:
        what: what is waited for, for the message.
        job: a process that must not end before.
        seconds: after which the test fails.
        poll: seconds between two looks.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert job is None or job.poll() is None, f"the job ended without {what}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(poll)
    return found
