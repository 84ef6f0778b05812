"""Sweeps: early stopping, the stored state of an interrupted sweep, refusals, and a complete sweep."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import ray

from pipelines.checkpoints import state as checkpoint
from pipelines.config.overrides import with_overrides
from pipelines.config.resolve import resolve
from pipelines.config.serialize import from_dict
from pipelines.config.sweep import SweepConfig
from pipelines.config.train import TrainConfig
from pipelines.errors import RunFailedError, UserError
from pipelines.storage import locate
from pipelines.sweep import sweep
from pipelines.sweep.driver import conclude
from pipelines.sweep.scheduler import SuccessiveHalving
from pipelines.sweep.trainable import StopRequests
from pipelines.sweep.trials import Recorder, TrialStore
from pipelines.tracking.runs import TrackedRun

SPACE = ("optimizer.lr=1e-4..1e-2:log", "loss.dice_weight=1,2")


@pytest.fixture
def base(tiny: TrainConfig) -> TrainConfig:
    """Return a trial of 8 steps with a quick PQ after 4 and 8; two of them fit on two CPUs."""
    return replace(
        tiny,
        run=replace(tiny.run, name="sweep", steps=8),
        scaling=replace(tiny.scaling, cpus_per_worker=0.25, data_cpus=0.5),
        evaluation=replace(tiny.evaluation, every=4),
        checkpoint=replace(tiny.checkpoint, every=4),
    )


def trial_store(folder: Path, *results: list[tuple[int, float]]) -> TrialStore:
    store = TrialStore(locate(str(folder)), [{"optimizer.lr": float(number)} for number in range(len(results))])
    for trial, reported in zip(store.records, results, strict=True):
        for step, pq in reported:
            store.add_result(trial.name, step, pq)
    return store


# ---- successive halving


def slow_decision(rungs: dict[int, dict[str, float]], factor: int, name: str, step: int, pq: float, last: int) -> bool:
    """Continue at the last step, or with a PQ not below the best 1/factor of those that reached the rung earlier."""
    if step not in rungs:
        return True
    before = list(rungs[step].values())
    rungs[step][name] = pq
    return step >= last or not before or pq >= np.quantile(before, 1 - 1 / factor)


@pytest.mark.parametrize("factor", [2, 3])
def test_halving_keeps_the_best_at_each_rung(factor: int) -> None:
    last = 2 * factor**3
    halving = SuccessiveHalving(2, factor, last, StopRequests("/nowhere"))
    rungs: dict[int, dict[str, float]] = {2 * factor**k: {} for k in range(4)}
    draw = np.random.default_rng(factor)
    stopped = 0
    for number in range(30):
        for step in range(1, last + 1):
            name, pq = f"trial-{number:03d}", float(draw.random())
            continues = halving.judge(name, step, pq)
            assert continues == slow_decision(rungs, factor, name, step, pq, last)
            if not continues:
                stopped += 1
                break
    assert 15 < stopped < 30


def test_halving_replays_earlier_results() -> None:
    """A sweep that is interrupted and receives its results again decides like one that is not."""
    results = [("a", 2, 0.5), ("b", 2, 0.6), ("a", 4, 0.7), ("c", 2, 0.4), ("d", 2, 0.9), ("d", 4, 0.6)]
    uninterrupted, before, after = (SuccessiveHalving(2, 2, 16, StopRequests("/nowhere")) for _ in range(3))
    decisions = [uninterrupted.judge(*result) for result in results]
    for result in results[:3]:
        before.judge(*result)
        after.judge(*result)
    after.judge(*results[2])  # a result that is reported twice counts once
    assert [after.judge(*result) for result in results[3:]] == decisions[3:] == [False, True, False]


# ---- stop requests and stored trials


def test_stop_requests_are_shared_through_their_folder(tmp_path: Path) -> None:
    driver, trial = StopRequests(str(tmp_path)), StopRequests(str(tmp_path))
    assert "trial-000" not in trial
    driver.add("trial-000")
    assert "trial-000" in trial
    assert "trial-001" not in trial
    assert not trial.all
    driver.add_all()
    assert trial.all
    assert "trial-001" not in trial  # not requested of this trial itself


def test_stored_trials_outlive_the_driver(tmp_path: Path) -> None:
    first = trial_store(tmp_path, [(4, 0.1), (8, 0.2)], [(4, 0.05)], [(4, 0.3)], [])
    first.set_status("trial-000", "finished")
    first.set_status("trial-001", "stopped early")
    first.set_status("trial-003", "failed", "out of memory")
    again = TrialStore(locate(str(tmp_path)), [])
    assert again.records[:3] == first.records[:3]
    assert [trial.name for trial in again.open] == ["trial-002", "trial-003"]  # failed trials are tried again
    again.add_result("trial-002", 4, 0.3)
    assert again.records[2].results == [(4, 0.3)]


def test_a_damaged_trials_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.json").write_text('[{"name": "trial-000"}]')
    with pytest.raises(UserError, match=r"trials\.json is not the trials\.json of a sweep"):
        TrialStore(locate(str(tmp_path)), [])


def stored(name: Any = "trial-000", **changes: Any) -> dict[str, Any]:
    """Return an entry of trials.json."""
    trial = {"name": name, "values": {"optimizer.lr": 0.1}, "status": "finished", "results": [[8, 0.2]], "cause": ""}
    return {**trial, **changes}


@pytest.mark.parametrize(
    "trial",
    [
        *map(
            stored, ("../production", "/production", "trial-000/../../production", "trial-1", "trial-000\n", "", [1], 1)
        ),
        stored(values=[1]),
        stored(status=["finished"]),
        stored(status="\x1b[2J"),
        stored(results=[["8", 0.2], [9, 0.3]]),
        stored(results=[[8, None]]),
        stored(cause=1),
        stored(other=1),
    ],
    ids=repr,
)
def test_no_trial_of_a_stranger_is_read(tmp_path: Path, trial: dict[str, Any]) -> None:
    kept = tmp_path / "production" / "checkpoints" / "step_00000008"
    kept.mkdir(parents=True)
    (tmp_path / "sweep").mkdir()
    best = stored("trial-001", results=[[8, 0.9]])
    (tmp_path / "sweep" / "trials.json").write_text(json.dumps([trial, best]))
    with pytest.raises(UserError, match=r"trials\.json is not the trials\.json of a sweep") as refused:
        TrialStore(locate(str(tmp_path / "sweep")), []).prune(0)
    assert str(refused.value).isprintable()
    assert kept.is_dir()


@pytest.mark.parametrize("text", ["[" * 100_000, json.dumps([stored(), stored()]), "{}]", '{"a": 1}', "1"])
def test_trials_json_that_is_no_list_of_trials_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trials.json").write_text(text)
    with pytest.raises(UserError, match=r"trials\.json is not the trials\.json of a sweep"):
        TrialStore(locate(str(tmp_path)), [])


def test_pruning_keeps_the_best_and_what_fits_the_budget(tmp_path: Path) -> None:
    store = trial_store(tmp_path, [(8, 0.2)], [(8, 0.4)], [(8, 0.3)], [(4, 0.1)], [(4, 0.9)])
    for number in range(5):
        folder = tmp_path / f"trial-{number:03d}" / "checkpoints" / "step_00000008"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(1000))
    for name, status in zip(("trial-000", "trial-001", "trial-002"), ("finished",) * 3, strict=True):
        store.set_status(name, status)
    store.set_status("trial-003", "stopped early")  # and trial-004 is running

    def left() -> list[int]:
        return [number for number in range(5) if (tmp_path / f"trial-{number:03d}" / "checkpoints").exists()]

    store.prune(1e-6 * 2)
    assert left() == [1, 2, 4]
    store.prune(0)
    assert left() == [1, 4]


def test_a_failed_trial_keeps_its_checkpoints(tmp_path: Path) -> None:
    store = trial_store(tmp_path, [(8, 0.4)], [(4, 0.1)])
    for trial in store.records:
        folder = tmp_path / trial.name / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(10))
    store.set_status("trial-000", "finished")
    store.set_status("trial-001", "failed", "out of memory")
    store.prune(0)
    assert (tmp_path / "trial-001" / "checkpoints").exists()
    store.set_status("trial-001", "stopped early")
    store.prune(0)
    assert not (tmp_path / "trial-001" / "checkpoints").exists()


@pytest.mark.parametrize("link", ["trial-001", "trial-001/checkpoints"])
def test_pruning_follows_no_link_to_other_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, link: str
) -> None:
    mine = tmp_path / "production" / "checkpoints" / "step_00000008"
    mine.mkdir(parents=True)
    (mine / "model.safetensors").write_bytes(bytes(10))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "named").symlink_to(tmp_path / "sweep")  # the sweep's own folder may be one
    store = trial_store(tmp_path / "named", [(8, 0.4)], [(8, 0.1)])
    place = tmp_path / "sweep" / link
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(mine.parents[1] if link == "trial-001" else mine.parent)
    for trial in store.records:
        store.set_status(trial.name, "finished")
    store.prune(0)
    assert (mine / "model.safetensors").exists()
    assert place.is_symlink()
    assert "The checkpoints of trial-001 were not deleted: a link leads to them." in caplog.text
    place.unlink()
    folder = tmp_path / "sweep" / "trial-001" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(bytes(10))
    store.prune(0)
    assert not folder.exists()


def test_stored_trials_and_pruning_on_s3(bucket: str) -> None:
    store = TrialStore(locate(f"{bucket}/sweep"), [{"optimizer.lr": rate} for rate in (0.1, 0.2)])
    for trial, pq in zip(store.records, (0.4, 0.1), strict=True):
        (store.folder / trial.name / "checkpoints" / "step_00000004" / "model.safetensors").write_bytes(bytes(1000))
        store.add_result(trial.name, 4, pq)
        store.set_status(trial.name, "finished")
    assert TrialStore(store.folder, []).records == store.records
    assert (store.folder / "trial-001").size() == 1000
    store.prune(1.5e-6)
    assert [(store.folder / trial.name).size() for trial in store.records] == [1000, 0]


class TuneTrial:
    """A trial as Tune passes it to its callbacks."""

    def __init__(self, name: str, error_file: Path | None = None) -> None:
        self.config = {"name": name}
        self.error_file = error_file and str(error_file)


def test_the_end_of_trials_is_stored(tmp_path: Path) -> None:
    store = trial_store(tmp_path / "sweep", [], [], [], [])
    (tmp_path / "requests").mkdir()
    stop_requests = StopRequests(str(tmp_path / "requests"))
    recorder = Recorder(store, stop_requests, keep_gigabytes=1)
    (tmp_path / "error.txt").write_text(
        "Failure # 1 (occurred at 1:23)\nTraceback:\n  a line\nValueError: no such node\n"
    )
    trials = [TuneTrial(trial.name, tmp_path / "error.txt") for trial in store.records]
    for trial in trials:
        recorder.on_trial_start(1, [], trial)
    assert len(store.running) == 4
    stop_requests.add("trial-000")
    for trial, status in zip(trials[:3], ("stopped", "stopped", "failed"), strict=True):
        recorder.on_trial_result(1, [], trial, {"step": 4, "pq": 0.1})
        recorder.on_trial_result(1, [], trial, {"status": status, "cause": "why" * (status == "failed"), "done": True})
    recorder.on_trial_error(1, [], trials[3])
    assert [(trial.status, trial.cause) for trial in TrialStore(store.folder, []).records] == [
        ("stopped early", ""),
        ("waiting", ""),  # not this trial itself was asked to stop, but the sweep
        ("waiting", ""),  # failures are tried again
        ("waiting", ""),
    ]
    assert [trial.cause for trial in store.records] == ["", "", "why", "its process died: ValueError: no such node"]


def test_a_storage_error_does_not_end_a_sweep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = trial_store(tmp_path / "sweep", [(4, 0.1)])
    (tmp_path / "sweep" / "trials.json").unlink()
    (tmp_path / "sweep").rmdir()
    (tmp_path / "sweep").write_text("in the way")
    store.set_status("trial-000", "finished")
    store.prune(0)
    assert "is not up to date" in caplog.text


def test_trials_that_all_failed_have_no_best(base: TrainConfig, tmp_path: Path) -> None:
    store = trial_store(tmp_path / "sweep", [(4, 0.3)], [])
    store.set_status("trial-000", "failed", "The loss is nan.")
    store.set_status("trial-001", "failed", "The loss is infinite.")
    config = resolve(base)
    mlflow_run = TrackedRun.open(config.tracking.uri, "sweeps", "sweep", str(tmp_path / "sweep"), {})
    with pytest.raises(RunFailedError, match=r"has a result\. trial-000: The loss is nan\. Correct the cause"):
        conclude(config, store, mlflow_run)
    assert mlflow_run.status == "FAILED"


# ---- refusals


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, SweepConfig(), "varies nothing"),
        ({}, SweepConfig(space=("optimizer.lrr=1,2",)), "optimizer.lr"),
        ({"evaluation.every": 0}, SweepConfig(space=SPACE), "never computes it"),
        ({"data.val": ""}, SweepConfig(space=SPACE), "--data.val"),
        ({"evaluation.every": 9}, SweepConfig(space=SPACE), "8 steps, but its first quick PQ is due at step 9"),
        ({}, SweepConfig(space=SPACE, grace_period=3), "grace period of 3 steps ends before"),
        ({}, SweepConfig(space=("model.num_classes=7,8",)), "has 7 classes, the model 8"),
        ({}, SweepConfig(space=("weights=none,/nowhere.pth",)), r"nothing at /nowhere\.pth"),
        ({}, SweepConfig(space=("run.global_batch=8,9",)), "global batch of 9 is not a multiple"),
        (
            {"run.steps": None, "run.epochs": 1},
            SweepConfig(space=("run.global_batch=8,16",)),
            "Set the same number for all by",
        ),
    ],
)
def test_an_impossible_sweep_is_refused_before_anything_starts(
    base: TrainConfig, tmp_path: Path, change: dict[str, Any], config: SweepConfig, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sweep(with_overrides(base, change), config)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_more_than_the_cluster_has_is_refused_with_numbers(ray_session: str, base: TrainConfig, tmp_path: Path) -> None:
    cpus = ray.cluster_resources()["CPU"]
    with pytest.raises(
        UserError,
        match=rf"Running 99 trials at a time needs 99 CPU: .* has {cpus:g} CPU, .* for {cpus:g} of these jobs",
    ):
        sweep(base, SweepConfig(space=SPACE, concurrency=99))
    with pytest.raises(
        UserError, match=rf"needs 400\.5 CPU: 2 workers with 200 CPU each, .* The cluster has {cpus:g} CPU, "
    ):
        sweep(with_overrides(base, {"scaling.cpus_per_worker": 200.0}), SweepConfig(space=SPACE))
    with pytest.raises(UserError, match=rf"needs 1 CPU, 2 GPU: .* The cluster has {cpus:g} CPU, 0 GPU, "):
        sweep(with_overrides(base, {"scaling.device": "cuda"}), SweepConfig(space=SPACE))
    assert not (tmp_path / "sweep").exists()


def test_another_sweep_in_the_same_folder_is_refused(base: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        sweep(base, SweepConfig(space=SPACE))


# ---- a complete sweep


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_from_its_space_to_the_best_configuration(ray_session: str, base: TrainConfig, tmp_path: Path) -> None:
    config = SweepConfig(space=("loss.dice_weight=1,3", "optimizer.lr=1e-6,1e-3"), trials=2, reduction_factor=2)
    result = sweep(base, config)
    folder = tmp_path / "sweep"

    trials = json.loads((folder / "trials.json").read_text())
    assert len({json.dumps(trial["values"]) for trial in trials}) == 2
    client = mlflow.MlflowClient(result.mlflow_run.uri)
    for trial in trials:
        assert trial["status"] in ("finished", "stopped early")
        record = json.loads((folder / trial["name"] / "config.json").read_text())
        ran = from_dict(TrainConfig, record["config"])
        assert ran == with_overrides(
            resolve(base),
            {
                **trial["values"],
                "run.name": trial["name"],
                "run.storage": str(folder),
                "tracking.parent": result.mlflow_run.run_id,
            },
        )
        child = client.get_run(record["mlflow_run_id"])
        assert child.data.tags["mlflow.parentRunId"] == result.mlflow_run.run_id
        logged = client.get_metric_history(child.info.run_id, "quick_pq/all")
        assert [(point.step, point.value) for point in logged][: len(trial["results"])] == [
            (step, pq) for step, pq in trial["results"]
        ]
        state = checkpoint.newest(locate(str(folder / trial["name"])), checkpoint.load)
        assert state is not None
        assert state.step >= trial["results"][-1][0]  # a trial that was stopped has saved

    assert result.best is not None
    reached = [trial for trial in trials if trial["results"][-1][0] == 8]
    assert max(trial["results"][-1][1] for trial in reached) == result.best.results[-1][1]
    best = from_dict(TrainConfig, json.loads((folder / "best.json").read_text()))
    assert best == with_overrides(resolve(base), {**result.best.values, "run.name": ""})
    parent = client.get_run(result.mlflow_run.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best"] == result.best.name
    logged_files = {file.path for file in client.list_artifacts(result.mlflow_run.run_id)}
    assert {"best.json", "trials.csv", "importance.txt"} <= logged_files

    # Repeated: nothing is left to do, and nothing is done. A different search space under this name is refused.
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.jsonl")}
    assert sweep(base, config).best == result.best
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.jsonl")} == before
    with pytest.raises(UserError, match=r"is a different sweep: .*space"):
        sweep(base, replace(config, space=("loss.dice_weight=1,2",)))
    with pytest.raises(UserError, match=r"is a different sweep: evaluation\.images: 6 -> 5"):
        sweep(with_overrides(base, {"evaluation.images": 5}), config)
