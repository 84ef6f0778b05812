"""fit(): train from a configuration to the last step, starting or resuming a run.

A run is a sequence of attempts. Each is a Ray Train run of its own that is not repeated by Ray: the driver decides
whether and with how many workers to go on, and knows why the attempt before ended.
"""

import json
import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maskformer.untrusted import parse_json
from pipelines.checkpoints.state import check_files, load, newest, step_folder, steps_saved
from pipelines.cluster.session import session
from pipelines.config.train import TrainConfig
from pipelines.errors import RunFailedError, StorageUnavailableError, UserError
from pipelines.storage import patience, set_patience
from pipelines.tracking import tensorboard
from pipelines.tracking.runs import TrackedRun
from pipelines.training import goodput, ledger, preflight
from pipelines.training.coordinator import RunCoordinator
from pipelines.training.elastic import WorkerCount
from pipelines.training.ledger import Ledger
from pipelines.training.lock import locked
from pipelines.training.monitor import START_TIMEOUT, Ended, Monitor, StopSignals, TrainCallbacks, given_up
from pipelines.training.preflight import PreparedRun, prepare_run
from pipelines.training.worker import Job

logger = logging.getLogger(__name__)

_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon Ray notices a lost worker
    START_TIMEOUT: "120",  # then the driver says that it waits, and tries again
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver looks for nodes that leave, and more often
}
"""Settings of Ray Train, which reads them from the environment of the driver."""

_CLOSING_SECONDS = 60.0
"""Seconds that the end of a run waits for a storage that does not answer."""

_WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest that it accepts
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
"""Settings of glibc's allocator. Ray Train trains in a thread, whose freed memory it would return to the system in each
step; that memory must then be cleared again, which took 7 % of a step of R50 on a CPU."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    status: str
    """`finished`, or `stopped` by Ctrl-C with its state saved."""
    name: str
    folder: str
    step: int
    checkpoint: str
    mlflow_run: TrackedRun

    @property
    def tracking_uri(self) -> str:
        return self.mlflow_run.uri

    @property
    def mlflow_run_id(self) -> str:
        return self.mlflow_run.run_id


def fit(config: TrainConfig | PreparedRun, callbacks: TrainCallbacks | None = None) -> TrainResult:
    """Train until the last step, starting a run or resuming the one of the same name in the same storage.

    Blocks; workers that die are restarted inside.

    Args:
        config: what to train, or a run that `prepare_run` has checked already.

    Raises:
        UserError: the configuration, the data or the environment make the run impossible; nothing was started.
        RunFailedError: the run was started and failed; its cause is in the message and in the ledger.
        StorageUnavailableError: the storage does not answer.
    """
    run = config if isinstance(config, PreparedRun) else prepare_run(config)
    config, steps = run.config, run.total_steps
    preflight.check_weights(run)
    earlier = preflight.earlier_record(run)
    logger.info(
        "Run %s: %d steps of %s; %d images, %d left out without a thing.",
        config.run.name, steps, config.batch_split, len(run.train), run.train.num_left_out,
    )  # fmt: skip
    if earlier and (done := _finished_at(run)) is not None:
        logger.info("Run %s is finished; another --run.name starts a new one.", config.run.name)
        mlflow_run = TrackedRun(config.tracking.uri, earlier["mlflow_run_id"])
        mlflow_run.settle(run.folder)
        if config.tracking.tensorboard:
            tensorboard.complete(mlflow_run, run.folder)
        return _result("finished", run, done, mlflow_run)
    if run.packs.val is None and config.evaluation.every:
        ineffective = " and --run.patience has no effect" if config.run.patience else ""
        logger.warning(
            "There is no validation data (--data.val): no quick PQ is computed, no checkpoint is the best%s.",
            ineffective,
        )
    preflight.check_locations(config)
    with session():
        preflight.check_cluster(config)
        with locked(run.folder, "run") as lost:
            earlier = preflight.earlier_record(run)  # once more: while this driver waited, another one may have begun
            set_patience(config.scaling.storage_patience)
            mlflow_run = _tracked(run, earlier)
            record = {**run.record, "mlflow_run_id": mlflow_run.run_id}
            (run.folder / "config.json").write_text(json.dumps(record, indent=1))
            return _train(run, mlflow_run, callbacks or TrainCallbacks(), lost)


def _finished_at(run: PreparedRun) -> int | None:
    """Return the last step of a run that has nothing left to do; None if it has."""
    steps, allowed = run.total_steps, run.config.run.patience
    end = ledger.read(run.folder)[-1:]
    if not end or end[0].get("status") != "finished":
        return None  # also after the last step: a driver that was lost then has left MLflow and ledger open
    if steps_saved(run.folder)[-1:] == [steps]:
        last = newest(run.folder, load)
        return steps if last and last.step == steps else None
    if end[0].get("early") and 0 < allowed <= end[0]["early"]:
        return end[0]["step"]
    return None


def _tracked(run: PreparedRun, earlier: dict[str, Any] | None) -> TrackedRun:
    """Return the MLflow run of a training run, and mark it as running."""
    tracking = run.config.tracking
    if earlier and earlier["config"]["tracking"]["uri"] == tracking.uri:
        mlflow_run = TrackedRun(tracking.uri, earlier["mlflow_run_id"])  # MLflow may be away now
    else:
        mlflow_run = TrackedRun.open(
            tracking.uri,
            tracking.experiment,
            run.config.run.name,
            str(run.folder),
            run.record["config"],
            tracking.parent,
        )
    mlflow_run.settle(run.folder)
    mlflow_run.set_status("RUNNING")
    return mlflow_run


def _train(run: PreparedRun, mlflow_run: TrackedRun, callbacks: TrainCallbacks, lost: threading.Event) -> TrainResult:
    """Train to the end of the run.

    Args:
        lost: set when another driver has taken the run over.
    """
    config = run.config
    # On the driver's node, so that the loss of another node does not end it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    coordinator = RunCoordinator.options(scheduling_strategy=here).remote()
    run_ledger = Ledger(run.folder, lost)
    worker_count = WorkerCount(config)
    monitor = Monitor(run.folder, config, coordinator, run_ledger, callbacks, worker_count, lost)
    try:
        if not run_ledger.ended:
            run_ledger.add("failure", **_lost_driver(run))
        if (manifest := newest(run.folder, check_files)) is not None:
            logger.info("The newest checkpoint is of step %d.", manifest["step"])
        with StopSignals(monitor.signaled.set):
            ended = _attempts(run, mlflow_run, coordinator, run_ledger, monitor, worker_count)
    except BaseException as error:
        if lost.is_set():
            raise _taken_over(run) from error
        by_user = isinstance(error, KeyboardInterrupt)
        cause = type(error).__name__ if by_user else f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        with patience(0 if by_user else _CLOSING_SECONDS):
            if not run_ledger.ended:
                kind = "user" if by_user else "driver"
                run_ledger.add("end", status="interrupted", cause=cause, step=None, cause_class=kind)
            mlflow_run.close("KILLED", {"cause": cause}, run.folder)
        raise
    finally:
        monitor.close()
    if lost.is_set():
        raise _taken_over(run)
    with patience(_CLOSING_SECONDS):
        return _close(run, mlflow_run, run_ledger, ended)


def _taken_over(run: PreparedRun) -> RunFailedError:
    return RunFailedError(f"Run {run.config.run.name} belongs to another driver now. This one has stopped.")


def _close(run: PreparedRun, mlflow_run: TrackedRun, run_ledger: Ledger, ended: Ended) -> TrainResult:
    """Tell the user and MLflow how the run ended.

    Raises:
        RunFailedError: it failed.
    """
    config = run.config
    accounts = goodput.account(run_ledger.events)
    logger.info("%s", goodput.summary(accounts))
    mlflow_run.log_metrics(ended.step or 0, goodput.metrics(accounts), run.folder)
    result = _result(ended.status, run, ended.step or 0, mlflow_run)
    if ended.status == "failed":
        mlflow_run.close("FAILED", {"cause": ended.cause[:5000]}, run.folder)
    else:
        mlflow_status = "FINISHED" if ended.status == "finished" else "KILLED"
        mlflow_run.close(mlflow_status, {"checkpoint": result.checkpoint, "status": ended.status}, run.folder)
    if config.tracking.tensorboard:
        tensorboard.complete(mlflow_run, run.folder)
    if ended.status == "failed":
        raise RunFailedError(
            f"Run {config.run.name} failed: {ended.cause}. Its ledger is {run.folder}/ledger.jsonl; the same command "
            f"resumes from the newest checkpoint."
        )
    return result


def _attempts(
    run: PreparedRun,
    mlflow_run: TrackedRun,
    coordinator: Any,
    run_ledger: Ledger,
    monitor: Monitor,
    worker_count: WorkerCount,
) -> Ended:
    """Make attempts until the run ends; return how the last one ended."""
    first_event = len(run_ledger.events)
    waited_for_start = False
    while True:
        began = round(time.time(), 3)
        workers = worker_count.choose(monitor.wait)
        attempt = run_ledger.attempts + 1
        job = Job(
            run=replace(run, config=run.config.with_workers(workers)),
            mlflow_run=mlflow_run,
            coordinator=coordinator,
            attempt=attempt,
            reached=run_ledger.reached,
            non_finite_steps=run_ledger.non_finite_steps,
        )
        with tempfile.TemporaryDirectory(prefix="maskformer-ray-", ignore_cleanup_errors=True) as scratch:
            ended = monitor.follow(attempt, began, _trainer(job, scratch).fit)
        facts = {"attempt": attempt, "step": ended.step, "cause": ended.cause, "cause_class": ended.kind, **ended.facts}
        if ended.status in ("finished", "stopped"):
            early = {"early": run.config.run.patience} if ended.early else {}
            run_ledger.add("end", status=ended.status, **facts, **early)
            if ended.early:
                logger.info("The quick PQ has not risen for %d times; the run ends early.", run.config.run.patience)
            return ended
        if ended.status in ("drained", "resized"):
            run_ledger.add("restart", **{**facts, "cause": ended.status})
            continue
        if ended.kind == "start" and not run_ledger.open:
            logger.warning("Ray could not start %d workers yet, and tries again. %s", workers, ended.cause)
            if not waited_for_start:  # one line in the ledger, however long it takes
                run_ledger.add("failure", **facts, began=began)
            waited_for_start = True
            monitor.wait()
            continue
        waited_for_start = False
        logger.warning("An attempt ended at step %s: %s", "?" if ended.step is None else ended.step, ended.cause)
        run_ledger.add("failure", **facts, **({} if run_ledger.open else {"began": began}))
        cause = given_up(run_ledger.events[first_event:], run.config.scaling.max_failures)
        if ended.final or cause is not None:
            run_ledger.add("end", status="failed", cause=cause or ended.cause, cause_class=ended.kind, step=ended.step)
            return replace(ended, cause=cause or ended.cause)


def _trainer(job: Job, scratch: str) -> TorchTrainer:
    """Return the Ray Train run of an attempt.

    Args:
        scratch: a folder on this node for Ray Train's own state, which nothing reads: checkpoints are ours.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    config = job.run.config

    # A function within a function, and a reference: Ray Train's controller, a process of its own that starts before the
    # workers, would import the modules of what it is given, which takes seconds.
    def start(config: dict[str, Any]) -> dict[str, Any]:
        from pipelines.training.worker import train_loop

        return train_loop(ray.get(config["job"]))

    return TorchTrainer(
        start,
        train_loop_config={"job": ray.put(job)},
        # Ranks wait in a collective while another one waits for the storage.
        torch_config=TorchConfig(timeout_s=int(config.scaling.collective_timeout + config.scaling.storage_patience)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.max_workers,
            use_gpu=config.scaling.device == "cuda",
            resources_per_worker=config.scaling.per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {k: os.environ.get(k, v) for k, v in _WORKER_ENVIRONMENT.items()}},
        ),
    )


def _lost_driver(run: PreparedRun) -> dict[str, Any]:
    """Return what is known of an attempt whose driver was lost."""
    facts: dict[str, Any] = {"cause": "the driver was lost", "cause_class": "driver", "step": None}
    try:
        file = run.folder / "status.json"
        status = parse_json(file.read_bytes()) if file.exists() else {}
        known = ("attempt", "until", "split", "checkpoint", "step")  # some seconds old: at least so far
        return {**facts, **{key: status[key] for key in known if status.get(key) is not None}}
    except (UserError, StorageUnavailableError, OSError, ValueError, AttributeError) as error:
        logger.debug("The last status cannot be read. %s", error)
        return facts


def _result(status: str, run: PreparedRun, step: int, mlflow_run: TrackedRun) -> TrainResult:
    return TrainResult(
        status=status,
        name=run.config.run.name,
        folder=str(run.folder),
        step=step,
        checkpoint=str(step_folder(run.folder, step)),
        mlflow_run=mlflow_run,
    )
