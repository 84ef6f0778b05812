"""The ledger of a run: every attempt with its cause of death, and what it cost.

One JSON line per event in <run>/ledger.jsonl, written by the driver alone. `start` opens an attempt (a group of
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
"""What the surviving workers say when another one is gone."""

_NODE_LOST = re.compile(r"^.*\bnode has died.*$", re.MULTILINE)
"""What Ray says of a worker whose node is gone, below a headline that does not."""


class Ledger:
    """Appends events to a run's ledger."""

    def __init__(self, run: Location) -> None:
        self._place = run / "ledger.jsonl"
        self.events: list[dict[str, Any]] = read(run)

    def add(self, event: str, **facts: Any) -> None:
        """Write one event down. If the storage refuses, a run goes on without; the next event writes all of them."""
        self.events.append({"event": event, "time": round(time.time(), 3), **facts})
        # Rewritten whole: an object store cannot append, and a run has few events.
        try:
            self._place.write_text("".join(json.dumps(line) + "\n" for line in self.events))
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
    place = run / "ledger.jsonl"
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def cause(failures: dict[int, BaseException]) -> str:
    """Say in one line what ended an attempt: the failure that is not merely the consequence of another."""
    described = {rank: _last_line(error) for rank, error in failures.items()}
    first = [rank for rank, text in described.items() if not _CONSEQUENCE.search(text)]
    rank = (first or list(described))[0]
    return f"worker {rank}: {described[rank]}"


def _last_line(error: BaseException) -> str:
    error = getattr(error, "health_check_failure", error)  # Ray Train wraps what Ray says of a worker
    if lost := _NODE_LOST.search(str(error)):
        return f"its node was lost. {lost[0].strip()}"[:500]
    if isinstance(error, ActorUnavailableError):  # what Ray says first, as long as it knows no more
        return "its process or its node was lost; Ray cannot reach it."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A remote traceback ends with the exception; Ray's notice of a dead actor begins with it. Ray Data's own
    # UserCodeException stands after what it wraps, and says nothing.
    exceptions = [line for line in lines if re.match(r"(?!.*UserCode)[\w.]*(Error|Exception|Interrupt)\b", line)]
    text = exceptions[-1] if exceptions else ""
    return (text or f"{type(error).__name__}: {lines[0] if lines else ''}")[:500]
