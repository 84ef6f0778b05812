"""TrainConfig -> TorchTrainer -> TrainResult: starts or continues a run, watches it, and accounts for it."""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from maskformer import build_model
from maskformer.weights.imagenet import load_backbone
from pipelines import checkpoint, cluster, tracking
from pipelines.config import TrainConfig, differing_leaves, resolve, to_dict
from pipelines.data.order import total_steps
from pipelines.data.stream import PackedSet, open_pack
from pipelines.errors import RunFailed, UserError
from pipelines.storage import Location, locate
from pipelines.training import ledger
from pipelines.training.control import Control
from pipelines.training.worker import surroundings, train_loop

logger = logging.getLogger(__name__)


_SAME_FAILURES = 3
"""A failure that repeats itself this often at one step is taken for one that will not go away."""


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


def fit(config: TrainConfig) -> TrainResult:
    """Train until the last step, starting a run or continuing the one of the same name in the same storage.

    Blocks; workers that die are started again inside.

    Raises:
        UserError: the configuration, the data or the surroundings make the run impossible; nothing was started.
        RunFailed: the run was started and failed; its cause is in the message and in the ledger.
    """
    config = resolve(config)
    _require_device(config)
    samples = open_pack(config.data.train, config.data.require_thing)
    _check_classes(config, samples)
    tracking.check(config.tracking.uri)
    steps = config.run.steps or total_steps(config.run.epochs, len(samples), config.run.global_batch)
    run = locate(config.run.storage) / config.run.name
    _check_weights(config, run)
    record = _record(run, config, samples, steps)
    logger.info(
        "Run %s: %d steps of %s; %d images, %d left out without a thing.",
        config.run.name, steps, config.plan, len(samples), samples.num_left_out,
    )  # fmt: skip
    if checkpoint.steps_saved(run)[-1:] == [steps] and checkpoint.newest(run) is not None:
        logger.info("Run %s is finished; another --run.name starts a new one.", config.run.name)
        return _result("finished", config, run, steps, record["mlflow_run_id"])
    with cluster.session():
        _require_cluster(config)
        return _train(config, run, steps, record["mlflow_run_id"])


def _train(config: TrainConfig, run: Location, steps: int, mlflow_run_id: str) -> TrainResult:
    control = Control.remote()
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
            resources_per_worker=_per_worker(config),
        ),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=locate(config.run.storage).path,
            storage_filesystem=run.filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=config.scaling.max_failures, controller_failure_limit=5
            ),
            callbacks=[_FailureReporter(control)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # it announces every report
        ),
    )
    with _Interrupts() as interrupts:
        outcome, cause = _watch(_in_thread(trainer.fit), interrupts, control, book)
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


def _watch(
    future: Future[ray.train.Result], interrupts: "_Interrupts", control: Any, book: ledger.Ledger
) -> tuple[dict[str, Any] | None, str]:
    """Follow the run until it ends; return the workers' outcome, or None and the cause of the failure."""
    stopping, last_step, finished = False, 0, False
    while not finished:
        # Looked at before the events are fetched, so that none is left behind.
        finished = bool(wait([future], timeout=1).done)
        if interrupts.count > 1 or (interrupts.count and not book.open):  # impatient, or nothing to save yet
            raise KeyboardInterrupt
        if interrupts.count and not stopping:
            stopping = True
            ray.get(control.request_stop.remote())
            logger.info("Stopping: the state is saved after the current step. Ctrl-C again stops at once.")
        events, progress = ray.get(control.drain.remote())
        for event in events:
            _account(event, progress, book)
            if hopeless := _hopeless(book):
                ray.get(control.declare_fatal.remote(hopeless))
        if progress and progress["step"] != last_step:
            last_step = progress["step"]
            logger.info(
                "step %d/%d  loss %.4f  %.3g images/s  waiting for data %.0f %%  %s to go",
                last_step, progress["total"], progress["loss"], progress["images_per_second"],
                100 * progress["data_wait_share"], _duration(progress["eta_seconds"]),
            )  # fmt: skip
    try:
        result = future.result()
    except ray.train.TrainingFailedError as error:
        failures = [event["cause"] for event in book.events if event["event"] == "failure"]
        cause = failures[-1] if failures else str(error)
        book.add("end", status="failed", cause=cause, step=last_step)
        return None, cause
    outcome: dict[str, Any] = result.return_value or {"status": "failed", "cause": "the workers returned nothing"}
    if outcome["status"] == "failed":
        book.add("end", status="failed", cause=outcome["cause"], step=last_step)
        return None, outcome["cause"]
    book.add("end", status=outcome["status"], step=outcome["step"])
    return outcome, ""


def _account(event: dict[str, Any], progress: dict[str, Any], book: ledger.Ledger) -> None:
    kind = event.pop("event")
    if kind == "quick PQ":
        logger.info("step %d  quick PQ %.1f  (things %.1f, stuff %.1f)", event["step"], *(
            100 * event[f"quick_pq/{part}"] for part in ("all", "things", "stuff")
        ))  # fmt: skip
        return
    if kind == "failure":
        event["step"] = progress.get("step")
        logger.warning("An attempt ended at step %s: %s", event["step"], event["cause"])
    elif kind == "start" and book.attempts:
        lost = max(0, (book.events[-1].get("step") or event["step"]) - event["step"])
        logger.info("Resumed at step %d; about %d steps are done again.", event["step"], lost)
        event["lost_steps"] = lost
    book.add(kind, attempt=book.attempts + (kind == "start"), **event)


def _hopeless(book: ledger.Ledger) -> str | None:
    """Return the cause if the last attempts all ended by it at the same step: another one would only cost time."""
    failures = [event for event in book.events if event["event"] == "failure"][-_SAME_FAILURES:]
    same = len({(event["cause"], event["step"]) for event in failures}) == 1
    return f"{failures[0]['cause']} ({_SAME_FAILURES} times)" if same and len(failures) == _SAME_FAILURES else None


class _FailureReporter(ray.train.UserCallback):
    """Runs in Ray's controller and tells the driver why an attempt ended."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ray.get(self._control.add_event.remote("failure", cause=ledger.cause(dict(worker_exceptions))))


def _record(run: Location, config: TrainConfig, samples: PackedSet, steps: int) -> dict[str, Any]:
    """Write the run's config.json, or check that it is this run's; return it."""
    place = run / "config.json"
    new = {
        "config": to_dict(config),
        "data_hash": samples.data_hash,
        "total_steps": steps,
    }
    if place.exists():
        record = json.loads(place.read_text())
        changes = differing_leaves(record["config"], new["config"])
        changes += [
            f"{what}: {record[key]} -> {new[key]}"
            for key, what in (("data_hash", "the data in data.train"), ("total_steps", "the number of steps"))
            if record[key] != new[key]
        ]
        if changes:
            raise UserError(
                f"{run} is a run with another configuration: {'; '.join(changes)}. "
                f"Start a new run with another --run.name, or go on with the configuration it has."
            )
        tracking.open_run(config.tracking.uri, config.tracking.experiment, config.run.name, str(run), new["config"])
        return record
    foreign = [name for name in run.names() if name != "samples.jsonl"]
    if foreign:
        raise UserError(
            f"{run} is not the folder of a run: it has {', '.join(foreign[:5])} but no config.json. "
            f"Choose another --run.name or --run.storage."
        )
    run_id = tracking.open_run(
        config.tracking.uri, config.tracking.experiment, config.run.name, str(run), new["config"]
    )
    record = {**new, "mlflow_run_id": run_id}
    place.write_text(json.dumps(record, indent=1))
    return record


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


def _check_weights(config: TrainConfig, run: Location) -> None:
    """Find out now whether the workers of a new run will be able to load its first weights."""
    if config.weights == "none" or checkpoint.steps_saved(run):
        return
    try:
        load_backbone(build_model(config.model), config.weights)
    except ValueError as error:
        raise UserError(str(error)) from error


def _require_device(config: TrainConfig) -> None:
    if config.scaling.device == "cuda" and not torch.cuda.is_available() and not cluster.is_remote():
        raise UserError(
            f"The recipe {config.recipe} trains on {config.scaling.workers} GPUs and this machine has none. Set "
            f"RAY_ADDRESS to a cluster that has them, or run it here, slowly, with: --scaling.device cpu "
            f"--scaling.workers 1 --scaling.cpus-per-worker 1 --scaling.data-cpus 1"
        )


def _per_worker(config: TrainConfig) -> dict[str, float]:
    gpu = {"GPU": 1.0} if config.scaling.device == "cuda" else {}
    return {"CPU": config.scaling.cpus_per_worker, **gpu}


def _require_cluster(config: TrainConfig) -> None:
    scaling = config.scaling
    needed = {kind: amount * scaling.workers for kind, amount in _per_worker(config).items()}
    needed["CPU"] += scaling.data_cpus
    cluster.require(
        needed,
        f"{scaling.workers} workers take {scaling.cpus_per_worker:g} CPU each, the data tasks {scaling.data_cpus:g}. "
        f"Lower --scaling.workers, --scaling.cpus-per-worker or --scaling.data-cpus (fractions are allowed), "
        f"or use a larger cluster.",
    )


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


class _Interrupts:
    """Counts Ctrl-C and SIGTERM, which `ray job stop` and schedulers send, so that neither cuts a run off half-way.

    Outside the main thread, where Python allows no handlers, it counts nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Interrupts":
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._before[kind] = signal.signal(kind, self._add)
        return self

    def __exit__(self, *exception: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _add(self, signum: int, frame: Any) -> None:
        self.count += 1


def _in_thread(function: Callable[[], ray.train.Result]) -> Future[ray.train.Result]:
    """Run `function` in a thread that does not outlive an interrupted driver."""
    future: Future[ray.train.Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            future.set_exception(error)

    threading.Thread(target=work, name="trainer", daemon=True).start()
    return future


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


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
