"""Following a run from the driver: its events into the ledger, its progress into the log, Ctrl-C to the workers."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train

from pipelines.training import ledger

logger = logging.getLogger(__name__)

_SAME_FAILURES = 3
"""A failure that repeats itself this often at one step is taken for one that will not go away."""


@dataclass(frozen=True)
class Listener:
    """Whoever started a run from a program: hears of its quality, and may end it as Ctrl-C would."""

    on_quick_pq: Callable[[int, float], None] = lambda step, pq: None
    """Called with the steps done and the quick PQ, a fraction."""
    stop: threading.Event = field(default_factory=threading.Event)


def follow(
    fit: Callable[[], ray.train.Result], control: Any, book: ledger.Ledger, listener: Listener
) -> tuple[dict[str, Any] | None, str]:
    """Run `fit` to its end; return the workers' outcome, or None and the cause of the failure.

    Raises:
        KeyboardInterrupt: a second Ctrl-C, or a first one before there was anything to save.
    """
    with _Interrupts() as interrupts:
        return _watch(_in_thread(fit), interrupts, control, book, listener)


def _watch(
    future: Future[ray.train.Result], interrupts: "_Interrupts", control: Any, book: ledger.Ledger, listener: Listener
) -> tuple[dict[str, Any] | None, str]:
    """Follow the run until it ends; return the workers' outcome, or None and the cause of the failure."""
    stopping, last_step, finished, begun = False, 0, False, len(book.events)
    while not finished:
        # Looked at before the events are fetched, so that none is left behind.
        finished = bool(wait([future], timeout=1).done)
        asked = interrupts.count > 0 or listener.stop.is_set()
        if interrupts.count > 1 or (asked and not book.open and not finished):  # impatient, or nothing to save yet
            raise KeyboardInterrupt
        if asked and not stopping:
            stopping = True
            ray.get(control.request_stop.remote())
            logger.info("Stopping: the state is saved after the current step. Ctrl-C again stops at once.")
        events, progress = ray.get(control.drain.remote())
        for event in events:
            if event["event"] == "quick PQ":
                listener.on_quick_pq(event["step"], event["quick_pq/all"])
            _account(event, progress, book)
            if hopeless := _hopeless(book.events[begun:]):
                ray.get(control.declare_fatal.remote(hopeless))
        if progress and progress["step"] != last_step:
            last_step = progress["step"]
            logger.info(
                "step %d/%d  loss %.4f  %.3g images/s  waiting for data %.0f %%  %s to go",
                last_step, progress["total"], progress["loss"], progress["images_per_second"],
                100 * progress["data_wait_share"], _duration(progress["eta_seconds"]),
            )  # fmt: skip
    try:
        result = future.result()
    except ray.train.TrainingFailedError as error:
        failures = [event["cause"] for event in book.events if event["event"] == "failure"]
        cause = failures[-1] if failures else str(error)
        book.add("end", status="failed", cause=cause, step=last_step)
        return None, cause
    outcome: dict[str, Any] = result.return_value or {"status": "failed", "cause": "the workers returned nothing"}
    if outcome["status"] == "failed":
        book.add("end", status="failed", cause=outcome["cause"], step=last_step)
        return None, outcome["cause"]
    book.add("end", status=outcome["status"], step=outcome["step"])
    return outcome, ""


def _account(event: dict[str, Any], progress: dict[str, Any], book: ledger.Ledger) -> None:
    kind = event.pop("event")
    if kind == "quick PQ":
        logger.info("step %d  quick PQ %.1f  (things %.1f, stuff %.1f)", event["step"], *(
            100 * event[f"quick_pq/{part}"] for part in ("all", "things", "stuff")
        ))  # fmt: skip
        return
    if kind == "failure":
        event["step"] = progress.get("step", book.events[-1].get("step"))
        logger.warning("An attempt ended at step %s: %s", event["step"], event["cause"])
    elif kind == "start" and book.attempts:
        reached = book.events[-1].get("step")
        lost = None if reached is None else max(0, reached - event["step"])
        logger.info(
            "Resumed at step %d; %s steps are done again.", event["step"], "some" if lost is None else f"about {lost}"
        )
        event["lost_steps"] = lost
    book.add(kind, attempt=book.attempts + (kind == "start"), **event)


def _hopeless(events: list[dict[str, Any]]) -> str | None:
    """Return the cause if the last attempts all ended by it at the same step: another one would only cost time."""
    failures = [event for event in events if event["event"] == "failure"][-_SAME_FAILURES:]
    same = len({(event["cause"], event["step"]) for event in failures}) == 1
    return f"{failures[0]['cause']} ({_SAME_FAILURES} times)" if same and len(failures) == _SAME_FAILURES else None


class FailureReporter(ray.train.UserCallback):
    """Runs in Ray's controller and tells the driver why an attempt ended."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ray.get(self._control.add_event.remote("failure", cause=ledger.cause(dict(worker_exceptions))))


class _Interrupts:
    """Counts Ctrl-C and SIGTERM, which `ray job stop` and schedulers send, so that neither cuts a run off half-way.

    Outside the main thread, where Python allows no handlers, it counts nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Interrupts":
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._before[kind] = signal.signal(kind, self._add)
        return self

    def __exit__(self, *exception: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _add(self, signum: int, frame: Any) -> None:
        self.count += 1


def _in_thread(function: Callable[[], ray.train.Result]) -> Future[ray.train.Result]:
    """Run `function` in a thread that does not outlive an interrupted driver."""
    future: Future[ray.train.Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            future.set_exception(error)

    threading.Thread(target=work, name="trainer", daemon=True).start()
    return future


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
