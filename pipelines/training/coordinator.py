"""The actor through which the driver and the workers of a run communicate.

Workers send events and, once a second, what they are doing; the answer carries the driver's requests. Ray restarts a
coordinator that is lost and repeats the calls that it did not answer. Events that it had and the driver had not are
lost; the only one that the driver must know, `start`, is also in the beats of rank 0.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

STOP, DRAIN, RESIZE = 3, 2, 1
"""Requests to the workers, by urgency: save after the current step and end the run; save after the current step, as a
node is about to leave; end the attempt at the next checkpoint, to continue with more workers. 0 is none."""

_BEAT_SECONDS = 1.0


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class RunCoordinator:
    """Carries events and activity to the driver, and its requests to the workers."""

    def __init__(self) -> None:
        self._attempt, self._request = 0, 0
        self._numbers = itertools.count(time.time_ns())  # a restarted coordinator goes on with higher ones
        self._events: list[dict[str, Any]] = []
        self._beats: dict[int, tuple[dict[str, Any], float]] = {}

    def add_event(self, attempt: int, event: str, **facts: Any) -> None:
        """Add an event for the driver."""
        self._events.append({"event": event, "attempt": attempt, "number": next(self._numbers), **facts})

    def beat(self, attempt: int, rank: int, beat: dict[str, Any]) -> int:
        """Store what a worker is doing, and return the driver's request."""
        if attempt < self._attempt:
            return 0
        if attempt > self._attempt:
            self._attempt, self._request, self._beats = attempt, 0, {}
        self._beats[rank] = (beat, time.monotonic())
        return self._request

    def exchange(
        self, attempt: int, request: int, seen: int
    ) -> tuple[list[dict[str, Any]], dict[int, tuple[dict[str, Any], float]]]:
        """Store the driver's request; return the events that it has not received, and each worker's latest beat.

        Args:
            seen: `number` of the last event that the driver has received.

        Returns:
            The events, and by rank the beat and its age in seconds. Only beats of this attempt count.
        """
        if attempt > self._attempt:
            self._attempt, self._beats = attempt, {}
        if attempt == self._attempt:
            self._request = request
        self._events = [event for event in self._events if event["number"] > seen]
        now = time.monotonic()
        return self._events, {rank: (beat, now - arrived) for rank, (beat, arrived) in self._beats.items()}


class Heartbeat:
    """Tells the coordinator once a second, beside the training, what this worker is doing."""

    def __init__(self, coordinator: Any, attempt: int, rank: int, beat: Callable[[], dict[str, Any]]) -> None:
        """Start to send what `beat` returns, until `close`."""
        self.request: int = 0
        """The latest request of the driver."""
        self._beat: Callable[[], Any] = lambda: coordinator.beat.remote(attempt, rank, beat())
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        """Send what the worker is doing at its end, without waiting for the answer, and stop.

        Otherwise a worker that others outlive would seem to hang in what it was doing up to a second before.
        """
        self._closed.set()
        with suppress(RayError):
            self._beat()

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                self.request = max(self.request, ray.get(self._beat(), timeout=60))
            except RayError:  # the coordinator is away; if the driver is gone, so is this worker soon
                logging.getLogger(__name__).debug("The coordinator does not answer.", exc_info=True)
            self._closed.wait(_BEAT_SECONDS)


class WarningForwarder(logging.Handler):
    """Sends a worker's warnings to the driver, whose user would otherwise have to look into the logs of Ray."""

    def __init__(self, coordinator: Any, attempt: int, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._coordinator, self._attempt, self._rank = coordinator, attempt, rank

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"worker {self._rank}: {record.getMessage()}"
            self._coordinator.add_event.remote(self._attempt, "warning", text=text)
        except Exception:  # the driver is gone
            self.handleError(record)
