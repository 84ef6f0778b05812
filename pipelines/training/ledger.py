"""The ledger of a run: every attempt, why it ended, and how many steps that cost.

One JSON line per event in <run>/ledger.jsonl, written only by the driver. `start` opens an attempt (a group of
workers); `failure`, `restart` or `end` closes it. An attempt whose workers never started has no `start`.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from ray.exceptions import ActorUnavailableError

from maskformer.untrusted import parse_json
from pipelines.credentials import without_secrets
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.storage import Location, patience

logger = logging.getLogger(__name__)

CauseClass = Literal[
    "worker",
    "node",
    "driver",
    "storage",
    "data",
    "non-finite",
    "hang",
    "drained",
    "resized",
    "user",
    "start",
    "unknown",
]
"""Kinds of causes for which an attempt ends."""

_PATIENCE = 60.0
"""Seconds to wait for a storage that does not answer."""

_CONSEQUENCE = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|NCCL.*(remote|abort)|Timed out waiting|Broken pipe"
    r"|process group has not been initialized",  # Ray takes it away from those that still compute
    re.I,
)
"""Errors of the surviving workers after another one was lost."""

NODE_LOST = "its node was lost."
_NODE_LOST = re.compile(r"^.*\bnode has died.*$", re.MULTILINE)
"""The line in Ray's error about a worker whose node was lost; the first line of that error does not name the cause."""


class Ledger:
    """Appends events to a run's ledger."""

    def __init__(self, run: Location, lost: threading.Event | None = None) -> None:
        """Read what is there.

        Args:
            lost: set when the run belongs to another driver; then nothing is written any more.
        """
        self._file = run / "ledger.jsonl"
        self._lost = lost or threading.Event()
        self.events: list[dict[str, Any]] = read(run)

    def add(self, event: str, **facts: Any) -> None:
        """Add an event. If the storage refuses, the run continues; the next event writes all of them.

        Only an event that ends an attempt waits a while for the storage, since workers run after a start.
        """
        self.events.append({"event": event, "time": round(time.time(), 3), **without_secrets(facts)})
        if self._lost.is_set():
            return
        # Rewritten whole: an object store cannot append, and a run has few events.
        try:
            with patience(0 if event == "start" else _PATIENCE):
                self._file.write_text("".join(json.dumps(line) + "\n" for line in self.events))
        except (UserError, StorageUnavailableError, OSError) as error:
            logger.warning("The ledger is not up to date; the run continues. %s", error)

    @property
    def attempts(self) -> int:
        """Number of the last attempt, 0 before the first."""
        starts = sum(event["event"] == "start" for event in self.events)
        return max([starts, *(event.get("attempt") or 0 for event in self.events)])

    @property
    def open(self) -> bool:
        """Whether the workers of the last attempt have started, and it is not closed."""
        return bool(self.events) and self.events[-1]["event"] == "start"

    @property
    def closed(self) -> dict[str, Any]:
        """The event that closed the last attempt whose workers had started; the first event if there was none."""
        starts = [index for index, event in enumerate(self.events) if event["event"] == "start"]
        return self.events[starts[-1] + 1 if starts else 0]

    @property
    def ended(self) -> bool:
        """Whether the last driver has ended the run, or there was none; otherwise it is running or was lost."""
        return not self.events or self.events[-1]["event"] == "end"

    @property
    def reached(self) -> int:
        """The most steps that an attempt is known to have done."""
        return max((event.get(key) or 0 for event in self.events for key in ("step", "checkpoint")), default=0)

    @property
    def checkpoint(self) -> int:
        """The newest checkpoint that is known: that from which an attempt started, or that it wrote; 0 for none."""
        written = (event.get("checkpoint") or 0 for event in self.events)
        restored = (event.get("step") or 0 for event in self.events if event["event"] == "start")
        return max([*written, *restored], default=0)

    @property
    def non_finite_steps(self) -> frozenset[int]:
        """The steps that were not finite in an earlier attempt."""
        failures = (event for event in self.events if event.get("cause_class") == "non-finite")
        return frozenset(event["failed_step"] for event in failures if "failed_step" in event)


def read(run: Location) -> list[dict[str, Any]]:
    """Return the events of a run's ledger, oldest first. Lines that are damaged are left out with a warning."""
    file = run / "ledger.jsonl"
    events: list[dict[str, Any]] = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            event = parse_json(line)
            _ = event["event"]
            events.append(event)
        except (ValueError, KeyError, TypeError):
            logger.warning("A line of %s is damaged and ignored: %r", file, line[:100])
    return events


def cause(failures: Mapping[int, BaseException]) -> str:
    """Return in one line what ended an attempt: the failure that is not a consequence of another one."""
    described = {rank: last_line(error) for rank, error in failures.items()}
    first = [rank for rank, text in described.items() if not is_consequence(text)]
    rank = (first or list(described))[0]
    return f"worker {rank}: {described[rank]}"


def is_consequence(text: str) -> bool:
    """Return whether an error is what the other workers see when one is lost."""
    return bool(_CONSEQUENCE.search(text))


def last_line(error: BaseException) -> str:
    """Return the line of an error of Ray that says most."""
    error = getattr(error, "health_check_failure", error)  # Ray Train wraps Ray's error about a worker
    if lost := _NODE_LOST.search(str(error)):
        return f"{NODE_LOST} {lost[0].strip()}"[:500]
    if isinstance(error, ActorUnavailableError):  # Ray's first error, while it knows no more
        return "its process or its node was lost; Ray cannot reach it."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A remote traceback ends with the exception; Ray's notice of a dead actor begins with it. Ray Data's own
    # UserCodeException stands after what it wraps, and says nothing.
    exceptions = [line for line in lines if re.match(r"(?!.*UserCode)[\w.]*(Error|Exception|Interrupt)\b", line)]
    text = exceptions[-1] if exceptions else ""
    return (text or f"{type(error).__name__}: {lines[0] if lines else ''}")[:500]
