"""The actor through which the driver and the workers of a run communicate."""

import logging
from typing import Any

import ray


@ray.remote(num_cpus=0)
class RunCoordinator:
    """Carries progress and events to the driver, and a requested stop to the workers."""

    def __init__(self) -> None:
        self._stop_requested = False
        self._fatal: str | None = None
        self._events: list[dict[str, Any]] = []
        self._progress: dict[str, Any] = {}

    def request_stop(self) -> None:
        """Ask the workers to save after their current step and return."""
        self._stop_requested = True

    def stop_requested(self) -> bool:
        return self._stop_requested

    def declare_fatal(self, message: str) -> None:
        """Record a failure that would recur, so that the next attempt ends at once."""
        self._fatal = self._fatal or message

    def fatal(self) -> str | None:
        return self._fatal

    def add_event(self, event: str, **facts: Any) -> None:
        """Add an event for the driver. Progress is that of the attempt that started last."""
        if event == "start":
            self._progress = {}
        self._events.append({"event": event, **facts})

    def set_progress(self, **facts: Any) -> None:
        self._progress = facts

    def take_events(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the events since the last call, and the latest progress."""
        events, self._events = self._events, []
        return events, self._progress


class WarningForwarder(logging.Handler):
    """Sends a worker's warnings to the driver, whose user would otherwise have to look into the logs of Ray."""

    def __init__(self, coordinator: Any, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._coordinator, self._rank = coordinator, rank

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._coordinator.add_event.remote("warning", text=f"worker {self._rank}: {record.getMessage()}")
        except Exception:  # the driver is gone
            self.handleError(record)
