"""fit(): train from a configuration to the last step, starting or resuming a run."""

import json
import logging
from dataclasses import dataclass

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.checkpoints.state import load, newest, step_folder, steps_saved
from pipelines.cluster.session import session
from pipelines.config.train import TrainConfig
from pipelines.errors import RunFailedError
from pipelines.storage import locate
from pipelines.tracking.runs import TrackedRun
from pipelines.training import preflight
from pipelines.training.coordinator import RunCoordinator
from pipelines.training.ledger import Ledger
from pipelines.training.monitor import FailureReporter, TrainCallbacks, follow
from pipelines.training.preflight import PreparedRun, prepare_run
from pipelines.training.worker import train_loop

logger = logging.getLogger(__name__)


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
    """
    run = config if isinstance(config, PreparedRun) else prepare_run(config)
    config, steps = run.config, run.total_steps
    preflight.check_weights(run)
    earlier = preflight.earlier_record(run)
    logger.info(
        "Run %s: %d steps of %s; %d images, %d left out without a thing.",
        config.run.name, steps, config.batch_split, len(run.train), run.train.num_left_out,
    )  # fmt: skip
    last = newest(run.folder, load) if steps_saved(run.folder)[-1:] == [steps] else None
    if earlier and last and last.step == steps:
        logger.info("Run %s is finished; another --run.name starts a new one.", config.run.name)
        return _result("finished", run, steps, TrackedRun(config.tracking.uri, earlier["mlflow_run_id"]))
    preflight.check_locations(config)
    with session():
        preflight.check_cluster(config)
        mlflow_run = TrackedRun.open(
            config.tracking.uri,
            config.tracking.experiment,
            config.run.name,
            str(run.folder),
            run.record["config"],
            config.tracking.parent,
        )
        mlflow_run.set_status("RUNNING")
        record = {**run.record, "mlflow_run_id": mlflow_run.run_id}
        (run.folder / "config.json").write_text(json.dumps(record, indent=1))
        return _train(run, mlflow_run, callbacks or TrainCallbacks())


def _train(run: PreparedRun, mlflow_run: TrackedRun, callbacks: TrainCallbacks) -> TrainResult:
    config = run.config
    # On the driver's node, so that the loss of another node does not end it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    coordinator = RunCoordinator.options(scheduling_strategy=here).remote()
    ledger = Ledger(run.folder)
    if ledger.open:
        ledger.add("failure", cause="the driver was lost", step=None)
    preflight.compare_environment(run)
    # Ray keeps a list of checkpoints of its own and refuses to start if one of them is gone. Only our manifests count.
    (run.folder / "checkpoint_manager_snapshot.json").delete()
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"run": run, "mlflow_run": mlflow_run, "coordinator": coordinator},
        torch_config=TorchConfig(timeout_s=int(config.scaling.collective_timeout)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.workers,
            use_gpu=config.scaling.device == "cuda",
            resources_per_worker=config.scaling.per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=locate(config.run.storage).path,
            storage_filesystem=run.folder.filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=config.scaling.max_failures, controller_failure_limit=5
            ),
            callbacks=[FailureReporter(coordinator)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # it announces every report
        ),
    )
    try:
        outcome, cause = follow(trainer.fit, coordinator, ledger, callbacks)
    except BaseException as error:
        if ledger.open:
            ledger.add("end", status="interrupted", cause=type(error).__name__, step=None)
        mlflow_run.close("KILLED", {"cause": type(error).__name__})
        raise
    if outcome is None:
        mlflow_run.close("FAILED", {"cause": cause[:5000]})
        raise RunFailedError(
            f"Run {config.run.name} failed: {cause}. Its ledger is {run.folder}/ledger.jsonl; the same command resumes "
            f"from the newest checkpoint."
        )
    status, step = outcome["status"], outcome["step"]
    result = _result(status, run, step, mlflow_run)
    mlflow_status = "FINISHED" if status == "finished" else "KILLED"
    mlflow_run.close(mlflow_status, {"checkpoint": result.checkpoint, "status": status})
    return result


def _result(status: str, run: PreparedRun, step: int, mlflow_run: TrackedRun) -> TrainResult:
    return TrainResult(
        status=status,
        name=run.config.run.name,
        folder=str(run.folder),
        step=step,
        checkpoint=str(step_folder(run.folder, step)),
        mlflow_run=mlflow_run,
    )
