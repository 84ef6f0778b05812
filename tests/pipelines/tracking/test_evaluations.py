"""System metrics of an evaluation: logged while it runs, unless they are turned off, and without waiting at its end."""

import pytest
from mlflow.tracking import MlflowClient

from pipelines.tracking.evaluations import system_metrics
from pipelines.tracking.runs import TrackedRun
from tests.waiting import wait_for


def metrics(run: TrackedRun) -> set[str]:
    return {name for name in MlflowClient(run.uri).get_run(run.run_id).data.metrics if name.startswith("system/")}


def test_this_machine_is_measured(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = TrackedRun.start(uri, "system", "evaluation", {}, {})
    with system_metrics(run):
        wait_for(lambda: metrics(run), "system metrics")
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= metrics(run)


def test_measuring_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("It was not turned off.")

    monkeypatch.setattr("pipelines.tracking.evaluations.SystemMetricsMonitor", start)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with system_metrics(TrackedRun("sqlite:////nowhere", "0" * 32)):
        pass
