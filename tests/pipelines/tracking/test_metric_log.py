"""The metric log: each step is logged once, and a slow or absent server never delays training."""

import logging
import signal
import time

import psutil
import pytest
from mlflow.tracking import MlflowClient

from pipelines.tracking.metric_log import MetricLog
from pipelines.tracking.runs import TrackedRun
from tests.pipelines.tracking.mlflow_server import UNUSED


def history(run: TrackedRun, metric: str) -> list[tuple[int, float]]:
    points = MlflowClient(run.uri).get_metric_history(run.run_id, metric)
    return [(point.step, point.value) for point in points]


def test_repeated_steps_are_logged_once(uri: str) -> None:
    run = TrackedRun.open(uri, "restarts", "run", "/runs/restarted", {})
    for first, last in ((0, 7), (5, 10), (5, 12)):
        log = MetricLog(run)
        for step in range(first, last):
            log.log(step, {"loss": step / 2, "rate": float(step)})
        log.close()
    assert history(run, "loss") == [(step, step / 2) for step in range(12)]
    assert history(run, "rate") == [(step, float(step)) for step in range(12)]


def test_each_metric_has_its_own_last_step(uri: str) -> None:
    run = TrackedRun.open(uri, "restarts", "run", "/runs/later", {})
    log = MetricLog(run)
    log.log(10, {"loss": 1.0})
    log.log(10, {"pq": 0.5})
    log.log(5, {"other": 0.5})
    log.close()
    assert [history(run, metric) for metric in ("loss", "pq", "other")] == [[(10, 1.0)], [(10, 0.5)], [(5, 0.5)]]


@pytest.mark.usefixtures("impatient")
def test_an_absent_server_costs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    log = MetricLog(TrackedRun(UNUSED, "0" * 32))
    log.log(3, {"loss": 1.0})
    log.close()
    (message,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert message.startswith("MLflow did not accept the metrics of step 3")


def test_a_hanging_server_never_blocks(server: tuple[str, psutil.Process], caplog: pytest.LogCaptureFixture) -> None:
    uri, process = server
    run = TrackedRun.open(uri, "hanging", "run", "/runs/hanging", {})
    log = MetricLog(run, capacity=10)
    processes = [process, *process.children(recursive=True)]
    for member in processes:
        member.send_signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        for step in range(20):
            log.log(step, {"loss": 1.0})
        log.close(seconds=1)
        assert time.monotonic() - start < 10
    finally:
        for member in reversed(processes):
            member.send_signal(signal.SIGCONT)
    assert "are lost" in caplog.messages[0]
    assert "may be lost" in caplog.messages[-1]
    log.close()
    assert history(run, "loss")[:10] == [(step, 1.0) for step in range(10)]
