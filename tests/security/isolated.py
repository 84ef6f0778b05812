"""Run a function on hostile input in a process of its own, with limits on time and memory.

Processes are forked from a server that has imported the project, see `tests/conftest.py`: one takes milliseconds.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

SECONDS = 10
MEMORY = 2**30

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    kind: Literal["result", "refused", "error", "died", "timeout"]
    """`error` is an exception that is not a refusal, `died` the end of the process by a signal."""
    text: str
    """The representation of the result, or the message."""
    seconds: float
    memory: int
    """Bytes of the largest resident set, of the process or of one that it started. 0 if it died."""

    def require_clean(self, name: str = "") -> None:
        """Fail unless the input was refused in a clear paragraph or used, within the limits.

        Args:
            name: what the message of a refusal must contain, such as the file.
        """
        assert self.kind in ("result", "refused"), self
        assert self.seconds < SECONDS, self
        assert self.memory < MEMORY, self
        if self.kind == "refused":
            assert self.text.isprintable(), self
            assert name in self.text, self
            assert 20 < len(self.text) < 2000, self


def run(
    function: Callable[..., Any],
    *arguments: Any,
    refusals: tuple[type[Exception], ...] = (ValueError,),
    seconds: int = SECONDS,
) -> Outcome:
    """Call a function of a module in a process of its own.

    Args:
        refusals: exceptions with which the function refuses its input; UserError is a ValueError.
        seconds: after which the process is ended.
    """
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_call, args=(sender, function, arguments, refusals, seconds))
    start = time.monotonic()
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds + 5):  # the process ends itself after `seconds`
            return Outcome("timeout", "", time.monotonic() - start, 0)
        return Outcome(*receiver.recv())
    except EOFError:
        process.join(5)
        ended_by = -(process.exitcode or 0)
        if ended_by == signal.SIGALRM:
            return Outcome("timeout", "", time.monotonic() - start, 0)
        return Outcome("died", f"by signal {ended_by}", time.monotonic() - start, 0)
    finally:
        receiver.close()
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        process.join()


def _call(
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    refusals: tuple[type[Exception], ...],
    limit: int,
) -> None:
    space = _address_space() + 2 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(limit)
    start = time.monotonic()
    try:
        kind, text = "result", repr(function(*arguments))[:1000]
    except refusals as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        kind, text = "error", f"{type(error).__name__}: {str(error)[:1000]!r}"
    seconds = time.monotonic() - start
    signal.alarm(0)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sender.send((kind, text.encode("utf-8", "backslashreplace").decode(), seconds, peak * 1024))
    sender.close()
    sys.stdout.flush()
    os._exit(0)  # without the clean-up of libraries, which is slow


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
