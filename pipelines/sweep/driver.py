"""A sweep: trials of one configuration with some leaves varied, the worse ones ended early.

The truth about a sweep is its own folder, as a run's is: `sweep.json` says what it is, `trials.json` what has become
of each trial. The same command goes on with the trials that have not ended; Ray Tune is started anew each time, with
those, and its scheduler is told the results so far.
"""

import json
import logging
import math
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import ray
from ray import tune

from pipelines import checkpoint, cluster, tracking
from pipelines.config import SweepConfig, TrainConfig, to_dict
from pipelines.errors import RunFailed, UserError
from pipelines.leaves import differing_leaves, leaves, with_leaves
from pipelines.storage import Location, locate
from pipelines.sweep import report, space
from pipelines.sweep.book import Book, Recorder
from pipelines.sweep.report import TrialRecord
from pipelines.sweep.trial import Orders, SuccessiveHalving, TrainingTrial
from pipelines.training.driver import check, check_cluster, check_places, check_weights, per_worker, resources

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """Where a sweep ended."""

    name: str
    folder: str
    best: TrialRecord | None
    """None if the sweep was stopped by Ctrl-C."""
    report: str
    """The trials, the best first, and what mattered."""
    tracking_uri: str
    mlflow_run_id: str


def sweep(base: TrainConfig, config: SweepConfig) -> SweepResult:
    """Run the trials of a sweep that have not ended yet, and report on all of them.

    Each trial is a run of its own below the sweep's folder, `<base.run.storage>/<base.run.name>`. The same name in the
    same storage goes on with a sweep.

    Raises:
        UserError: the space, the configuration, the data or the cluster make it impossible; nothing was started.
        RunFailed: no trial has a result.
    """
    axes = space.parse(config.space, base)
    name = base.run.name or f"sweep-{base.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    base, samples, steps = check(replace(base, run=replace(base.run, name=name)))
    _require_metric(base, config, steps)
    folder = locate(base.run.storage) / name
    record = {
        "config": to_dict(base),
        "sweep": {
            "space": list(config.space),
            "trials": config.trials,
            "grace_period": config.grace_period,
            "reduction_factor": config.reduction_factor,
        },
        "data_hash": samples.data_hash,
    }
    run_id = _require_same(folder, record)
    if config.trials < (there := space.combinations(axes)) < math.inf:
        logger.info("%d of %d combinations are tried; --sweep.trials %d tries all.", config.trials, there, there)
    book = Book(folder, space.sample(axes, config.trials, base.run.seed))
    trials = _checked(base, book, steps)
    if book.open:
        check_places(base)
        with cluster.session():
            at_once = min(_trials_at_once(base, config.concurrency), len(book.open))
            run_id = _open(base, record, book)
            logger.info(
                "Sweep %s: %d trials of %d steps, %d of them have ended, %d at a time.",
                name, len(book.records), steps, len(book.records) - len(book.open), at_once,
            )  # fmt: skip
            try:
                _catch_up(base, book)
                _run({key: _child(trial, run_id) for key, trial in trials.items()}, book, config, steps, at_once)
            except BaseException as error:
                tracking.close_run(base.tracking.uri, run_id, "KILLED", {"cause": type(error).__name__})
                raise
    book.prune(config.keep_gigabytes)
    if book.open:
        tracking.close_run(base.tracking.uri, run_id, "KILLED", {"status": "stopped"})
        best = None
    else:
        best = conclude(base, book, run_id)
    text = f"{report.table(book.records)}\n\n{report.importance_text(book.records)}"
    return SweepResult(name, str(folder), best, text, base.tracking.uri, run_id)


def _require_metric(base: TrainConfig, config: SweepConfig, steps: int) -> None:
    """Refuse a sweep whose quick PQ would never come, or too late.

    Raises:
        UserError: with what to set.
    """
    every = base.evaluation.every
    if not base.data.val or not every:
        raise UserError(
            "A sweep compares trials by their quick PQ, and this configuration never computes it. Name a pack of "
            "validation images (--data.val) and steps between evaluations (--evaluation.every)."
        )
    if every > steps:
        raise UserError(
            f"A trial has {steps} steps and its first quick PQ would come at step {every}. Lower --evaluation.every."
        )
    if config.grace_period is not None and config.grace_period < every:
        raise UserError(
            f"The grace period of {config.grace_period} steps ends before the first quick PQ, at step {every}. Use a "
            f"--sweep.grace-period of at least that, or a lower --evaluation.every."
        )


def _require_same(folder: Location, record: dict[str, Any]) -> str:
    """Refuse a folder that holds something other than this sweep; return its MLflow run's id, or nothing.

    Raises:
        UserError: with what differs.
    """
    place = folder / "sweep.json"
    if not place.exists():
        if folder.names():
            raise UserError(f"{folder} holds something that is not a sweep. Choose another --run.name.")
        return ""
    try:
        earlier = json.loads(place.read_text())
        run_id: str = earlier["mlflow_run_id"]
        changes = differing_leaves(earlier["config"], record["config"])
        # A run may change how it is evaluated; here that would compare what cannot be compared.
        before, now = (
            leaves({"evaluation": each["config"]["evaluation"], "sweep": each["sweep"], "data": each["data_hash"]})
            for each in (earlier, record)
        )
        changes += [f"{leaf}: {before.get(leaf)} -> {now[leaf]}" for leaf in now if before.get(leaf) != now[leaf]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place} is not the sweep.json of a sweep ({type(error).__name__}: {error}). Choose another --run.name."
        ) from error
    if changes:
        raise UserError(
            f"{folder} is another sweep: {'; '.join(changes)}. Start a new one with another --run.name, or go on with "
            f"what it has."
        )
    return run_id


def _checked(base: TrainConfig, book: Book, steps: int) -> dict[str, TrainConfig]:
    """Return the configuration of each open trial, looked at as its run will be: values may clash in combination.

    Raises:
        UserError: a trial is impossible, or has another length than the others.
    """
    trials: dict[str, TrainConfig] = {}
    first_weights = set()
    for trial in book.open:
        try:
            config = with_leaves(base, trial.values)
            config = replace(config, run=replace(config.run, name=trial.name, storage=str(book.folder)))
            config, samples, own_steps = check(config)
            fresh = not checkpoint.steps_saved(book.folder / trial.name)
            if fresh and (config.weights, config.model) not in first_weights:
                first_weights.add((config.weights, config.model))
                check_weights(config, book.folder / trial.name, samples.taxonomy)
        except UserError as error:
            raise UserError(f"The trial with {_in_words(trial.values)} is impossible. {error}") from error
        if own_steps != steps:
            raise UserError(
                f"With {_in_words(trial.values)} a trial has {own_steps} steps, others have {steps}: they cannot be "
                f"compared. Give all the same number by --run.steps."
            )
        trials[trial.name] = config
    return trials


def _in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{leaf} = {value}" for leaf, value in values.items())


def _trials_at_once(base: TrainConfig, asked: int | None) -> int:
    """Compute how many trials the cluster holds at a time, with the workers and data tasks of each.

    What other jobs hold of it is not looked at.

    Raises:
        UserError: not even one, or fewer than asked for.
    """
    check_cluster(base)
    there, needed = ray.cluster_resources(), resources(base)
    bundle, workers = per_worker(base), base.scaling.workers
    places = sum(_times(node["Resources"], bundle) for node in ray.nodes() if node["Alive"])
    room = min(_times(there, needed), places // workers)
    if room < (asked or 1):
        asked = asked or 1
        wanted = ", ".join(f"{asked * amount:g} {kind}" for kind, amount in needed.items())
        found = ", ".join(f"{there.get(kind, 0):g} {kind}" for kind in needed)
        raise UserError(
            f"{asked} trials at a time need {wanted}, and the Ray cluster has {found}, its nodes places for {places} "
            f"workers: room for {room}. Lower --sweep.concurrency, --scaling.workers, --scaling.cpus-per-worker or "
            f"--scaling.data-cpus, or use a larger cluster."
        )
    return asked or room


def _times(there: Mapping[str, float], needed: Mapping[str, float]) -> int:
    """Tell how often `needed` fits into what is there."""
    return int(min((there.get(kind, 0) + 1e-6) // amount for kind, amount in needed.items()))


def _open(base: TrainConfig, record: dict[str, Any], book: Book) -> str:
    """Write down what the sweep is, in its folder and in MLflow; return the id of its MLflow run."""
    uri, experiment = base.tracking.uri, base.tracking.experiment
    params = {**record["config"], "sweep": record["sweep"]}
    run_id = tracking.open_run(uri, experiment, base.run.name, str(book.folder), params)
    tracking.set_status(uri, run_id, "RUNNING")
    (book.folder / "sweep.json").write_text(json.dumps({**record, "mlflow_run_id": run_id}, indent=1))
    book.write()
    return run_id


def _child(config: TrainConfig, parent: str) -> TrainConfig:
    return replace(config, tracking=replace(config.tracking, parent=parent))


def _catch_up(base: TrainConfig, book: Book) -> None:
    """Fetch results that reached MLflow, but not the driver before it was lost: they will not come again."""
    for trial in book.open:
        place = book.folder / trial.name / "config.json"
        try:
            run_id = json.loads(place.read_text())["mlflow_run_id"] if place.exists() else ""
            for step, pq in tracking.history(base.tracking.uri, run_id, "quick_pq/all") if run_id else ():
                book.add_result(trial.name, step, pq)
        except (UserError, ValueError, KeyError, TypeError) as error:  # the trial itself will say more
            logger.warning("Earlier results of %s may be missing. %s", trial.name, error)


def _run(trials: Mapping[str, TrainConfig], book: Book, config: SweepConfig, steps: int, at_once: int) -> None:
    """Let Tune run the open trials; returns when all have ended, or when it was interrupted."""
    # Not in the sweep's folder: an order to a trial must not depend on a storage that is full or away.
    with tempfile.TemporaryDirectory(prefix="maskformer-sweep-", ignore_cleanup_errors=True) as scratch:
        orders = Orders(scratch)
        grace_period = config.grace_period or next(iter(trials.values())).evaluation.every
        scheduler = SuccessiveHalving(grace_period, config.reduction_factor, steps, orders)
        for known in book.records:
            for step, pq in known.results:
                scheduler.judge(known.name, step, pq)
        asked = [{"name": name, "config": to_dict(trial), "orders": scratch} for name, trial in trials.items()]
        with _interruptible(orders):
            tune.Tuner(
                # On the driver's own node: a trial drives its run, and must not go down with a worker.
                tune.with_resources(
                    TrainingTrial, tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001}])
                ),
                param_space={"trial": tune.grid_search(asked)},
                tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=at_once),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[Recorder(book, orders, config.keep_gigabytes)],
                    stop=_Interruption(orders, book),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial saves by itself
                ),
            ).fit()


class _Interruption(tune.Stopper):
    """Ends Tune's loop once all are told to end and those that ran have done so."""

    def __init__(self, orders: Orders, book: Book) -> None:
        self._orders, self._book = orders, book

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._orders.all and not self._book.running


@contextmanager
def _interruptible(orders: Orders) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM, which `ray job stop` sends, end all trials, and the second all of it."""
    settings = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it kills trials that take longer than seconds to save
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the truth is elsewhere
        "RAY_AIR_NEW_OUTPUT": "0",  # it prints where those would be
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it advises to restore what we do not
    handlers: dict[signal.Signals, Any] = {}

    def told(signum: int, frame: Any) -> None:
        orders.end_all()
        for kind in handlers:
            signal.signal(kind, signal.default_int_handler)
        logger.info("Stopping: each trial saves after its current step. Ctrl-C again stops at once.")

    if threading.current_thread() is threading.main_thread():
        for kind in (signal.SIGINT, signal.SIGTERM):
            handlers[kind] = signal.signal(kind, told)
    try:
        yield
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def conclude(base: TrainConfig, book: Book, run_id: str) -> TrialRecord:
    """Write down what the sweep has found, in its folder and in MLflow; return the best trial.

    Raises:
        RunFailed: no trial has a result.
    """
    best = report.ranking(book.records)[0]
    if best.status == "failed" or math.isnan(best.last[1]):
        cause = best.cause or "it reported no quick PQ"
        tracking.close_run(base.tracking.uri, run_id, "FAILED", {"cause": cause[:5000]})
        raise RunFailed(
            f"No trial of the sweep {base.run.name} came through. {best.name}: {cause.rstrip('.')}. The same command "
            f"tries the failed ones again."
        )
    if report.tied(book.records):
        logger.warning(
            "Every trial ends with a quick PQ of %.1f: none is better than another. Train longer (--run.steps).",
            100 * best.last[1],
        )
    config = with_leaves(base, best.values)
    config = replace(config, run=replace(config.run, name=""))  # it is to be trained under a name of its own
    files = {
        "best.json": json.dumps(to_dict(config), indent=1).encode(),
        "trials.csv": report.csv(book.records).encode(),
        "importance.txt": report.importance_text(book.records).encode(),
        "parallel_coordinates.png": report.parallel_coordinates(book.records),
    }
    for file, content in files.items():
        (book.folder / file).write_bytes(content)
    tracking.log_files(base.tracking.uri, run_id, files)
    tags = {"best": best.name, **{leaf: str(value) for leaf, value in best.values.items()}}
    tracking.close_run(base.tracking.uri, run_id, "FINISHED", tags)
    return best
