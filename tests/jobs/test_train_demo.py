"""The demonstration with a handful of steps: every part runs, and its last line is the PQ."""

import json
import os
import re
import sys
from pathlib import Path

import mlflow
import pytest

from jobs import train_demo
from pipelines.demo import run as demo


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_demo_goes_the_whole_way(
    ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SPLITS", {"train": 32, "val": 6})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    flags = ["--run.storage", str(tmp_path), "--run.steps", "4", "--checkpoint.every", "2", "--evaluation.every", "2"]
    monkeypatch.setattr(sys, "argv", ["train_demo.py", *flags])
    assert train_demo.main() == 0
    printed = capsys.readouterr().out
    assert "MLFLOW_TRACKING_URI" not in os.environ  # a later run of this process chooses its own
    assert re.search(r"\nPQ \d+\.\d\n$", printed)
    for part in ("untrained model", "nearest-color baseline", "trained model", "MLflow run", "model version"):
        assert part in printed

    metrics = json.loads((tmp_path / "demo/evaluation/00000004-val/metrics.json").read_text())
    assert printed.rstrip().splitlines()[-1] == f"PQ {100 * metrics['metrics']['pq/all']:.1f}"
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    version = client.get_model_version_by_alias(demo.MODEL_NAME, demo.ALIAS)
    assert version.tags["step"] == "4"
    run = client.get_run(re.findall(r"MLflow run +(\w+)", printed)[0])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["pq/all"] == metrics["metrics"]["pq/all"]
    training = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert training.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(training.info.run_id, "quick_pq/all")] == [2, 4]
    assert training.data.params["run.global_batch"] == "8"

    # Once more: everything is there, and the result is the same.
    assert train_demo.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
