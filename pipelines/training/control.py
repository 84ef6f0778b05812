"""What the driver and rank 0 tell each other while a run is on: a small actor without CPUs."""

from typing import Any

import ray


@ray.remote(num_cpus=0)
class Control:
    """Carries progress and events to the driver, and the wish to stop to the workers."""

    def __init__(self) -> None:
        self._stop = False
        self._fatal: str | None = None
        self._events: list[dict[str, Any]] = []
        self._progress: dict[str, Any] = {}

    def request_stop(self) -> None:
        """Ask the workers to save after their current step and return."""
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def declare_fatal(self, message: str) -> None:
        """Report a failure that would only come again, so that the next attempt does not try."""
        self._fatal = self._fatal or message

    def fatal(self) -> str | None:
        return self._fatal

    def add_event(self, event: str, **facts: Any) -> None:
        """Add a line for the ledger. Progress is that of the attempt that has started last."""
        if event == "start":
            self._progress = {}
        self._events.append({"event": event, **facts})

    def set_progress(self, **facts: Any) -> None:
        self._progress = facts

    def drain(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the events since the last call, and the latest progress."""
        events, self._events = self._events, []
        return events, self._progress
