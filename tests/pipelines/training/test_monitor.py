"""The monitor's decisions, without Ray: what reaches the ledger, the log and the caller, and when a run is given up."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train

from pipelines.progress import StepProgress
from pipelines.storage import locate
from pipelines.training import monitor
from pipelines.training.ledger import Ledger, read
from pipelines.training.monitor import StopSignals, TrainCallbacks, handle_event, repeated_failure


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(locate(tmp_path))


def handle(ledger: Ledger, event: str, progress: dict[str, Any] | None = None, **facts: Any) -> None:
    handle_event({"event": event, **facts}, progress or {}, ledger, TrainCallbacks())


def failures(*causes_and_steps: tuple[str, int]) -> list[dict[str, Any]]:
    """Return a ledger's events: each failure with its start before it."""
    return [
        event
        for cause, step in causes_and_steps
        for event in ({"event": "start", "step": 0}, {"event": "failure", "cause": cause, "step": step})
    ]


@pytest.mark.parametrize(
    ("events", "given_up"),
    [
        ([], False),
        (failures(("a", 5)), False),
        (failures(("a", 5), ("a", 5)), False),
        (failures(("a", 5), ("a", 5), ("a", 5)), True),
        (failures(("b", 1), ("a", 5), ("a", 5), ("a", 5)), True),  # only the last three count
        (failures(("a", 5), ("a", 5), ("a", 6)), False),  # the run came further
        (failures(("a", 5), ("b", 5), ("a", 5)), False),  # another cause
        (failures(("a", 5), ("a", 5), ("a", 5), ("b", 5)), False),
    ],
)
def test_a_run_is_given_up_after_the_same_failure_three_times(events: list[dict[str, Any]], given_up: bool) -> None:
    assert repeated_failure(events) == ("a (3 times)" if given_up else None)


def test_the_first_start_has_nothing_to_repeat(ledger: Ledger, tmp_path: Path) -> None:
    handle(ledger, "start", step=0, workers=2, pids=[1, 2])
    (event,) = read(locate(tmp_path))
    assert {key: event[key] for key in event if key != "time"} == {
        "event": "start", "attempt": 1, "step": 0, "workers": 2, "pids": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(("reached", "resumed", "lost"), [(17, 10, 7), (10, 10, 0), (3, 5, 0)])
def test_a_restart_states_the_steps_that_are_repeated(
    ledger: Ledger, reached: int, resumed: int, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    handle(ledger, "start", step=0)
    handle(ledger, "failure", {"step": reached}, cause="worker 1: gone")
    handle(ledger, "start", step=resumed)
    failure, start = ledger.events[1:]
    assert (failure["attempt"], failure["step"], failure["cause"]) == (1, reached, "worker 1: gone")
    assert (start["attempt"], start["step"], start["lost_steps"]) == (2, resumed, lost)
    assert f"An attempt ended at step {reached}: worker 1: gone" in caplog.text
    assert f"Resumed at step {resumed}; about {lost} steps are repeated." in caplog.text


def test_without_progress_a_failure_is_at_the_step_of_its_start(ledger: Ledger) -> None:
    handle(ledger, "start", step=40)
    handle(ledger, "failure", cause="a")
    assert ledger.events[-1]["step"] == 40


def test_after_a_lost_driver_nothing_is_known_of_the_steps(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    handle(ledger, "start", step=0)
    ledger.add("failure", cause="the driver was lost", step=None)
    handle(ledger, "start", step=5)
    assert ledger.events[-1]["lost_steps"] is None
    assert "Resumed at step 5; some steps are repeated." in caplog.text


def test_quality_is_called_back_and_stays_out_of_the_ledger(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    heard: list[tuple[int, float]] = []
    event = {"event": "quick PQ", "step": 20, "quick_pq/all": 0.25, "quick_pq/things": 0.125, "quick_pq/stuff": 0.5}
    handle_event(event, {}, ledger, TrainCallbacks(on_quick_pq=lambda step, pq: heard.append((step, pq))))
    assert heard == [(20, 0.25)]
    assert ledger.events == []
    assert "step 20  quick PQ 25.0  (things 12.5, stuff 50.0)" in caplog.text


def test_a_workers_warning_reaches_the_log_alone(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    handle(ledger, "warning", text="worker 0: Skipping a checkpoint.")
    assert ledger.events == []
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "worker 0: Skipping a checkpoint.")
    ]


def test_an_unknown_event_is_not_taken_for_a_start(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        handle(ledger, "pause", step=1)
    assert ledger.events == []


class Coordinator:
    """Stands in for the actor: gives its scripted events one by one, then lets the run end."""

    def __init__(self, script: list[dict[str, Any] | Callable[[], None]], future: Future[Any], outcome: Any) -> None:
        self._script, self._future, self._outcome = iter(script), future, outcome
        self.stops, self.fatal = 0, ""
        self.request_stop = SimpleNamespace(remote=self._request_stop)
        self.declare_fatal = SimpleNamespace(remote=self._declare_fatal)
        self.take_events = SimpleNamespace(remote=self._take_events)

    def _request_stop(self) -> None:
        self.stops += 1

    def _declare_fatal(self, cause: str) -> None:
        self.fatal = cause

    def _take_events(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        step = next(self._script, None)
        if step is None:
            if self._future.done():
                pass
            elif isinstance(self._outcome, Exception):
                self._future.set_exception(self._outcome)
            else:
                self._future.set_result(SimpleNamespace(return_value=self._outcome))
        elif callable(step):
            step()
        else:
            return [step], {}
        return [], {}


@pytest.fixture
def followed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str]]:
    """Return a function that follows a scripted run to its end and keeps its coordinator as `followed.last`."""
    monkeypatch.setattr(monitor, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(monitor.ray, "get", lambda answer: answer)

    def follow(
        *script: dict[str, Any] | Callable[[], None],
        outcome: Any = None,
        callbacks: TrainCallbacks | None = None,
        signaled: threading.Event | None = None,
    ) -> tuple[Any, str]:
        future: Future[Any] = Future()
        follow.last = Coordinator(list(script), future, outcome or {"status": "finished", "step": 9})  # pyright: ignore[reportFunctionMemberAccess]
        arguments = callbacks or TrainCallbacks(), signaled or threading.Event(), StepProgress()
        return monitor._follow(future, follow.last, ledger, *arguments)  # pyright: ignore[reportFunctionMemberAccess]

    return follow


START, FAILURE = {"event": "start", "step": 0}, {"event": "failure", "cause": "worker 1: gone"}


def test_a_run_is_followed_to_its_end(followed: Any, ledger: Ledger) -> None:
    assert followed(START) == ({"status": "finished", "step": 9}, "")
    assert [event["event"] for event in ledger.events] == ["start", "end"]
    assert followed.last.stops == 0


@pytest.mark.parametrize("by", ["signal", "caller"])
def test_a_stop_is_passed_on_once_and_ends_the_run(followed: Any, ledger: Ledger, by: str) -> None:
    callbacks, signaled = TrainCallbacks(), threading.Event()
    stop = (signaled if by == "signal" else callbacks.stop_requested).set
    outcome = {"status": "stopped", "step": 4}
    idle = {"event": "warning", "text": "still running"}
    assert followed(START, stop, idle, idle, outcome=outcome, callbacks=callbacks, signaled=signaled) == (outcome, "")
    assert followed.last.stops == 1
    assert ledger.events[-1]["status"] == "stopped"
    assert callbacks.stop_requested.is_set() == (by == "caller")  # the next run of the caller is not stopped


def test_before_the_first_attempt_there_is_nothing_to_save(followed: Any) -> None:
    signaled = threading.Event()
    signaled.set()
    with pytest.raises(KeyboardInterrupt):
        followed(START, signaled=signaled)
    assert followed.last.stops == 0


def test_a_stop_does_not_wait_for_another_attempt(followed: Any) -> None:
    """The attempt dies before it has saved; its successor may have to wait for nodes forever."""
    signaled = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        followed(START, signaled.set, FAILURE, START, signaled=signaled)
    assert followed.last.stops == 1


def test_three_equal_failures_are_declared_fatal(followed: Any, ledger: Ledger) -> None:
    error = ray.train.TrainingFailedError("Ray's own words")
    assert followed(START, FAILURE, START, FAILURE, outcome=error) == (None, "worker 1: gone")
    assert followed.last.fatal == ""
    assert followed(START, FAILURE, START, FAILURE, START, FAILURE, outcome=error)[1] == "worker 1: gone"
    assert followed.last.fatal == "worker 1: gone (3 times)"
    assert ledger.events[-1]["status"] == "failed"


def test_a_failure_that_the_workers_return_is_the_cause(followed: Any, ledger: Ledger) -> None:
    outcome = {"status": "failed", "cause": "step 3: not finite"}
    assert followed(START, outcome=outcome) == (None, "step 3: not finite")
    assert (ledger.events[-1]["status"], ledger.events[-1]["cause"]) == ("failed", "step 3: not finite")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(kind: signal.Signals) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    requested = threading.Event()
    with pytest.raises(KeyboardInterrupt), StopSignals(requested.set):  # noqa: PT012
        os.kill(os.getpid(), kind)
        assert requested.wait(10)
        os.kill(os.getpid(), kind)
        threading.Event().wait(10)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside: list[Any] = []

    def work() -> None:
        with StopSignals(lambda: None):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
