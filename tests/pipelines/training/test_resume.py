"""Exact resume. The oracle is the same run, never interrupted: samples, losses and weights equal to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient

from jobs.bench.shared.faults import worker_processes
from pipelines.checkpoints import state as checkpoint
from pipelines.config.serialize import from_dict, to_dict
from pipelines.config.train import TrainConfig
from pipelines.storage import locate
from pipelines.training import TrainResult, fit, ledger
from tests.pipelines.tracking.curves import in_mlflow, in_tensorboard
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

NUM_IMAGES, STEPS, STEPS_PER_EPOCH, EVERY = 80, 25, 10, 5


@pytest.fixture(scope="module")
def chance() -> random.Random:
    """Draw when and whom to kill; the seed is printed, so that a failure can be repeated."""
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"KILL_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def untouched(
    ray_session: str, tiny_in: Callable[[Path], TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    return fit(audited(tiny_in(tmp_path_factory.mktemp("untouched"))))


def audited(config: TrainConfig) -> TrainConfig:
    return replace(config, run=replace(config.run, sample_log=True))


def sample_lines(run: Path) -> list[dict[str, Any]]:
    log = run / "samples.jsonl"
    # The last line may be half written while the run is on.
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def samples_by_step(run: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Return what each worker took at each step; a step that was done twice must have taken the same."""
    taken: dict[tuple[int, int], dict[str, Any]] = {}
    for line in sample_lines(run):
        assert taken.setdefault((line["step"], line["rank"]), line) == line
    return taken


def logged_losses(result: TrainResult) -> dict[int, float]:
    history = MlflowClient(result.tracking_uri).get_metric_history(result.mlflow_run_id, "loss/total")
    losses = {metric.step: metric.value for metric in history}
    assert len(losses) == len(history), "a step was logged twice"
    return losses


def assert_same_run(result: TrainResult, oracle: TrainResult) -> None:
    assert samples_by_step(Path(result.folder)) == samples_by_step(Path(oracle.folder))
    assert logged_losses(result) == logged_losses(oracle)
    assert_same_state(result, oracle)


def assert_same_state(result: TrainResult, oracle: TrainResult) -> None:
    ours, theirs = (checkpoint.load(checkpoint.step_folder(locate(r.folder), STEPS)) for r in (result, oracle))
    for name, tensor in theirs.model.items():
        assert torch.equal(ours.model[name], tensor), name
    for index, state in theirs.optimizer["state"].items():
        for key, value in state.items():
            assert torch.equal(ours.optimizer["state"][index][key], value), (index, key)


def reached(run: Path, step: int) -> Callable[[], bool]:
    return lambda: any(line["step"] >= step for line in sample_lines(run)[-4:])


def starts(run: Path) -> list[dict[str, Any]]:
    return [event for event in ledger.read(locate(run)) if event["event"] == "start"]


def test_untouched_run_takes_each_sample_once_per_epoch(untouched: TrainResult) -> None:
    assert (untouched.status, untouched.step) == ("finished", STEPS)
    lines = samples_by_step(Path(untouched.folder)).values()
    positions = sorted(position for line in lines for position in line["positions"])
    assert positions == list(range(STEPS * 8))
    for epoch in range(2):
        ids = [i for line in lines for i, e in zip(line["image_ids"], line["epochs"], strict=True) if e == epoch]
        assert len(ids) == len(set(ids)) == NUM_IMAGES


def test_a_killed_worker_leaves_no_trace(untouched: TrainResult, tiny: TrainConfig, chance: random.Random) -> None:
    """SIGKILL in the second epoch, between checkpoints, at a random step. docs/chaos.md has kills in a row."""
    config = audited(replace(tiny, tracking=replace(tiny.tracking, tensorboard=True)))
    run = Path(config.run.storage) / config.run.name
    step, victim = chance.choice([11, 12, 13, 16, 17, 18]), chance.randrange(2)
    print(f"killing worker {victim} at step {step}")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fit, config)
        pids = wait_for(lambda: starts(run), "start", poll=0.002)[0]["pids"]
        wait_for(reached(run, step), f"step {step}", poll=0.002)
        os.kill(pids[victim], signal.SIGKILL)
        result = future.result(timeout=240)
    assert_same_run(result, untouched)
    restarts = starts(run)[1:]
    assert [event["step"] % EVERY for event in restarts] == [0]
    assert STEPS_PER_EPOCH <= restarts[0]["step"] < 2 * STEPS_PER_EPOCH
    # The attempt really was cut off between checkpoints: some steps stand in the log twice.
    assert len(sample_lines(run)) > len(samples_by_step(run))
    assert [event["event"] for event in ledger.read(locate(run))] == ["start", "failure", "start", "end"]
    shown = in_tensorboard(run)
    assert shown == in_mlflow(result.mlflow_run)
    for metric in ("loss/total", "gradient_norm", "images_per_second"):
        assert [step for step, _ in shown[metric]] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_worker_that_stops_while_it_starts_leaves_no_trace(
    untouched: TrainResult, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not told anybody of itself yet."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    config = audited(replace(tiny, scaling=replace(tiny.scaling, hang_timeout=5)))
    before = {process.pid for process in worker_processes()}

    def new() -> list[psutil.Process]:
        return [process for process in worker_processes() if process.pid not in before]

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fit, config)
        wait_for(new, "a worker", poll=0.002)[0].send_signal(signal.SIGSTOP)
        result = future.result(timeout=300)
    assert_same_run(result, untouched)
    events = ledger.read(locate(result.folder))
    assert [event["event"] for event in events] == ["failure", "start", "end"]
    assert events[0]["cause_class"] == "hang"
    assert "no sign of life" in events[0]["cause"]


def test_killed_driver_leaves_no_trace(
    untouched: TrainResult, tiny: TrainConfig, ray_session: str, chance: random.Random
) -> None:
    config = audited(tiny)
    run = Path(config.run.storage) / config.run.name
    step = chance.randrange(11, 19)
    print(f"killing the driver at step {step}")
    code = (
        "import json, sys; from pipelines.config.serialize import from_dict; "
        "from pipelines.config.train import TrainConfig; from pipelines.training import fit;"
        "fit(from_dict(TrainConfig, json.loads(sys.argv[1])))"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(to_dict(config))], env={**os.environ, "RAY_ADDRESS": ray_session}
    )
    wait_for(reached(run, step), f"step {step}", poll=0.002)
    driver.kill()
    driver.wait()
    assert_same_run(fit(config), untouched)
    causes = [event.get("cause") for event in ledger.read(locate(run)) if event["event"] == "failure"]
    assert causes == ["the driver was lost"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_driver_lost_after_the_last_checkpoint_is_repaired(tiny: TrainConfig) -> None:
    """The ledger and MLflow do not know yet that the run is finished."""
    config = replace(tiny, run=replace(tiny.run, steps=4))
    result = fit(config)
    file = Path(result.folder) / "ledger.jsonl"
    *before, end = file.read_text().splitlines(keepends=True)
    assert json.loads(end)["status"] == "finished"
    file.write_text("".join(before))
    client = MlflowClient(result.tracking_uri)
    client.update_run(result.mlflow_run_id, status="RUNNING")
    assert (fit(config).status, client.get_run(result.mlflow_run_id).info.status) == ("finished", "FINISHED")
    events = ledger.read(locate(result.folder))
    assert [event["event"] for event in events] == ["start", "failure", "start", "end"]
    assert (events[1]["cause_class"], events[2]["step"], events[3]["step"]) == ("driver", 4, 4)
    assert fit(config).status == "finished"
    assert ledger.read(locate(result.folder)) == events


def test_one_worker_gives_the_bits_of_two(untouched: TrainResult, tiny: TrainConfig) -> None:
    """One worker computes the four micro-batches of a step. Four workers are in tests/jobs/bench/test_trials.py."""
    other = fit(audited(replace(tiny, scaling=replace(tiny.scaling, workers=1))))

    def by_step(result: TrainResult) -> dict[int, dict[int, int]]:
        found: dict[int, dict[int, int]] = {}
        for (step, _), line in samples_by_step(Path(result.folder)).items():
            found.setdefault(step, {}).update(zip(line["positions"], line["image_ids"], strict=True))
        return found

    assert by_step(other) == by_step(untouched)
    assert logged_losses(other) == logged_losses(untouched)
    assert_same_state(other, untouched)


def test_finished_run_has_nothing_to_do(untouched: TrainResult) -> None:
    record = json.loads((Path(untouched.folder) / "config.json").read_text())
    before = (Path(untouched.folder) / "ledger.jsonl").read_bytes()
    assert fit(from_dict(TrainConfig, record["config"])) == untouched
    assert (Path(untouched.folder) / "ledger.jsonl").read_bytes() == before
