"""Monitoring a run from the driver: its events go to the ledger, its progress to the log, a stop to the workers."""

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train

from pipelines.progress import StepProgress
from pipelines.training import ledger
from pipelines.training.ledger import Ledger

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0

_SAME_FAILURES = 3
"""A failure repeated this often at the same step is treated as permanent."""


@dataclass(frozen=True)
class TrainCallbacks:
    """Callbacks and stop request of the program that calls `fit`."""

    on_quick_pq: Callable[[int, float], None] = lambda step, pq: None
    """Called with the steps done and the quick PQ, a fraction."""
    stop_requested: threading.Event = field(default_factory=threading.Event)
    """Set it to stop the run after its current step, with its state saved, as Ctrl-C and SIGTERM do."""


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM, which `ray job stop` and schedulers send, into a request to stop.

    The second one raises KeyboardInterrupt. Outside the main thread, where Python allows no handlers, nothing changes.
    """

    def __init__(self, request_stop: Callable[[], None]) -> None:
        self._request_stop = request_stop
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._before[kind] = signal.signal(kind, self._first)
        return self

    def __exit__(self, *exception: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _first(self, signum: int, frame: Any) -> None:
        for kind in self._before:
            signal.signal(kind, signal.default_int_handler)
        self._request_stop()


def follow(
    fit: Callable[[], ray.train.Result], coordinator: Any, run_ledger: Ledger, callbacks: TrainCallbacks
) -> tuple[dict[str, Any] | None, str]:
    """Run `fit` to its end; return the workers' outcome, or None and the cause of the failure.

    Raises:
        KeyboardInterrupt: a second Ctrl-C, or a first one before there was anything to save.
    """
    progress, signaled = StepProgress(), threading.Event()
    try:
        with StopSignals(signaled.set):
            return _follow(_in_thread(fit), coordinator, run_ledger, callbacks, signaled, progress)
    finally:
        progress.close()


def _follow(
    future: Future[ray.train.Result],
    coordinator: Any,
    run_ledger: Ledger,
    callbacks: TrainCallbacks,
    signaled: threading.Event,
    step_progress: StepProgress,
) -> tuple[dict[str, Any] | None, str]:
    stopping, finished, first_event, last_step = False, False, len(run_ledger.events), 0
    while not finished:
        # Checked before the events are taken, so that none is left behind.
        finished = bool(wait([future], timeout=_POLL_SECONDS).done)
        stop_requested = signaled.is_set() or callbacks.stop_requested.is_set()
        if stop_requested and not run_ledger.open and not finished:  # no attempt is running: nothing to save
            raise KeyboardInterrupt
        if stop_requested and not stopping:
            stopping = True
            ray.get(coordinator.request_stop.remote())
            logger.info("Stopping: the state is saved after the current step. Ctrl-C again stops at once.")
        events, progress = ray.get(coordinator.take_events.remote())
        for event in events:
            handle_event(event, progress, run_ledger, callbacks)
            if fatal := repeated_failure(run_ledger.events[first_event:]):
                ray.get(coordinator.declare_fatal.remote(fatal))
        if progress:
            last_step = progress["step"]
            step_progress.show(progress)
    try:
        result = future.result()
    except ray.train.TrainingFailedError as error:
        failures = [event["cause"] for event in run_ledger.events if event["event"] == "failure"]
        cause = failures[-1] if failures else str(error)
        run_ledger.add("end", status="failed", cause=cause, step=last_step)
        return None, cause
    outcome: dict[str, Any] = result.return_value or {"status": "failed", "cause": "the workers returned nothing"}
    if outcome["status"] == "failed":
        run_ledger.add("end", status="failed", cause=outcome["cause"], step=last_step)
        return None, outcome["cause"]
    run_ledger.add("end", status=outcome["status"], step=outcome["step"])
    return outcome, ""


def handle_event(
    event: dict[str, Any], progress: dict[str, Any], run_ledger: Ledger, callbacks: TrainCallbacks
) -> None:
    """Log an event of the coordinator, call back, and write starts and failures to the ledger.

    Args:
        progress: the latest of the attempt; empty if it has not logged any.
    """
    facts = {key: value for key, value in event.items() if key != "event"}
    kind, attempt = event["event"], run_ledger.attempts
    if kind == "quick PQ":
        parts = (100 * facts[f"quick_pq/{part}"] for part in ("all", "things", "stuff"))
        logger.info("step %d  quick PQ %.1f  (things %.1f, stuff %.1f)", facts["step"], *parts)
        callbacks.on_quick_pq(facts["step"], facts["quick_pq/all"])
    elif kind == "warning":
        logger.warning("%s", facts["text"])
    elif kind == "failure":
        step = progress.get("step", run_ledger.events[-1].get("step"))
        logger.warning("An attempt ended at step %s: %s", step, facts["cause"])
        run_ledger.add("failure", attempt=attempt, step=step, **facts)
    elif kind != "start":
        raise ValueError(f"The coordinator has an event of an unknown kind: {event}.")
    elif attempt:  # not the first
        reached = run_ledger.events[-1].get("step")
        lost = None if reached is None else max(0, reached - facts["step"])
        repeated = "some" if lost is None else f"about {lost}"
        logger.info("Resumed at step %d; %s steps are repeated.", facts["step"], repeated)
        run_ledger.add("start", attempt=attempt + 1, lost_steps=lost, **facts)
    else:
        run_ledger.add("start", attempt=1, **facts)


def repeated_failure(events: list[dict[str, Any]]) -> str | None:
    """Return the cause if the last attempts all ended by it at the same step: another one would only cost time."""
    failures = [event for event in events if event["event"] == "failure"][-_SAME_FAILURES:]
    same = len({(event["cause"], event["step"]) for event in failures}) == 1
    return f"{failures[0]['cause']} ({_SAME_FAILURES} times)" if same and len(failures) == _SAME_FAILURES else None


class FailureReporter(ray.train.UserCallback):
    """Runs in Ray's controller and tells the driver why an attempt ended."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ray.get(self._coordinator.add_event.remote("failure", cause=ledger.cause(dict(worker_exceptions))))


def _in_thread(function: Callable[[], ray.train.Result]) -> Future[ray.train.Result]:
    """Run `function` in a thread that does not outlive an interrupted driver."""
    future: Future[ray.train.Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name="trainer", daemon=True).start()
    return future
