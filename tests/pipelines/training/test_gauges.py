"""What a real Ray shows of a run: gauges on the metrics endpoint, and reports to Ray Train."""

import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow.tracking import MlflowClient
from ray.train.v2._internal.execution.callback import ReportCallback

from pipelines.config.train import TrainConfig
from pipelines.training import fit
from pipelines.training.gauges import RunGauges
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(400)]

STEPS, EVERY = 6, 3


class Recorder(ReportCallback):
    """Writes what Ray Train's controller, another process, receives."""

    def __init__(self) -> None:
        self._file = Path(os.environ["REPORTS"])

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Have Ray Train call a Recorder; return its file."""
    module = sys.modules[__name__]
    monkeypatch.setenv("RAY_TRAIN_CALLBACKS", f"{__name__}.Recorder")
    monkeypatch.setenv("REPORTS", str(tmp_path / "reports.jsonl"))
    ray.cloudpickle.register_pickle_by_value(module)  # pyright: ignore[reportAttributeAccessIssue]
    yield tmp_path / "reports.jsonl"
    ray.cloudpickle.unregister_pickle_by_value(module)  # pyright: ignore[reportAttributeAccessIssue]


def gauges(run: str) -> dict[str, float]:
    """Return a run's values on the metrics endpoint of this node."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10
    ) as answer:
        text = answer.read().decode()
    found = re.findall(rf'^ray_maskformer_(\w+)\{{.*run="{run}".*\}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.slow
def test_prometheus_and_ray_train_get_the_figures_of_mlflow(tiny: TrainConfig, reports: Path) -> None:
    result = fit(
        replace(
            tiny,
            run=replace(tiny.run, name="watched", steps=STEPS),
            checkpoint=replace(tiny.checkpoint, every=EVERY),
            evaluation=replace(tiny.evaluation, every=EVERY, images=2),
        )
    )
    shown = wait_for(lambda: (found := gauges("watched")).get("step") == STEPS and found, "gauges", seconds=60)
    client = MlflowClient(result.tracking_uri)

    def logged(metric: str) -> dict[int, float]:
        return {point.step: point.value for point in client.get_metric_history(result.mlflow_run_id, metric)}

    metrics = {
        "loss": logged("loss/total"),
        "images_per_second": logged("images_per_second"),
        "data_wait_share": logged("data_wait_share"),
        "quick_pq": logged("quick_pq/all"),
    }
    assert shown == pytest.approx({"step": STEPS, **{name: values[STEPS] for name, values in metrics.items()}})
    lines = [json.loads(line) for line in reports.read_text().splitlines()]
    assert [(of_rank[0]["step"], len(of_rank)) for of_rank in lines] == [(EVERY, 2), (STEPS, 2)]
    for of_rank in lines:
        assert {name: of_rank[0][name] for name in metrics} == {
            name: values[of_rank[0]["step"]] for name, values in metrics.items()
        }


@pytest.mark.slow
def test_gauges_of_a_run_that_ended_disappear() -> None:
    """Ray forgets a gauge that is no longer set, though the process lives on."""
    ended, running = RunGauges("ended"), RunGauges("running")
    ended.set({"loss": 1.5, "phase": "ignored"})
    wait_for(lambda: gauges("ended") == {"loss": 1.5}, "gauge", seconds=60)

    def gone() -> bool:
        running.set({"loss": 2.5})
        return not gauges("ended")

    wait_for(gone, "end of the gauge", seconds=120)
    assert gauges("running") == {"loss": 2.5}
