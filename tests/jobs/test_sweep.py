"""Sweeps as people run them: killed and continued, stopped, and many in a row."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import ray

from pipelines.config.recipes import DEMO
from pipelines.config.sweep import SweepConfig
from pipelines.config.train import TrainConfig
from pipelines.sweep import sweep
from tests.jobs.command_line import flags
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_trials_with_a_driver_killed(
    packs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[subprocess.Popen[str]]
) -> None:
    """Half of them or more are stopped early; after SIGKILL no trial that has ended is run again."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = [
        sys.executable, "jobs/sweep.py", "--recipe", "demo", "--run.name", "lr", "--run.storage", str(tmp_path),
        "--data.train", packs["train"], "--data.val", packs["val"], "--run.steps", "180", "--evaluation.every", "60",
        "--checkpoint.every", "60", "--schedule.warmup-steps", "10",
        "--sweep.space", "optimizer.lr=1e-5..3e-3:log", "--sweep.trials", "8", "--run.seed", "4",
    ]  # fmt: skip
    folder = tmp_path / "lr"

    def start(log: Path) -> subprocess.Popen[str]:
        with log.open("w") as file:
            job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, text=True, start_new_session=True)
        jobs.append(job)
        return job

    def trials() -> dict[str, Any]:
        place = folder / "trials.json"
        return {trial["name"]: trial for trial in json.loads(place.read_text())} if place.exists() else {}

    def ended() -> set[str]:
        return {name for name, trial in trials().items() if trial["status"] in ("finished", "stopped early")}

    def begun(name: str) -> int:
        ledger = folder / name / "ledger.jsonl"
        return ledger.read_text().count('"event": "start"') if ledger.exists() else 0

    first = start(tmp_path / "log1")
    # Two have ended and the third is under way.
    wait_for(lambda: len(ended()) >= 2 and begun("trial-002"), "two trials", first, seconds=900)
    family = psutil.Process(first.pid).children(recursive=True)
    before = {name: ((folder / name / "ledger.jsonl").read_text(), trials()[name]) for name in ended()}
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(family, timeout=180)  # Ray's agents look only now and then
    assert alive == []  # Ray has gone down with its driver

    second = start(tmp_path / "log2")
    assert second.wait(1200) == 0, (tmp_path / "log2").read_text()
    after = trials()
    for name, (ledger, trial) in before.items():
        assert (folder / name / "ledger.jsonl").read_text() == ledger
        assert after[name] == trial
    assert begun("trial-002") == 2  # it resumed
    assert all(begun(name) == 1 for name in after if name not in (*before, "trial-002"))
    stopped = [name for name, trial in after.items() if trial["status"] == "stopped early"]
    assert len(after) == 8
    assert len(stopped) >= 4
    assert ended() == set(after)

    log = (tmp_path / "log2").read_text()
    assert not re.search(r"^Traceback", log, re.MULTILINE)
    best = re.findall(r"^the best is (trial-\d+); to train with its settings: --config (\S+)$", log, re.MULTILINE)
    assert best[0][0] not in stopped
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name(DEMO.tracking.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 9  # the sweep and its trials, each once
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 8
    assert all(run.info.status in ("FINISHED", "KILLED") for run in runs)

    # The best configuration is one that a training job takes.
    described = subprocess.run(
        [sys.executable, "jobs/train_demo.py", "--help-all", "--config", best[0][1]],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    rate = after[best[0][0]]["values"]["optimizer.lr"]
    assert f"[{rate}]" in described.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_stopped_sweep_saves_and_resumes(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[subprocess.Popen[str]]
) -> None:
    """Also when a step takes longer than the ten seconds that Tune leaves to trials that it stops itself."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    base = replace(
        tiny,
        run=replace(tiny.run, name="stopped", steps=3, global_batch=512, micro_batch=2),
        evaluation=replace(tiny.evaluation, every=3),
        checkpoint=replace(tiny.checkpoint, every=3),
    )
    command = [
        sys.executable, "jobs/sweep.py", "--recipe", "demo", *flags(base, DEMO),
        "--sweep.space", "optimizer.lr=1e-3,2e-3",
    ]  # fmt: skip
    run = tmp_path / "stopped" / "trial-000"

    def progress() -> list[dict[str, Any]]:
        file = run / "ledger.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    with (tmp_path / "log1").open("w") as file:
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, text=True, start_new_session=True)
    jobs.append(job)
    wait_for(lambda: [event["event"] for event in progress()] == ["start"], "a start", job, seconds=900)
    job.terminate()
    told = time.monotonic()
    assert job.wait(600) == 130, (tmp_path / "log1").read_text()
    assert progress()[-1]["status"] == "stopped"
    assert progress()[-1]["time"] - progress()[0]["time"] > 10  # else this test proves nothing
    assert time.monotonic() - told > 10
    saved = progress()[-1]["step"]
    assert (run / "checkpoints" / f"step_{saved:08d}" / "manifest.json").exists()
    assert not (tmp_path / "stopped" / "trial-001").exists()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name(DEMO.tracking.experiment)
    assert experiment is not None
    assert {each.info.status for each in client.search_runs([experiment.experiment_id])} == {"KILLED"}

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert again.returncode == 0, again.stderr
    assert [event["step"] for event in progress() if event["event"] == "start"] == [0, saved]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_sweeps_in_a_row_leave_nothing_behind(
    ray_session: str, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # others use the machine's own
    base = replace(
        tiny,
        run=replace(tiny.run, steps=4),
        evaluation=replace(tiny.evaluation, every=2),
        checkpoint=replace(tiny.checkpoint, every=4),
    )

    def placement_groups() -> set[str]:
        table = ray.util.placement_group_table()
        return {key for key, group in table.items() if group["state"] != "REMOVED"}

    def workers() -> set[int]:
        """Processes that hold work: idle ones of Ray's pool are Ray's own."""
        own = psutil.Process().children(recursive=True)
        busy = set()
        for process in own:
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                # Ray Data starts a coordinator once, for the cluster's life.
                if "ray::" in title and "IDLE" not in title and "_AutoscalingCoordinator" not in title:
                    busy.add(process.pid)
        return busy

    def scratch() -> set[str]:
        return set(os.listdir(tmp_path / "temporary"))

    before = placement_groups(), workers(), scratch()
    for number in range(8):
        space = SweepConfig(space=("optimizer.lr=1e-3,2e-3",), reduction_factor=2)
        assert sweep(replace(base, run=replace(base.run, name=f"sweep-{number}")), space).best is not None
        deadline = time.monotonic() + 30
        while (left := (placement_groups(), workers(), scratch())) != before:
            assert time.monotonic() < deadline, f"after sweep {number}: {left} where there was {before}"
            time.sleep(0.5)
    # What a run waits for when something before it has not been given back.
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
