"""What the driver does during an attempt: events to the ledger, progress to the log, requests to the workers.

It also ends an attempt that hangs, and says why an attempt ended.
"""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, cast

import ray
import ray.train
from ray.exceptions import GetTimeoutError, RayError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pipelines.cluster.checks import draining_nodes, resources
from pipelines.config.train import TrainConfig
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.progress import StepProgress
from pipelines.storage import Location, patience
from pipelines.training import ledger, watchdog
from pipelines.training.coordinator import DRAIN, RESIZE, STOP
from pipelines.training.elastic import WorkerCount
from pipelines.training.gauges import RunGauges
from pipelines.training.ledger import CauseClass, Ledger

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_STATUS_SECONDS = 10.0
_CLUSTER_SECONDS = 2.0
_ANSWER_SECONDS = 30.0
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Variable with the seconds after which Ray no longer waits for the resources of the workers."""

_LONG_WAIT = 60.0

_SAME_FAILURES = 3
"""A failure repeated this often at the same step is treated as permanent."""

Beats = Mapping[int, tuple[dict[str, Any], float]]
"""By rank, what a worker was doing, and the seconds since it said so."""


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


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended."""

    status: str
    """`finished`, `stopped`, `drained`, `resized` or `failed`."""
    step: int | None = None
    """Steps done, as far as known."""
    cause: str = ""
    kind: CauseClass = "unknown"
    """Kind of the cause."""
    final: bool = False
    """Whether another attempt would fail in the same way."""
    early: bool = False
    """Whether the run finished early, since the quick PQ no longer rose."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More for the ledger: `until`, `split`, `checkpoint` and `failed_step`."""


class Monitor:
    """Follows the attempts of a run, one after another."""

    def __init__(
        self,
        run: Location,
        config: TrainConfig,
        coordinator: Any,
        run_ledger: Ledger,
        callbacks: TrainCallbacks,
        worker_count: WorkerCount,
        lost: threading.Event,
    ) -> None:
        """Follow a run.

        Args:
            lost: set when another driver has taken the run over, so that this one has to stop.
        """
        self.signaled = threading.Event()
        """Set by Ctrl-C or SIGTERM."""
        self._run, self._config, self._coordinator, self._ledger = run, config, coordinator, run_ledger
        self._callbacks, self._worker_count, self._lost = callbacks, worker_count, lost
        self._progress, self._gauges = StepProgress(), RunGauges(config.run.name)
        self._status = _StatusFile(run)
        self._stopping = self._waits = False
        self._seen = 0
        """Number of the last event that was received."""

    @property
    def stop_requested(self) -> bool:
        """Whether the run is to stop."""
        return any(event.is_set() for event in (self.signaled, self._callbacks.stop_requested, self._lost))

    def wait(self) -> None:
        """Report that the run waits for resources.

        Raises:
            KeyboardInterrupt: the run is to stop, and there is nothing to save.
        """
        if self.stop_requested:
            raise KeyboardInterrupt
        now = round(time.time(), 3)
        self._write_status({"phase": "waiting for resources", "attempt": self._ledger.attempts, "began": now})

    def follow(self, attempt: int, began: float, fit: Callable[[], ray.train.Result]) -> Ended:
        """Run `fit`, an attempt, to its end.

        Args:
            attempt: its number, from 1.
            began: when it began, in seconds since the epoch.

        Raises:
            KeyboardInterrupt: a second Ctrl-C, or a first one before there was anything to save.
        """
        return self._follow(_in_thread(fit), attempt, began)

    def close(self) -> None:
        """Remove the progress bar, and write the last status unless the run belongs to another driver."""
        self._progress.close()
        self._write_status({"phase": "ended"}, now=True)

    def _write_status(self, status: dict[str, Any], now: bool = False) -> None:
        if not self._lost.is_set():  # then it is another driver's
            self._status.write(status, now)

    def _follow(self, future: "Future[ray.train.Result]", attempt: int, began: float) -> Ended:
        config = self._config.scaling
        hangs = watchdog.Watchdog(config.hang_timeout, config.storage_patience)
        errors: list[dict[str, Any]] = []
        beats: Beats = {}
        finished, request, hang, looked = False, 0, "", 0.0
        begun, start_limit = time.monotonic(), float(os.environ.get(START_TIMEOUT, 0)) + config.hang_timeout
        self._status.clear()
        self._write_status({"attempt": attempt, "began": began, "phase": "starting"})
        while not finished:
            # Checked before the events are taken, so that none is left behind.
            finished = bool(wait([future], timeout=_POLL_SECONDS).done)
            if self.stop_requested and not finished:
                if not self._ledger.open:  # the workers have not started: there is nothing to save
                    raise KeyboardInterrupt
                request = self._stop()
            if not finished and request < DRAIN and time.monotonic() - looked > _CLUSTER_SECONDS:
                looked = time.monotonic()
                request = max(request, self._requested_by_cluster(beats))
            events, answered = self._exchange(attempt, request)
            beats = answered or beats
            if not self._ledger.open and 0 in beats and "start" in beats[0][0]:
                # Also there, since an event may be lost with the coordinator.
                events.append({"event": "start", "attempt": attempt, **beats[0][0]["start"]})
            for event in events:
                if event["attempt"] != attempt:
                    continue
                if event["event"] == "error":
                    errors.append(event)
                else:
                    handle_event({**event, "began": began}, self._ledger, self._callbacks)
            self._show(attempt, began, beats)
            if not finished and (found := hangs.observe(dict(beats), time.monotonic())):
                cause = self._end_hang(attempt, found, beats)
                hang = hang or cause
            if not finished and not beats and time.monotonic() - begun > start_limit:
                waited = time.monotonic() - begun
                hang = f"The workers gave no sign of life for {waited:.0f} s (limit {start_limit:g} s)."
                logger.warning("%s", hang)
                watchdog.kill_starting(self._coordinator)
                begun = time.monotonic()
        return self._ended(future, attempt, errors, hang, beats)

    def _stop(self) -> int:
        if not self._stopping:
            self._stopping = True
            logger.info("Stopping: the state is saved after the current step. Ctrl-C again stops at once.")
        return STOP

    def _requested_by_cluster(self, beats: Beats) -> int:
        """Return what changes of the cluster ask of the workers."""
        nodes = [beat["node_id"] for beat, _ in beats.values() if "node_id" in beat]
        try:
            if leaving := draining_nodes() & set(nodes):
                logger.warning("%d node(s) will leave the cluster; the state is saved now.", len(leaving))
                return DRAIN
            return RESIZE if nodes and self._worker_count.can_grow(nodes) else 0
        except RayError as error:
            logger.warning("The state of the cluster is not known now. %s", error)
            return 0

    def _exchange(self, attempt: int, request: int) -> tuple[list[dict[str, Any]], Beats]:
        try:
            answer = self._coordinator.exchange.remote(attempt, request, self._seen)
            events, beats = ray.get(answer, timeout=_ANSWER_SECONDS)
            self._seen = max([self._seen, *(event.pop("number") for event in events)])
            return events, beats
        except (RayError, GetTimeoutError) as error:  # Ray restarts it
            logger.warning("The run's coordinator does not answer. %s", str(error).splitlines()[0])
            return [], {}

    def _show(self, attempt: int, began: float, beats: Beats) -> None:
        beat = beats[0][0] if 0 in beats else {}
        progress = beat.get("progress", {})
        if progress:
            self._progress.show(progress)
            self._gauges.set({**beat, **progress, "step": beat["done"]})
        started = self._ledger.events[-1] if self._ledger.open else {}
        waits = bool(started) and beat.get("phase") == "data" and beat["seconds"] > _LONG_WAIT
        if waits and not self._waits:
            logger.warning(
                "Worker 0 has waited %.0f s for data. While the storage does not answer, reads are repeated for up to "
                "%.0f minutes (--scaling.storage-patience); --verbose shows what the data tasks say.",
                beat["seconds"], self._config.scaling.storage_patience / 60,
            )  # fmt: skip
        self._waits = waits
        self._write_status(
            {
                "attempt": attempt,
                "began": began,
                "phase": "waiting for data" if waits else "training" if started else "starting",
                **{key: started[key] for key in ("entered", "restored") if key in started},
                **({"step": beat["done"]} if beat.get("done") is not None else {}),
                **{key: progress[key] for key in ("total", "loss", "images_per_second", "eta_seconds") if progress},
                **{key: beat[key] for key in ("checkpoint", "until", "split") if key in beat},
            }
        )

    def _end_hang(self, attempt: int, hang: str, beats: Beats) -> str:
        """Find out which worker hangs, and kill the workers so that Ray ends the attempt; return the cause."""
        logger.warning("%s", hang)
        reports = watchdog.collect(beats)
        cause = watchdog.describe_hang(hang, reports, self._run / f"hang_{attempt}.txt")
        watchdog.kill(reports)
        return cause

    def _ended(
        self, future: "Future[ray.train.Result]", attempt: int, errors: list[dict[str, Any]], hang: str, beats: Beats
    ) -> Ended:
        started = self._ledger.events[-1] if self._ledger.open else {}
        done = [beat["done"] for beat, _ in beats.values() if beat.get("done") is not None]
        step = max([*done, started.get("step", 0)]) if started else None
        first = beats[0][0] if 0 in beats else {}
        facts = {key: first[key] for key in ("until", "split") if key in first and started}
        facts["checkpoint"] = max(first.get("checkpoint") or 0, started.get("step", 0), self._ledger.checkpoint)
        error = future.exception()
        if error is None:
            outcome: dict[str, Any] = future.result().return_value or {}
            facts |= {key: outcome[key] for key in ("until", "split") if key in outcome}
            if outcome:
                return Ended(
                    status=outcome["status"],
                    step=outcome["step"],
                    kind={"drained": "drained", "resized": "resized"}.get(outcome["status"], "user"),  # pyright: ignore[reportArgumentType]
                    early=outcome.get("early", False),
                    facts=facts,
                )
            return Ended(status="failed", step=step, cause="the workers returned nothing", facts=facts)
        if hang:
            return Ended(status="failed", step=step, cause=hang, kind="hang", facts=facts)
        cause, kind, told = explain(error, errors)
        if told is not None:
            facts["failed_step"] = told["failed_step"]
        if kind == "worker" and ledger.is_consequence(cause):  # others failed before Ray noticed the loss
            if lost := self._workers_without_node(beats):
                cause, kind = f"worker {lost[0]}: {ledger.NODE_LOST}", "node"
            else:
                cause = f"a worker or its node was lost. {cause}"
        again = kind == "non-finite" and facts.get("failed_step") in self._ledger.non_finite_steps
        return Ended(
            status="failed", step=step, cause=cause, kind=kind, final=again or kind in ("data", "storage"), facts=facts
        )

    def _workers_without_node(self, beats: Beats) -> list[int]:
        """Return the ranks of the workers whose node has left the cluster."""
        try:
            nodes = resources()
        except RayError as error:
            logger.warning("The state of the cluster is not known now. %s", error)
            return []
        return sorted(rank for rank, (beat, _) in beats.items() if "node_id" in beat and beat["node_id"] not in nodes)


def explain(
    error: BaseException, errors: Sequence[Mapping[str, Any]]
) -> tuple[str, CauseClass, Mapping[str, Any] | None]:
    """Return why an attempt failed, in one line, its kind, and the worker's own error if that is the cause.

    Args:
        error: what Ray Train raised.
        errors: the errors that workers reported themselves, the first first: `rank`, `kind`, `cause`, `failed_step`.
    """
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    cause = ledger.cause(failures) if failures else ""
    if ledger.NODE_LOST in cause:
        return cause, "node", None
    # What a worker could not explain itself is a consequence of what another one said, or of a loss.
    for told in errors:
        if told["kind"] != "worker" or not ledger.is_consequence(told["cause"]):
            return told["cause"], cast(CauseClass, told["kind"]), told
    if cause:
        return cause, "worker", None
    failure = getattr(error, "controller_failure", error)
    text = ledger.last_line(failure)
    if ledger.NODE_LOST in text:
        return f"Ray Train: {text}", "node", None
    # Only a time-out may mean that the cluster has no room yet.
    kind: CauseClass = "start" if isinstance(failure, WorkerGroupStartupTimeoutError) else "unknown"
    return f"Ray Train: {text}", kind, None


def handle_event(event: dict[str, Any], run_ledger: Ledger, callbacks: TrainCallbacks) -> None:
    """Log an event of the coordinator, call back, and write starts to the ledger."""
    facts = {key: value for key, value in event.items() if key not in ("event", "began")}
    kind = event["event"]
    if kind == "quick PQ":
        parts = (100 * facts[f"quick_pq/{part}"] for part in ("all", "things", "stuff"))
        logger.info("step %d  quick PQ %.1f  (things %.1f, stuff %.1f)", facts["step"], *parts)
        callbacks.on_quick_pq(facts["step"], facts["quick_pq/all"])
    elif kind == "warning":
        logger.warning("%s", facts["text"])
    elif kind != "start":
        raise ValueError(f"The coordinator has an event of an unknown kind: {event}.")
    elif run_ledger.open:  # a start that is in the ledger already
        return
    elif not run_ledger.events:  # the first
        run_ledger.add("start", **facts, began=event["began"])
    else:
        ended = run_ledger.closed  # what came after it are attempts that did not start
        reached = ended.get("step")
        lost = None if reached is None else max(0, reached - facts["step"])
        repeated = "some" if lost is None else f"about {lost}"
        away = time.time() - ended["time"]
        logger.info(
            "Resumed at step %d with %d worker(s), %.0f s later; %s steps are repeated.",
            facts["step"], facts["workers"], away, repeated,
        )  # fmt: skip
        run_ledger.add("start", lost_steps=lost, **facts, began=event["began"])


def given_up(events: Sequence[Mapping[str, Any]], max_failures: int) -> str | None:
    """Return why the run is given up after these events of the ledger, None if another attempt is to be made.

    Args:
        max_failures: failures in a row without a new checkpoint that are allowed.
    """
    # A step that is not finite is repeated once, and then ends the run or is skipped: workers count those.
    failures = [e for e in events if e["event"] == "failure" and e.get("cause_class") != "non-finite"]
    if not failures:
        return None
    last = failures[-1]
    stuck = [event for event in failures if event.get("checkpoint") == last.get("checkpoint")]
    same = [e for e in stuck[-_SAME_FAILURES:] if (e["cause"], e["step"]) == (last["cause"], last["step"])]
    # Nodes may be lost at any time, also several while workers start; then Ray may not know the cause.
    if len(same) == _SAME_FAILURES and last.get("cause_class") not in ("node", "unknown"):
        return f"{last['cause']} ({_SAME_FAILURES} times)"
    if len(stuck) > max_failures:
        allowed = f"--scaling.max-failures allows {max_failures}"
        return f"{last['cause']} (failure {len(stuck)} in a row without a new checkpoint; {allowed})"
    return None


class _StatusFile:
    """Writes <run>/status.json, for programs that look at the run from outside, without delaying the driver."""

    def __init__(self, run: Location) -> None:
        self._file = run / "status.json"
        self._pool = ThreadPoolExecutor(1, "status")
        self._writing: Future[None] | None = None
        self._written = 0.0
        self._status: dict[str, Any] = {}

    def clear(self) -> None:
        """Forget what was written before, since another attempt begins."""
        self._status = {}

    def write(self, status: dict[str, Any], now: bool = False) -> None:
        """Update the status, and write it if the last time was long ago or the phase has changed.

        Args:
            now: wait until it is written.
        """
        changed = status.get("phase") != self._status.get("phase")
        self._status = {**self._status, **status, "time": round(time.time(), 3)}
        busy = self._writing is not None and not self._writing.done()
        if now or (not busy and (changed or time.monotonic() - self._written > _STATUS_SECONDS)):
            self._written = time.monotonic()
            self._writing = self._pool.submit(self._write, json.dumps(self._status))
            if now:
                self._writing.result()

    def _write(self, text: str) -> None:
        try:
            with patience(0):
                self._file.write_text(text)
        except (UserError, StorageUnavailableError, OSError) as error:
            logger.debug("The status is not up to date. %s", error)


def _in_thread(function: Callable[[], ray.train.Result]) -> "Future[ray.train.Result]":
    """Run `function` in a thread that does not outlive an interrupted driver."""
    future: Future[ray.train.Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name="trainer", daemon=True).start()
    return future
