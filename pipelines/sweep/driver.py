"""A sweep: trials of one configuration with some settings varied, the worse ones stopped early.

Like that of a run, the state of a sweep is in its folder: `sweep.json` identifies it, `trials.json` holds the status
and results of each trial. The same command resumes the trials that have not ended. Ray Tune itself never resumes: it
is started with those trials each time, and its scheduler receives the earlier results.
"""

import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import ray
from ray import tune

from maskformer.untrusted import parse_json
from pipelines.cluster.session import session
from pipelines.config.overrides import with_overrides
from pipelines.config.serialize import to_dict
from pipelines.config.sweep import SweepConfig
from pipelines.config.train import TrainConfig
from pipelines.errors import RunFailedError, StorageUnavailableError, UserError
from pipelines.sweep import report, search_space
from pipelines.sweep.preflight import (
    earlier_run_id,
    prepare_trials,
    require_fixed_workers,
    require_metric,
    sweep_record,
    trials_at_once,
)
from pipelines.sweep.report import TrialRecord
from pipelines.sweep.scheduler import SuccessiveHalving
from pipelines.sweep.trainable import StopRequests, TrainingTrial
from pipelines.sweep.trials import Recorder, TrialStore
from pipelines.tracking.runs import TrackedRun
from pipelines.training.lock import locked
from pipelines.training.monitor import StopSignals
from pipelines.training.preflight import PreparedRun, check_locations, prepare_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """Results of a sweep."""

    name: str
    folder: str
    """Path or URI of the sweep's folder."""
    best: TrialRecord | None
    """The best trial; None if the sweep was stopped by Ctrl-C."""
    report: str
    """Text with all trials, the best first, and the importance of each setting."""
    mlflow_run: TrackedRun


def sweep(base: TrainConfig, config: SweepConfig) -> SweepResult:
    """Run the trials of a sweep that have not ended yet, and report on all trials.

    Each trial is a run in the sweep's folder, `<base.run.storage>/<base.run.name>`. The same name in the same storage
    resumes a sweep.

    Raises:
        UserError: the search space, configuration, data or cluster make it impossible; nothing was started.
        RunFailedError: no trial has a result.
    """
    axes = search_space.parse(config.space, base)
    name = base.run.name or f"sweep-{base.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    prepared = prepare_run(replace(base, run=replace(base.run, name=name)))
    require_fixed_workers(prepared)
    require_metric(prepared, config)
    record = sweep_record(prepared, config)
    earlier_id = earlier_run_id(prepared.folder, record)
    if config.trials < (combinations := search_space.combinations(axes)) < math.inf:
        logger.info(
            "Trying %d of %d combinations; --sweep.trials %d tries all.", config.trials, combinations, combinations
        )
    store = TrialStore(prepared.folder, search_space.sample(axes, config.trials, prepared.config.run.seed))
    runs = prepare_trials(prepared, store)
    mlflow_run = TrackedRun(prepared.config.tracking.uri, earlier_id)
    if store.open:
        check_locations(prepared.config)
        with session():
            at_once = min(trials_at_once(prepared.config, config.concurrency), len(store.open))
            with locked(prepared.folder, "sweep") as lost:
                mlflow_run = _start(prepared, record, store)
                logger.info(
                    "Sweep %s: %d trials of %d steps, %d of them already ended, %d at a time.",
                    name, len(store.records), prepared.total_steps, len(store.records) - len(store.open), at_once,
                )  # fmt: skip
                try:
                    _catch_up(mlflow_run.uri, store)
                    runs = {key: _child_of(mlflow_run, run) for key, run in runs.items()}
                    _run(runs, store, config, at_once, lost)
                except BaseException as error:
                    mlflow_run.close("KILLED", {"cause": type(error).__name__}, store.folder)
                    raise
    store.prune(config.keep_gigabytes)
    if store.open:
        mlflow_run.close("KILLED", {"status": "stopped"}, store.folder)
        best = None
    else:
        best = conclude(prepared.config, store, mlflow_run)
    text = f"{report.table(store.records)}\n\n{report.importance_text(store.records)}"
    return SweepResult(name, str(prepared.folder), best, text, mlflow_run)


def _start(prepared: PreparedRun, record: dict[str, Any], store: TrialStore) -> TrackedRun:
    """Record the sweep in its folder and in MLflow; return its MLflow run."""
    config = prepared.config
    params = {**record["config"], "sweep": record["sweep"]}
    mlflow_run = TrackedRun.open(
        config.tracking.uri, config.tracking.experiment, config.run.name, str(store.folder), params
    )
    mlflow_run.set_status("RUNNING")
    (store.folder / "sweep.json").write_text(json.dumps({**record, "mlflow_run_id": mlflow_run.run_id}, indent=1))
    store.write()
    return mlflow_run


def _child_of(parent: TrackedRun, run: PreparedRun) -> PreparedRun:
    tracking = replace(run.config.tracking, parent=parent.run_id)
    return replace(run, config=replace(run.config, tracking=tracking))


def _catch_up(tracking_uri: str, store: TrialStore) -> None:
    """Fetch results that were logged but not stored before the driver died; trials do not report them again."""
    for trial in store.open:
        file = store.folder / trial.name / "config.json"
        try:
            run_id = parse_json(file.read_bytes())["mlflow_run_id"] if file.exists() else ""
            for step, pq in TrackedRun(tracking_uri, run_id).history("quick_pq/all") if run_id else ():
                store.add_result(trial.name, step, pq)
        except (
            UserError,
            StorageUnavailableError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # the trial itself will report the cause
            logger.warning("Earlier results of %s may be missing. %s", trial.name, error)


def _run(
    runs: Mapping[str, PreparedRun], store: TrialStore, config: SweepConfig, at_once: int, lost: threading.Event
) -> None:
    """Run the open trials with Tune; return when all have ended or the sweep was stopped.

    Args:
        lost: set when another driver has taken the sweep over.
    """
    first = next(iter(runs.values()))
    # Not in the sweep's folder: a stop must work even if the storage is full or unreachable.
    with tempfile.TemporaryDirectory(prefix="maskformer-sweep-", ignore_cleanup_errors=True) as scratch:
        stop_requests = StopRequests(scratch)
        grace_period = config.grace_period or first.config.evaluation.every
        scheduler = SuccessiveHalving(grace_period, config.reduction_factor, first.total_steps, stop_requests)
        for known in store.records:
            for step, pq in known.results:
                scheduler.judge(known.name, step, pq)

        def request_stop() -> None:
            stop_requests.add_all()
            logger.info("Stopping: each trial saves after its current step. Ctrl-C again stops at once.")

        # On the driver's node: a trial is the driver of its run, and must survive the loss of a worker's node.
        here = tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001}])
        with _tune_settings(), StopSignals(request_stop):
            tune.Tuner(
                tune.with_resources(tune.with_parameters(TrainingTrial, runs=runs), here),
                param_space={"name": tune.grid_search(list(runs)), "stop_requests": scratch},
                tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=at_once),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[Recorder(store, stop_requests, config.keep_gigabytes)],
                    stop=_StopWhenRequested(stop_requests, store, lost),
                    # The run of a trial saves its checkpoints.
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            ).fit()


class _StopWhenRequested(tune.Stopper):
    """Ends Tune's loop once all trials were asked to stop and none is running.

    All are asked to stop when another driver has taken the sweep over.
    """

    def __init__(self, stop_requests: StopRequests, store: TrialStore, lost: threading.Event) -> None:
        self._stop_requests, self._store, self._lost = stop_requests, store, lost

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its state to a file, which nothing reads, and cannot write an event

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._lost.is_set() and not self._stop_requests.all:
            self._stop_requests.add_all()
        return self._stop_requests.all and not self._store.running


@contextmanager
def _tune_settings() -> Iterator[None]:
    """Turn off Tune's handling of Ctrl-C, and its log files and output, which duplicate those of the sweep."""
    settings = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # kills trials that take more than seconds to save
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # prints the location of the files of those loggers
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # advises to restore by Tune, which the sweep does itself
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def conclude(base: TrainConfig, store: TrialStore, mlflow_run: TrackedRun) -> TrialRecord:
    """Record the results of the sweep in its folder and in MLflow; return the best trial.

    Raises:
        RunFailedError: no trial has a result.
    """
    best = report.ranking(store.records)[0]
    if best.status == "failed" or math.isnan(best.last[1]):
        cause = best.cause or "it reported no quick PQ"
        mlflow_run.close("FAILED", {"cause": cause[:5000]}, store.folder)
        raise RunFailedError(
            f"No trial of the sweep {base.run.name} has a result. {best.name}: {cause.rstrip('.')}. Correct the cause "
            f"and repeat the command: failed trials are tried again."
        )
    if report.tied(store.records):
        logger.warning(
            "All trials end with the same quick PQ of %.1f, so none is the best. Train longer (--run.steps).",
            100 * best.last[1],
        )
    config = with_overrides(base, best.values)
    config = replace(config, run=replace(config.run, name=""))  # a training with this configuration gets its own name
    files = {
        "best.json": json.dumps(to_dict(config), indent=1).encode(),
        "trials.csv": report.csv(store.records).encode(),
        "importance.txt": report.importance_text(store.records).encode(),
    }
    for file, content in files.items():
        (store.folder / file).write_bytes(content)
    mlflow_run.log_files(files)
    tags = {"best": best.name, **{name: str(value) for name, value in best.values.items()}}
    mlflow_run.close("FINISHED", tags, store.folder)
    return best
