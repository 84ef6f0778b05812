"""The ledger of a run: every attempt, why it ended, and how many steps that cost.

One JSON line per event in <run>/ledger.jsonl, written only by the driver. `start` opens an attempt (a group of
workers), `failure` or `end` closes it.
"""

import json
import logging
import re
import time
from typing import Any

from ray.exceptions import ActorUnavailableError

from pipelines.errors import UserError
from pipelines.storage import Location

logger = logging.getLogger(__name__)

_CONSEQUENCE = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|NCCL.*(remote|abort)|Timed out waiting|Broken pipe", re.I
)
"""Errors of the surviving workers after another one was lost."""

_NODE_LOST = re.compile(r"^.*\bnode has died.*$", re.MULTILINE)
"""The line in Ray's error about a worker whose node was lost; the first line of that error does not name the cause."""


class Ledger:
    """Appends events to a run's ledger."""

    def __init__(self, run: Location) -> None:
        self._file = run / "ledger.jsonl"
        self.events: list[dict[str, Any]] = read(run)

    def add(self, event: str, **facts: Any) -> None:
        """Add an event. If the storage refuses, the run continues; the next event writes all of them."""
        self.events.append({"event": event, "time": round(time.time(), 3), **facts})
        # Rewritten whole: an object store cannot append, and a run has few events.
        try:
            self._file.write_text("".join(json.dumps(line) + "\n" for line in self.events))
        except (UserError, OSError) as error:
            logger.warning("The ledger is not up to date. %s", error)

    @property
    def attempts(self) -> int:
        return sum(event["event"] == "start" for event in self.events)

    @property
    def open(self) -> bool:
        """Whether the last attempt was never closed: its driver was lost."""
        return bool(self.events) and self.events[-1]["event"] == "start"


def read(run: Location) -> list[dict[str, Any]]:
    """Return the events of a run's ledger, oldest first."""
    file = run / "ledger.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def cause(failures: dict[int, BaseException]) -> str:
    """Return in one line what ended an attempt: the failure that is not a consequence of another one."""
    described = {rank: _last_line(error) for rank, error in failures.items()}
    first = [rank for rank, text in described.items() if not _CONSEQUENCE.search(text)]
    rank = (first or list(described))[0]
    return f"worker {rank}: {described[rank]}"


def _last_line(error: BaseException) -> str:
    error = getattr(error, "health_check_failure", error)  # Ray Train wraps Ray's error about a worker
    if lost := _NODE_LOST.search(str(error)):
        return f"its node was lost. {lost[0].strip()}"[:500]
    if isinstance(error, ActorUnavailableError):  # Ray's first error, while it knows no more
        return "its process or its node was lost; Ray cannot reach it."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A remote traceback ends with the exception; Ray's notice of a dead actor begins with it. Ray Data's own
    # UserCodeException stands after what it wraps, and says nothing.
    exceptions = [line for line in lines if re.match(r"(?!.*UserCode)[\w.]*(Error|Exception|Interrupt)\b", line)]
    text = exceptions[-1] if exceptions else ""
    return (text or f"{type(error).__name__}: {lines[0] if lines else ''}")[:500]
