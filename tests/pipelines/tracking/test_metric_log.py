"""The metric log: each point is logged once, and an absent server delays neither training nor loses a point."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from jobs.bench.shared.faulty_server import FaultyServer, Mode
from pipelines.storage import locate
from pipelines.tracking import metric_log
from pipelines.tracking.metric_log import MetricLog
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.unsent import RunStatus, Unsent, read_points
from tests.pipelines.tracking.mlflow_server import mlflow_server
from tests.waiting import wait_for

REQUEST_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again and write files within a fraction of a second; forget what MetricLog sets in the environment."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv(REQUEST_TIMEOUT, "60")
    monkeypatch.setattr(metric_log, "_FIRST_WAIT", 0.05)
    monkeypatch.setattr(metric_log, "_LONGEST_WAIT", 0.2)
    monkeypatch.setattr(metric_log, "_WRITE_EVERY", 0.1)


@pytest.fixture
def proxy(server: tuple[str, psutil.Process]) -> Iterator[FaultyServer]:
    with FaultyServer(server[0]) as running:
        yield running


def history(run: TrackedRun, metric: str) -> list[tuple[int, float]]:
    points = MlflowClient(run.uri).get_metric_history(run.run_id, metric)
    return [(point.step, point.value) for point in points]


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, step / 2) for step in steps]


def log_steps(log: MetricLog, steps: range) -> None:
    for step in steps:
        log.log(step, {"loss": step / 2, "rate": float(step)})


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [
        record.message
        for record in caplog.records
        if record.levelno == level and record.name.startswith("pipelines.tracking")
    ]


def test_repeated_steps_are_logged_once(uri: str, tmp_path: Path) -> None:
    run = TrackedRun.open(uri, "restarts", "run", "/runs/restarted", {})
    for steps in (range(7), range(5, 10), range(5, 12)):
        log = MetricLog(run, locate(tmp_path))
        log_steps(log, steps)
        log.close()
    assert history(run, "loss") == expected(range(12))
    assert history(run, "rate") == [(step, float(step)) for step in range(12)]
    assert list(tmp_path.iterdir()) == []


def test_each_metric_has_its_own_steps(uri: str, tmp_path: Path) -> None:
    run = TrackedRun.open(uri, "restarts", "run", "/runs/later", {})
    log = MetricLog(run, locate(tmp_path))
    log.log(10, {"loss": 1.0})
    log.log(10, {"pq": 0.5})
    log.log(5, {"other": 0.5})
    log.close()
    assert [history(run, metric) for metric in ("loss", "pq", "other")] == [[(10, 1.0)], [(10, 0.5)], [(5, 0.5)]]


def test_points_in_memory_can_be_handed_to_another_log(proxy: FaultyServer, tmp_path: Path) -> None:
    """As by a checkpoint: the first log may have been killed, or may have sent some of them."""
    run = TrackedRun.open(proxy.url, "handed", "over", "/runs/handed", {})
    log = MetricLog(run, locate(tmp_path / "first"))
    log_steps(log, range(5))
    wait_for(lambda: not log._points, "five steps")
    proxy.mode = "refuse"
    log_steps(log, range(5, 30))
    left = json.loads(json.dumps(log.in_memory()))
    proxy.mode = "ok"
    other = MetricLog(run, locate(tmp_path / "second"), left)
    log_steps(other, range(30, 40))
    other.close()
    assert history(run, "loss") == expected(range(40))
    log.close()
    assert history(run, "loss") == expected(range(40))


@pytest.mark.parametrize("mode", ["refuse", "503", "silent", "cut"])
def test_points_of_an_outage_arrive_once(
    proxy: FaultyServer,
    server: tuple[str, psutil.Process],
    tmp_path: Path,
    mode: Mode,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    run = TrackedRun.open(proxy.url, "outages", mode, f"/runs/{mode}", {})
    direct = TrackedRun(server[0], run.run_id)
    log = MetricLog(run, locate(tmp_path))
    log_steps(log, range(5))
    wait_for(lambda: not log._points, "five steps")
    if mode == "silent":
        monkeypatch.setenv(REQUEST_TIMEOUT, "1")
    proxy.mode = mode
    steps = range(5, 600 if mode == "refuse" else 50)  # more than one request holds, or few
    log_steps(log, steps)
    assert proxy.wait_for(mode, 3)
    monkeypatch.setenv(REQUEST_TIMEOUT, "60")
    if mode == "cut":  # the server has accepted what the client must not send again
        assert history(direct, "loss")[5:]
    proxy.mode = "ok"
    log_steps(log, range(steps.stop, steps.stop + 10))
    log.close()
    assert history(direct, "loss") == expected(range(steps.stop + 10))
    assert history(direct, "rate") == [(step, float(step)) for step in range(steps.stop + 10)]
    (warning,) = messages(caplog, logging.WARNING)
    assert f"does not accept metrics of run {run.run_id} now" in warning
    (info,) = messages(caplog, logging.INFO)
    assert "MLflow accepts metrics again" in info
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_that_is_stopped_and_started_again_has_every_point(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as (uri, _):
        run = TrackedRun.open(uri, "outages", "run", "/runs/restart", {})
        log = MetricLog(run, locate(tmp_path / "run"))
        log_steps(log, range(100))
        wait_for(lambda: not log._points, "end of the request")
    log_steps(log, range(100, 200))
    wait_for(lambda: Unsent(locate(tmp_path / "run")).pieces(), "unsent metrics")
    log_steps(log, range(200, 300))
    with mlflow_server(tmp_path, port=int(uri.rpartition(":")[2])):
        log_steps(log, range(300, 310))
        log.close()
        assert history(run, "loss") == expected(range(310))
    assert not (tmp_path / "run" / "unsent").exists()


KILLED = """
import sys, time
from pipelines.storage import locate
from pipelines.tracking import metric_log
from pipelines.tracking.runs import TrackedRun

metric_log._WRITE_EVERY = 0.1
log = metric_log.MetricLog(TrackedRun(*sys.argv[1:3]), locate(sys.argv[3]))
for step in range(10):
    log.log(step, {"loss": step / 2, "rate": float(step)})
time.sleep(600)
"""


def test_points_of_a_killed_process_are_sent_by_the_next_command(proxy: FaultyServer, tmp_path: Path) -> None:
    run = TrackedRun.open(proxy.url, "outages", "run", "/runs/killed", {})
    proxy.mode = "refuse"
    unsent = Unsent(locate(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", KILLED, run.uri, run.run_id, str(tmp_path)])
    try:
        wait_for(lambda: sum(len(read_points(piece)) for piece in unsent.pieces()) == 20, "unsent metrics")
    finally:
        process.kill()
        process.wait()
    # The next attempt repeats some steps, and is killed as well: its points are in a second file.
    log = MetricLog(run, locate(tmp_path))
    log_steps(log, range(5, 15))
    log.close(seconds=0)
    assert [piece.name for piece in unsent.pieces()] == ["metrics_000001.jsonl", "metrics_000002.jsonl"]
    proxy.mode = "ok"
    # The third attempt sends both before its own.
    log = MetricLog(run, locate(tmp_path))
    log_steps(log, range(10, 20))
    log.close()
    assert history(run, "loss") == expected(range(20))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["refuse", "silent"])
def test_a_run_that_ends_during_an_outage_is_settled_later(
    proxy: FaultyServer,
    tmp_path: Path,
    mode: Mode,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, folder = TrackedRun.open(proxy.url, "ends", mode, f"/runs/ends-{mode}", {}), locate(tmp_path)
    monkeypatch.setenv(REQUEST_TIMEOUT, "1")
    proxy.mode = mode
    start, began = time.time(), time.monotonic()
    log = MetricLog(run, folder)
    log_steps(log, range(10))
    assert time.monotonic() - began < 1
    log.close(seconds=0.5)
    assert time.monotonic() - began < 5
    assert f"They are in {tmp_path}/unsent; the next command" in messages(caplog, logging.WARNING)[-1]
    monkeypatch.setenv(REQUEST_TIMEOUT, "60")
    proxy.mode = "refuse"
    run.log_metrics(10, {"goodput": 0.5}, folder)
    assert f"Kept in {tmp_path}/unsent; the next command" in messages(caplog, logging.WARNING)[-1]
    run.close("FINISHED", {"checkpoint": "step_10"}, folder)
    assert f"status FINISHED of run {run.run_id}" in messages(caplog, logging.WARNING)[-1]
    ended = time.time() * 1000

    caplog.clear()
    run.settle(folder)
    (warning,) = messages(caplog, logging.WARNING)
    assert f"still lacks metrics or the status of run {run.run_id}, which stay in {tmp_path}/unsent" in warning

    proxy.mode = "ok"
    record, had = RunStatus.record, []

    def recording(self: RunStatus, client: MlflowClient, run_id: str) -> None:
        had.append(len(history(run, "loss")))
        record(self, client, run_id)

    monkeypatch.setattr(RunStatus, "record", recording)
    for _ in range(2):
        run.settle(folder)
        assert history(run, "loss") == expected(range(10))
        assert history(run, "goodput") == [(10, 0.5)]
    assert had == [10]  # the status was set once, after the metrics
    found = MlflowClient(run.uri).get_run(run.run_id)
    assert (found.info.status, found.data.tags["checkpoint"]) == ("FINISHED", "step_10")
    assert found.info.end_time is not None
    assert start * 1000 < found.info.end_time <= ended
    assert list(tmp_path.iterdir()) == []


def test_closing_sends_what_is_unsent_and_replaces_an_older_status(proxy: FaultyServer, tmp_path: Path) -> None:
    run, folder = TrackedRun.open(proxy.url, "ends", "run", "/runs/closes", {}), locate(tmp_path)
    proxy.mode = "refuse"
    log = MetricLog(run, folder)
    log_steps(log, range(10))
    log.close(seconds=0)
    run.close("KILLED", {"cause": "outage"}, folder)
    proxy.mode = "ok"
    run.close("FINISHED", {}, folder)
    run.settle(folder)
    assert history(run, "loss") == expected(range(10))
    assert run.status == "FINISHED"
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded_and_nothing_is_lost(
    proxy: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_log, "_WRITE_EVERY", 600)
    run, folder = TrackedRun.open(proxy.url, "outages", "run", "/runs/bounded", {}), locate(tmp_path)
    proxy.mode = "refuse"
    log = MetricLog(run, folder, capacity=40)
    for start in range(0, 100, 10):
        log_steps(log, range(start, start + 10))  # 20 points
        wait_for(lambda: len(log._points) <= 20, "points that move to the folder")
    assert len(Unsent(folder).pieces()) >= 4
    proxy.mode = "ok"
    log.close()
    assert history(run, "loss") == expected(range(100))
    assert len(messages(caplog, logging.WARNING)) == 1


def test_without_mlflow_and_storage_the_log_still_never_raises(
    proxy: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    run = TrackedRun.open(proxy.url, "outages", "run", "/runs/no-storage", {})
    log = MetricLog(run, locate(tmp_path / "file" / "run"), capacity=40)
    log_steps(log, range(1))
    wait_for(lambda: not log._points, "the first step")
    proxy.mode = "refuse"
    log_steps(log, range(1, 30))
    wait_for(lambda: len(caplog.records) >= 3, "three warnings")
    proxy.mode = "ok"
    log.close()
    found = "\n".join(messages(caplog, logging.WARNING))
    for part in ("metrics are lost from step 21 on", "kept and sent later", "stay in memory: Cannot write"):
        assert found.count(part) == 1
    assert history(run, "loss") == expected(range(21))


def test_what_mlflow_rejects_is_reported_once_and_dropped(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = TrackedRun.open(uri, "rejected", "run", "/runs/rejected", {})
    log = MetricLog(run, locate(tmp_path))
    log_steps(log, range(3))
    log.log(3, {"loss": 1.5, "not@valid": 1.0})
    log.log(4, {"not@valid": 1.0})
    log_steps(log, range(5, 8))
    wait_for(lambda: not log._points, "end of the request")
    assert history(run, "rate") == [(step, float(step)) for step in (0, 1, 2, 5, 6, 7)]
    MlflowClient(uri).delete_run(run.run_id)
    log_steps(log, range(8, 20))
    log.close()
    (warning,) = messages(caplog, logging.WARNING)
    assert "rejects metrics" in warning
    assert "not@valid" in warning
    assert list(tmp_path.iterdir()) == []
