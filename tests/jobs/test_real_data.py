"""Real COCO images and a full-size network, through the commands that users type."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipelines.checkpoints import state as checkpoint
from pipelines.storage import locate

ROOT = Path(__file__).parents[2]
STEPS = 3

SMALL_IMAGES = (
    "--data.augment.short-sides 96 128 --data.augment.long-side 200 --data.augment.crop-short-sides 100 "
    "--data.augment.crop-size 64 96 --evaluation.short-side 128 --evaluation.long-side 200"
)
ONE_CPU = (
    "--scaling.device cpu --scaling.workers 1 --scaling.cpus-per-worker 1 --scaling.data-cpus 0.5 "
    "--data.samples-per-task 2 --weights none"
)


def job(command: str, ray_address: str) -> str:
    """Run a job as a command of its own and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_address}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command_line = [sys.executable, *shlex.split(command)]
    answer = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_r50_learns_from_coco(ray_session: str, tmp_path: Path) -> None:
    sample = os.environ.get("COCO_PANOPTIC_SAMPLE")
    if not sample:
        pytest.skip("COCO_PANOPTIC_SAMPLE does not name the folder with two real COCO images")
    pack, run = tmp_path / "pack", tmp_path / "runs" / "r50"
    packed = job(f"jobs/prepare_data.py --input {sample} --split val2017 --output {pack}", ray_session)
    checked, summary, *_ = packed.splitlines()
    assert checked == "2 images checked: 0 errors, 0 warnings, 0 notes; 0 images have an error"
    assert summary.startswith("2 images, 47 non-crowd segments")

    places = f"--data.train {pack} --data.val {pack} --run.storage {run.parent} --run.name {run.name}"
    length = f"--run.steps {STEPS} --run.global-batch 2 --tracking.log-every 1"
    trained = job(f"jobs/train_r50.py {places} {length} {ONE_CPU} {SMALL_IMAGES}", ray_session)
    assert trained.startswith(f"finished at step {STEPS}: {run}/checkpoints/step_{STEPS:08d}\n")
    record = json.loads((run / "config.json").read_text())
    client = MlflowClient(record["config"]["tracking"]["uri"])
    losses = client.get_metric_history(record["mlflow_run_id"], "loss/total")
    assert [metric.step for metric in losses] == [1, 2, 3]
    assert all(math.isfinite(metric.value) and metric.value > 0 for metric in losses)
    state = checkpoint.load(checkpoint.step_folder(locate(run), STEPS))
    assert sum(tensor.numel() for name, tensor in state.model.items() if "running" not in name) > 45_000_000

    scored = job(f"jobs/evaluate.py --checkpoint {run} --data {pack} --scaling.cpus-per-worker 0.5", ray_session)
    assert re.search(r"^percent +PQ +SQ +RQ +classes +95 % interval of PQ$", scored, re.MULTILINE)
    assert re.search(r"^all( +\d+\.\d){3} +\d+ +\d+\.\d to \d+\.\d$", scored, re.MULTILINE)
    assert f"2 images; results in {run}/evaluation/00000003-pack" in scored
    assert f"report: {run}/evaluation/00000003-pack/report.html" in scored
    predictions = json.loads((run / "evaluation" / "00000003-pack" / "predictions.json").read_text())
    assert len(predictions["annotations"]) == 2
