"""The monitor's decisions, without Ray: what reaches the ledger, the log and the caller, and when a run is given up."""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from pipelines.config.recipes import DEMO
from pipelines.config.train import TrainConfig
from pipelines.storage import locate
from pipelines.training import monitor
from pipelines.training.coordinator import DRAIN, STOP
from pipelines.training.elastic import WorkerCount
from pipelines.training.ledger import Ledger, read
from pipelines.training.monitor import Ended, Monitor, StopSignals, TrainCallbacks, given_up, handle_event
from pipelines.training.watchdog import Activity


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(locate(tmp_path))


def handle(ledger: Ledger, event: str, attempt: int = 1, **facts: Any) -> None:
    handle_event({"event": event, "attempt": attempt, "began": 1.0, **facts}, ledger, TrainCallbacks())


def failures(*causes_steps_and_checkpoints: tuple[str, int | None, int], kind: str = "worker") -> list[dict[str, Any]]:
    """Return a ledger's events: each failure with its start before it, if its workers had started."""
    return [
        event
        for cause, step, checkpoint in causes_steps_and_checkpoints
        for event in (
            *([{"event": "start", "step": 0}] if step is not None else []),
            {"event": "failure", "cause": cause, "cause_class": kind, "step": step, "checkpoint": checkpoint},
        )
    ]


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], None),
        (failures(("a", 5, 0)), None),
        (failures(("a", 5, 0), ("a", 5, 0)), None),
        (failures(("a", 5, 0), ("a", 5, 0), ("a", 5, 0)), "a (3 times)"),
        (failures(("b", 1, 0), ("a", 5, 0), ("a", 5, 0), ("a", 5, 0)), "a (3 times)"),  # only the last three count
        (failures(("a", 5, 0), ("a", 5, 0), ("a", 6, 0)), None),  # the run came further
        (failures(("a", 5, 0), ("b", 5, 0), ("a", 5, 0)), None),  # another cause
        (failures(("a", 1, 0), ("b", 2, 0), ("c", 3, 0), ("d", 4, 0)), None),  # as many as are allowed
        (failures(("a", 1, 0), ("b", 2, 0), ("c", 3, 0), ("d", 4, 0), ("e", 5, 0)), "e (failure 5 in a row without"),
        # Workers that cannot start.
        (failures(("a", None, 7), ("a", None, 7), ("a", None, 7)), "a (3 times)"),
        # With checkpoints between them.
        (failures(("a", None, 1), ("b", 5, 2), ("a", None, 3), ("a", None, 4), ("a", None, 5)), None),
        (failures(("a", 5, 500), ("a", None, 500), ("b", 5, 500), ("c", 6, 500), ("d", 7, 500)), "d (failure 5"),
        # Nodes may be lost at any time, and several of them while workers start.
        (failures(*3 * [("a", None, 7)], kind="node"), None),
        (failures(*5 * [("a", None, 7)], kind="node"), "a (failure 5"),
        # The workers count the steps that are not finite.
        (failures(*((f"step {n}", n, 0) for n in range(9)), kind="non-finite"), None),
        # Each failure after a new checkpoint starts a new count.
        (failures(*((str(n), n, n // 4) for n in range(40))), None),
    ],
)
def test_a_run_is_given_up_when_it_makes_no_progress(events: list[dict[str, Any]], reason: str | None) -> None:
    found = given_up(events, max_failures=4)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_other_events_are_no_failures() -> None:
    """Nodes that leave and return, any number of times, do not end a run."""
    events = [event for _ in range(20) for event in ({"event": "start", "step": 4}, {"event": "restart", "step": 4})]
    assert given_up(events, max_failures=0) is None


def test_the_first_start_has_nothing_to_repeat(ledger: Ledger, tmp_path: Path) -> None:
    handle(ledger, "start", step=0, workers=2, pids=[1, 2], entered=2.0, restored=3.0)
    (event,) = read(locate(tmp_path))
    assert {key: event[key] for key in event if key != "time"} == {
        "event": "start", "attempt": 1, "step": 0, "workers": 2, "pids": [1, 2],
        "began": 1.0, "entered": 2.0, "restored": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize(("reached", "resumed", "lost"), [(17, 10, 7), (10, 10, 0), (3, 5, 0)])
def test_a_restart_states_the_steps_that_are_repeated(
    ledger: Ledger, reached: int, resumed: int, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    handle(ledger, "start", step=0, workers=2)
    ledger.add("failure", attempt=1, step=reached, cause="worker 1: gone")
    handle(ledger, "start", attempt=2, step=resumed, workers=2)
    start = ledger.events[-1]
    assert (start["attempt"], start["step"], start["lost_steps"]) == (2, resumed, lost)
    assert f"Resumed at step {resumed} with 2 worker(s), 0 s later; about {lost} steps are repeated." in caplog.text


def test_attempts_that_did_not_start_hide_neither_the_steps_nor_the_time(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    handle(ledger, "start", step=0, workers=2)
    ledger.add("failure", attempt=1, step=45, cause="worker 1: gone")
    ledger.events[-1]["time"] -= 100
    ledger.add("failure", attempt=2, step=None, cause="Ray Train: no answer")
    handle(ledger, "start", attempt=3, step=40, workers=2)
    assert ledger.events[-1]["lost_steps"] == 5
    assert "Resumed at step 40 with 2 worker(s), 100 s later; about 5 steps are repeated." in caplog.text


def test_after_a_lost_driver_nothing_is_known_of_the_steps(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    handle(ledger, "start", step=0, workers=2)
    ledger.add("failure", cause="the driver was lost", step=None)
    handle(ledger, "start", attempt=2, step=5, workers=2)
    assert ledger.events[-1]["lost_steps"] is None
    assert "some steps are repeated." in caplog.text


def test_quality_is_called_back_and_stays_out_of_the_ledger(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    heard: list[tuple[int, float]] = []
    event = {"event": "quick PQ", "step": 20, "quick_pq/all": 0.25, "quick_pq/things": 0.125, "quick_pq/stuff": 0.5}
    handle_event(event, ledger, TrainCallbacks(on_quick_pq=lambda step, pq: heard.append((step, pq))))
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
    """Stands in for the actor: gives its scripted events one by one, then lets the attempt end."""

    def __init__(self, script: list[dict[str, Any] | Callable[[], None]], future: Future[Any], outcome: Any) -> None:
        self._script, self._future, self._outcome = iter(script), future, outcome
        self.requests: list[int] = []
        self._sent = 0
        self.exchange = SimpleNamespace(remote=self._exchange)

    def _exchange(self, attempt: int, request: int, seen: int) -> tuple[list[dict[str, Any]], dict[int, Any]]:
        assert seen == self._sent
        self.requests.append(request)
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
        elif "beats" in step:
            return [], step["beats"]
        else:
            self._sent += 7
            return [{"attempt": 1, "number": self._sent, **step}], {}
        return [], {}


@pytest.fixture
def followed(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Return a function that follows a scripted attempt to its end and keeps its coordinator as `followed.last`."""
    monkeypatch.setattr(monitor, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(monitor.ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(monitor, "draining_nodes", set)
    taken_over = threading.Event()

    def follow(
        *script: dict[str, Any] | Callable[[], None],
        outcome: Any = None,
        callbacks: TrainCallbacks | None = None,
        config: TrainConfig = DEMO,
    ) -> Ended:
        future: Future[Any] = Future()
        follow.last = Coordinator(list(script), future, outcome or {"status": "finished", "step": 9})  # pyright: ignore[reportFunctionMemberAccess]
        watcher = Monitor(
            locate(tmp_path),
            config,
            follow.last,  # pyright: ignore[reportFunctionMemberAccess]
            ledger,
            callbacks or TrainCallbacks(),
            WorkerCount(config),
            taken_over,
        )
        try:
            return watcher._follow(future, 1, 1.0)
        finally:
            watcher.close()

    follow.taken_over = taken_over  # pyright: ignore[reportFunctionMemberAccess]
    return follow


START: dict[str, Any] = {"event": "start", "step": 0, "workers": 2}


def error(rank: int, kind: str, cause: str, step: int | None = 3) -> dict[str, Any]:
    return {"event": "error", "rank": rank, "kind": kind, "cause": cause, "failed_step": step}


def lost(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("", {int(rank.removeprefix("rank")): error for rank, error in failures.items()})


ECHO = RuntimeError("Connection closed by peer [127.0.0.1]:46021")


def test_an_attempt_is_followed_to_its_end(followed: Any, ledger: Ledger) -> None:
    ended = followed(START)
    assert (ended.status, ended.step, ended.final) == ("finished", 9, False)
    assert [event["event"] for event in ledger.events] == ["start"]
    assert set(followed.last.requests) == {0}


def test_a_stop_is_passed_on(followed: Any) -> None:
    callbacks = TrainCallbacks()
    idle = {"event": "warning", "text": "still running"}
    ended = followed(
        START, callbacks.stop_requested.set, idle, idle, outcome={"status": "stopped", "step": 4}, callbacks=callbacks
    )
    assert (ended.status, ended.step) == ("stopped", 4)
    assert STOP in followed.last.requests


def test_a_run_that_another_driver_has_taken_over_stops(followed: Any) -> None:
    idle = {"event": "warning", "text": "still running"}
    followed(START, followed.taken_over.set, idle, idle, outcome={"status": "stopped", "step": 4})
    assert STOP in followed.last.requests


def test_a_long_wait_for_data_is_told_once(followed: Any, caplog: pytest.LogCaptureFixture) -> None:
    waiting = {"beats": {0: ({**Activity().beat(), "phase": "data", "seconds": 61.0, "done": 3}, 0.0)}}
    short = {"beats": {0: ({**Activity().beat(), "phase": "data", "seconds": 2.0, "done": 3}, 0.0)}}
    followed(START, short, waiting, waiting, short)
    told = [message for message in caplog.messages if "for data" in message]
    assert len(told) == 1
    assert told[0].startswith("Worker 0 has waited 61 s for data. ")


def test_a_start_that_was_lost_with_the_coordinator_is_in_the_beats(followed: Any, ledger: Ledger) -> None:
    facts = {"step": 6, "workers": 2, "pids": [1, 2]}
    beats = {0: ({**Activity().beat(), "done": 7, "start": facts}, 0.0)}
    ended = followed({"beats": beats}, {"beats": beats}, {**START, "step": 6}, outcome=lost(rank1=ActorDiedError()))
    assert [(event["event"], event["step"]) for event in ledger.events] == [("start", 6)]
    assert (ended.step, ended.facts["checkpoint"]) == (7, 6)


def test_an_attempt_that_does_not_start_does_not_forget_the_checkpoint(followed: Any, ledger: Ledger) -> None:
    ledger.add("start", step=0, attempt=1)
    ledger.add("failure", cause="lost", step=55, checkpoint=50, attempt=1)
    assert followed(outcome=lost(rank1=ActorDiedError())).facts["checkpoint"] == 50


def test_workers_that_go_on_hanging_are_killed_again(followed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []

    class Hangs:
        def __init__(self, *limits: float) -> None:
            pass

        def observe(self, beats: Any, now: float) -> str | None:
            return f"hang {len(killed)}" if beats else None

    def end(self: Monitor, attempt: int, hang: str, beats: Any) -> str:
        killed.append(hang)
        return hang

    monkeypatch.setattr(monitor.watchdog, "Watchdog", Hangs)
    monkeypatch.setattr(Monitor, "_end_hang", end)
    beats = {0: ({**Activity().beat(), "done": 1}, 0.0)}
    ended = followed(START, {"beats": beats}, {"beats": beats}, outcome=lost(rank1=ActorDiedError()))
    assert killed[:2] == ["hang 0", "hang 1"]
    assert (ended.kind, ended.cause) == ("hang", "hang 0")


def test_workers_that_never_give_a_sign_of_life_are_killed(followed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0.5")
    monkeypatch.setattr(
        monitor.watchdog, "kill_starting", lambda coordinator: coordinator._future.set_exception(ActorDiedError())
    )
    config = replace(DEMO, scaling=replace(DEMO.scaling, hang_timeout=1))
    polls: list[Any] = [lambda: None] * 100_000
    ended = followed(*polls, config=config)
    assert (ended.kind, ended.step, ended.final) == ("hang", None, False)
    assert "The workers gave no sign of life for 2 s (limit 1.5 s)" in ended.cause


def test_before_the_workers_start_there_is_nothing_to_save(followed: Any) -> None:
    callbacks = TrainCallbacks()
    callbacks.stop_requested.set()
    with pytest.raises(KeyboardInterrupt):
        followed(START, callbacks=callbacks)


def test_a_failure_before_the_first_start_tells_its_cause(followed: Any, ledger: Ledger) -> None:
    ended = followed(outcome=ray.train.ControllerError(ValueError("no room")))
    assert (ended.status, ended.step, ended.kind) == ("failed", None, "unknown")
    assert "ValueError: no room" in ended.cause
    assert ledger.events == []


@pytest.mark.parametrize(
    ("failure", "errors", "cause", "kind", "final"),
    [
        (
            lost(rank0=ECHO, rank1=ActorDiedError()),
            [error(0, "worker", str(ECHO))],
            "worker 1: ActorDied",
            "worker",
            False,
        ),
        (
            lost(rank0=ECHO),
            [error(0, "worker", "worker 0: RuntimeError: CUDA out of memory")],
            "worker 0: Runt",
            "worker",
            False,
        ),
        (
            lost(rank0=ECHO, rank1=ValueError()),
            [error(0, "worker", str(ECHO)), error(1, "data", "row 7")],
            "row 7",
            "data",
            True,
        ),
        (lost(rank0=ValueError()), [error(0, "storage", "s3 does not answer")], "s3 does", "storage", True),
        (lost(rank0=ValueError()), [error(0, "non-finite", "step 3, worker 0")], "step 3", "non-finite", False),
        (
            lost(rank0=RuntimeError("The actor died because its node has died.")),
            [],
            "worker 0: its node",
            "node",
            False,
        ),
        (
            ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)),
            [],
            "Ray Train: WorkerGroupStartup",
            "start",
            False,
        ),
        (
            ray.train.ControllerError(WorkerGroupStartupFailedError("no torch")),
            [],
            "Ray Train: WorkerGroupStartupFailedError: no torch",
            "unknown",
            False,
        ),
        (
            ray.train.ControllerError(
                WorkerGroupStartupFailedError("Traceback ...\nThe actor died: its node has died.")
            ),
            [],
            "Ray Train: its node was lost. The actor died",
            "node",
            False,
        ),
        (ActorDiedError(), [], "Ray Train: ActorDiedError", "unknown", False),  # Ray's controller was lost
    ],
)
def test_the_cause_of_a_failure(
    followed: Any, failure: Exception, errors: list[dict[str, Any]], cause: str, kind: str, final: bool
) -> None:
    ended = followed(START, *errors, outcome=failure)
    assert ended.status == "failed"
    assert ended.cause.startswith(cause)
    assert (ended.kind, ended.final) == (kind, final)


def test_a_lost_node_is_the_cause_even_if_others_fail_first(followed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = {rank: ({**Activity().beat(), "node_id": f"node {rank}", "done": 3}, 0.0) for rank in range(2)}
    monkeypatch.setattr(monitor, "resources", lambda: {"node 0": {}})
    failure = lost(rank0=ECHO)
    ended = followed(START, {"beats": beats}, outcome=failure)
    assert (ended.cause, ended.kind, ended.step) == ("worker 1: its node was lost.", "node", 3)
    monkeypatch.setattr(monitor, "resources", lambda: {"node 0": {}, "node 1": {}})
    ended = followed(START, {"beats": beats}, outcome=failure)
    echo = f"worker 0: {type(ECHO).__name__}: {ECHO}"
    assert (ended.cause, ended.kind) == (f"a worker or its node was lost. {echo}", "worker")


def test_a_step_that_is_not_finite_twice_is_final(followed: Any, ledger: Ledger) -> None:
    ledger.add("start", step=0, attempt=1)
    ledger.add("failure", cause="nan", cause_class="non-finite", failed_step=3, step=3, attempt=1)
    failure, told = lost(rank0=ValueError()), error(0, "non-finite", "step 3, worker 0")
    assert followed(START, told, outcome=failure).final
    assert not followed(START, {**told, "failed_step": 4}, outcome=failure).final


def test_events_of_an_attempt_before_do_not_count(followed: Any, ledger: Ledger) -> None:
    late = {**error(0, "data", "row 7"), "attempt": 0}
    assert followed(START, late, outcome=lost(rank1=ActorDiedError())).cause.startswith("worker 1: ActorDied")


def test_the_step_reached_is_that_of_the_last_beat(followed: Any) -> None:
    beats = {0: ({**Activity().beat(), "done": 12, "until": 5.0, "split": {"steps": 2.0}}, 0.0)}
    ended = followed(START, {"beats": beats}, outcome=lost(rank1=ActorDiedError()))
    assert ended.step == 12
    assert (ended.facts["until"], ended.facts["split"]) == (5.0, {"steps": 2.0})


def test_a_node_that_leaves_makes_the_workers_save(followed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "draining_nodes", lambda: {"b"})
    monkeypatch.setattr(monitor, "_CLUSTER_SECONDS", 0.0)
    beat = {**Activity().beat(), "done": 1}
    beats = {0: ({**beat, "node_id": "a"}, 0.0), 1: ({**beat, "node_id": "b"}, 0.0)}
    ended = followed(START, {"beats": beats}, {"beats": beats}, outcome={"status": "drained", "step": 2})
    assert (ended.status, ended.kind) == ("drained", "drained")
    assert DRAIN in followed.last.requests


def test_the_status_is_written_for_others(followed: Any, tmp_path: Path) -> None:
    followed(START)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["phase"], status["attempt"], status["began"]) == ("ended", 1, 1.0)


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
