"""Ctrl-C and SIGTERM: the state is saved, nothing that was started stays behind, and the same command resumes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.checkpoints import state as checkpoint
from pipelines.config.recipes import R50_MMDET
from pipelines.config.train import TrainConfig
from pipelines.storage import locate
from pipelines.training import ledger
from tests.jobs.command_line import flags
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 1000  # whatever is saved before the last step is saved by a stop


@pytest.mark.slow
def test_stopped_twice_and_finished(
    tiny: TrainConfig, tmp_path: Path, ray_session: str, jobs: list[subprocess.Popen[str]]
) -> None:
    """The first attempt starts a Ray of its own and must stop it; the others join one, which must stay."""
    config = replace(
        tiny,
        run=replace(tiny.run, steps=STEPS, sample_log=True),
        checkpoint=replace(tiny.checkpoint, every=EVERY),
    )
    run = tmp_path / config.run.name
    command = [sys.executable, "jobs/train_r50.py", *flags(config, R50_MMDET)]
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    joined = {**alone, "RAY_ADDRESS": ray_session}

    def steps_done() -> list[int]:
        log = run / "samples.jsonl"
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def attempts() -> list[dict[str, Any]]:
        return [event for event in ledger.read(locate(run)) if event["event"] == "start"]

    def start(attempt: int, environment: dict[str, str]) -> tuple[subprocess.Popen[str], Path]:
        log = tmp_path / f"log{attempt}"
        with log.open("w") as file:
            # A session of its own: a terminal's Ctrl-C goes to a whole group of processes.
            job = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, text=True, start_new_session=True
            )
        jobs.append(job)
        return job, log

    def stop(attempt: int, environment: dict[str, str], send: Callable[[int], None]) -> int:
        """Interrupt an attempt once it has done some steps; return the step that its checkpoint holds."""
        job, log = start(attempt, environment)
        before = len(steps_done())
        wait_for(lambda: len(attempts()) == attempt and len(steps_done()) >= before + 6, "steps", job)
        family = psutil.Process(job.pid).children(recursive=True)
        assert ({"raylet", "gcs_server"} <= {process.name() for process in family}) == (environment is alone)
        send(job.pid)
        assert job.wait(120) == 130, log.read_text()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []

        end = ledger.read(locate(run))[-1]
        assert (end["event"], end["status"]) == ("end", "stopped")
        step = end["step"]
        assert step == max(steps_done()) + 1 < STEPS
        assert checkpoint.load(checkpoint.step_folder(locate(run), step)).step == step
        assert f"stopped at step {step}: {run}/checkpoints/step_{step:08d}" in log.read_text()
        assert not re.search(r"^Traceback", log.read_text(), re.MULTILINE)
        return step

    first = stop(1, alone, lambda pid: os.killpg(pid, signal.SIGINT))
    second = stop(2, joined, lambda pid: os.kill(pid, signal.SIGTERM))
    job, log = start(3, joined)
    assert job.wait(600) == 0, log.read_text()
    assert [event["step"] for event in attempts()] == [0, first, second]
    assert re.search(rf"^finished at step {STEPS}: ", log.read_text(), re.MULTILINE)
    workers = config.scaling.max_workers
    assert sorted(steps_done()) == [step for step in range(STEPS) for _ in range(workers)]  # none lost, none again
