"""TrainConfig -> TorchTrainer -> TrainResult: starts a run or continues it, once nothing stands in its way."""

import json
import logging
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maskformer import Taxonomy, build_model
from pipelines import checkpoint, cluster, pretrained, tracking
from pipelines.config import TrainConfig, resolve, to_dict
from pipelines.data.manifest import MANIFEST_FILE, PackedSet, open_pack
from pipelines.data.order import total_steps
from pipelines.errors import RunFailed, UserError
from pipelines.leaves import differing_leaves
from pipelines.storage import Location, locate
from pipelines.training import ledger, watch
from pipelines.training.control import Control
from pipelines.training.worker import surroundings, train_loop

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
    tracking_uri: str
    mlflow_run_id: str


def check(config: TrainConfig) -> tuple[TrainConfig, PackedSet, int]:
    """Look, without starting anything, whether a run is possible; return it resolved, its data and its steps.

    Raises:
        UserError: the configuration, the data or the surroundings make it impossible.
    """
    config = resolve(config)
    _require_device(config)
    samples = open_pack(config.data.train, config.data.require_thing)
    _check_classes(config, samples)
    tracking.check(config.tracking.uri)
    steps = config.run.steps or total_steps(config.run.epochs, len(samples), config.run.global_batch)
    return config, samples, steps


def fit(config: TrainConfig, listener: watch.Listener | None = None) -> TrainResult:
    """Train until the last step, starting a run or continuing the one of the same name in the same storage.

    Blocks; workers that die are started again inside.

    Raises:
        UserError: the configuration, the data or the surroundings make the run impossible; nothing was started.
        RunFailed: the run was started and failed; its cause is in the message and in the ledger.
    """
    config, samples, steps = check(config)
    run = locate(config.run.storage) / config.run.name
    check_weights(config, run, samples.taxonomy)
    record = {"config": to_dict(config), "data_hash": samples.data_hash, "total_steps": steps}
    earlier = _earlier_record(run, record)
    logger.info(
        "Run %s: %d steps of %s; %d images, %d left out without a thing.",
        config.run.name, steps, config.plan, len(samples), samples.num_left_out,
    )  # fmt: skip
    done = checkpoint.newest(run) if checkpoint.steps_saved(run)[-1:] == [steps] else None
    if earlier and done and done.step == steps:
        logger.info("Run %s is finished; another --run.name starts a new one.", config.run.name)
        return _result("finished", config, run, steps, earlier["mlflow_run_id"])
    check_places(config)
    with cluster.session():
        check_cluster(config)
        mlflow_run_id = tracking.open_run(
            config.tracking.uri,
            config.tracking.experiment,
            config.run.name,
            str(run),
            record["config"],
            config.tracking.parent,
        )
        tracking.set_status(config.tracking.uri, mlflow_run_id, "RUNNING")
        (run / "config.json").write_text(json.dumps({**record, "mlflow_run_id": mlflow_run_id}, indent=1))
        return _train(config, run, steps, mlflow_run_id, listener or watch.Listener())


def _train(config: TrainConfig, run: Location, steps: int, mlflow_run_id: str, listener: watch.Listener) -> TrainResult:
    # Beside the driver: it must not go down with another node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    control = Control.options(scheduling_strategy=here).remote()
    book = ledger.Ledger(run)
    if book.open:
        book.add("failure", cause="the driver was lost", step=None)
    _compare_surroundings(run, config)
    # Ray keeps a list of checkpoints of its own and refuses to start if one of them is gone. Ours is the truth.
    (run / "checkpoint_manager_snapshot.json").delete()
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "config": to_dict(config),
            "run": str(run),
            "total_steps": steps,
            "mlflow_run_id": mlflow_run_id,
            "control": control,
        },
        torch_config=TorchConfig(timeout_s=int(config.scaling.collective_timeout)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.workers,
            use_gpu=config.scaling.device == "cuda",
            resources_per_worker=per_worker(config),
        ),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=locate(config.run.storage).path,
            storage_filesystem=run.filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=config.scaling.max_failures, controller_failure_limit=5
            ),
            callbacks=[watch.FailureReporter(control)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # it announces every report
        ),
    )
    try:
        outcome, cause = watch.follow(trainer.fit, control, book, listener)
    except BaseException as error:
        if book.open:
            book.add("end", status="broken off", cause=type(error).__name__, step=None)
        tracking.close_run(config.tracking.uri, mlflow_run_id, "KILLED", {"cause": type(error).__name__})
        raise
    if outcome is None:
        tracking.close_run(config.tracking.uri, mlflow_run_id, "FAILED", {"cause": cause[:5000]})
        raise RunFailed(
            f"Run {config.run.name} failed: {cause}. Its ledger is {run}/ledger.jsonl; the same command goes on "
            f"from the newest checkpoint."
        )
    status, step = outcome["status"], outcome["step"]
    mlflow_status = "FINISHED" if status == "finished" else "KILLED"
    place = str(checkpoint.folder(run, step))
    tracking.close_run(config.tracking.uri, mlflow_run_id, mlflow_status, {"checkpoint": place, "status": status})
    return _result(status, config, run, step, mlflow_run_id)


def _earlier_record(run: Location, record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the config.json of the run that stands in the folder, None if there is none.

    Raises:
        UserError: it is another run, or the folder holds something else.
    """
    place = run / "config.json"
    if not place.exists():
        foreign = run.names()
        if foreign:
            raise UserError(
                f"{run} is not the folder of a run: it has {', '.join(foreign[:5])} but no config.json. "
                f"Choose another --run.name or --run.storage."
            )
        return None
    try:
        earlier = json.loads(place.read_text())
        changes = differing_leaves(earlier["config"], record["config"])
        changes += [
            f"{what}: {earlier[key]} -> {record[key]}"
            for key, what in (("data_hash", "the data in data.train"), ("total_steps", "the number of steps"))
            if earlier[key] != record[key]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place} is not the config.json of a run ({type(error).__name__}: {error}). Put the right one back, or "
            f"choose another --run.name."
        ) from error
    if changes:
        raise UserError(
            f"{run} is a run with another configuration: {'; '.join(changes)}. "
            f"Start a new run with another --run.name, or go on with the configuration it has."
        )
    return earlier


def _check_classes(config: TrainConfig, samples: PackedSet) -> None:
    found, expected = samples.taxonomy.num_classes, config.model.num_classes
    if found != expected:
        raise UserError(
            f"{samples.uri} has {found} classes, the model {expected}. Use --model.num-classes {found} for this data."
        )
    if config.data.val and open_pack(config.data.val).taxonomy != samples.taxonomy:
        raise UserError(
            f"{config.data.val} has other categories than {samples.uri}. Pack both splits of the same data set."
        )


def check_places(config: TrainConfig) -> None:
    """Find out now, rather than at the first checkpoint, whether the storage can be written and will last.

    Raises:
        UserError: it cannot, or will not.
    """
    cluster.require_lasting({"--run.storage": config.run.storage, "--tracking.uri": config.tracking.uri})
    probe = locate(config.run.storage) / ".writable"
    probe.write_bytes(b"")
    probe.delete()


def check_weights(config: TrainConfig, run: Location, taxonomy: Taxonomy) -> None:
    """Find out now whether the workers of a new run will be able to load its first weights.

    Raises:
        UserError: they will not.
    """
    if config.weights != "none" and not checkpoint.steps_saved(run):
        logger.info("%s", pretrained.start(build_model(config.model), config.weights, taxonomy))


def _require_device(config: TrainConfig) -> None:
    elsewhere = cluster.is_remote() or ray.is_initialized()  # then the cluster itself is asked
    if config.scaling.device == "cuda" and not torch.cuda.is_available() and not elsewhere:
        raise UserError(
            f"The recipe {config.recipe} trains on {config.scaling.workers} GPUs and this machine has none. Set "
            f"RAY_ADDRESS to a cluster that has them, or run it here, slowly, with: --scaling.device cpu "
            f"--scaling.workers 1 --scaling.cpus-per-worker 1 --scaling.data-cpus 1"
        )


def per_worker(config: TrainConfig) -> dict[str, float]:
    """Return what each worker takes from the cluster, as Ray names it."""
    gpu = {"GPU": 1.0} if config.scaling.device == "cuda" else {}
    return {"CPU": config.scaling.cpus_per_worker, **gpu}


def resources(config: TrainConfig) -> dict[str, float]:
    """Return what a run takes from the cluster, as Ray names it: its workers and its data tasks."""
    workers = {kind: amount * config.scaling.workers for kind, amount in per_worker(config).items()}
    return {**workers, "CPU": config.scaling.cpus}


def check_cluster(config: TrainConfig) -> None:
    """Refuse a run that the cluster can never hold, or whose places not all of its nodes see.

    Raises:
        UserError: with what is needed and what there is.
    """
    scaling = config.scaling
    cluster.require(
        resources(config),
        f"{scaling.workers} workers take {scaling.cpus_per_worker:g} CPU each, the data tasks {scaling.data_cpus:g}. "
        f"Lower --scaling.workers, --scaling.cpus-per-worker or --scaling.data-cpus (fractions are allowed), "
        f"or use a larger cluster.",
    )
    packs = {"--data.train": config.data.train, "--data.val": config.data.val}
    files = {flag: f"{uri}/{MANIFEST_FILE}" for flag, uri in packs.items() if uri}
    if config.tracking.uri.startswith("sqlite:///"):
        files["--tracking.uri"] = config.tracking.uri.removeprefix("sqlite:///")
    cluster.require_shared(config.run.storage, files)


def _compare_surroundings(run: Location, config: TrainConfig) -> None:
    state = checkpoint.newest(run)
    if state is None:
        return
    now = surroundings(config)
    changed = [
        f"{key} {state.surroundings.get(key)} -> {now[key]}" for key in now if state.surroundings.get(key) != now[key]
    ]
    logger.info("Continuing from step %d.", state.step)
    if changed:
        logger.warning(
            "The order of samples stays exact, but the numbers will not be bit for bit an uninterrupted run's: %s.",
            ", ".join(changed),
        )


def _result(status: str, config: TrainConfig, run: Location, step: int, mlflow_run_id: str) -> TrainResult:
    return TrainResult(
        status=status,
        name=config.run.name,
        folder=str(run),
        step=step,
        checkpoint=str(checkpoint.folder(run, step)),
        tracking_uri=config.tracking.uri,
        mlflow_run_id=mlflow_run_id,
    )
