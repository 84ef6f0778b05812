"""A sweep: trials of one configuration with some leaves varied, the worse ones stopped early.

The truth about a sweep is its own folder, as a run's is: `sweep.json` says what it is, `trials.json` what has become
of each trial. The same command goes on with the trials that have not ended; Ray Tune is started anew each time, with
those, and its scheduler is told the results so far.
"""

import json
import logging
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import ray
from ray import tune

from pipelines import cluster, tracking
from pipelines.config import SweepConfig, TrainConfig, to_dict
from pipelines.errors import RunFailed, UserError
from pipelines.leaves import differing_leaves, leaves, with_leaves
from pipelines.storage import Location, locate
from pipelines.sweep import report, space
from pipelines.sweep.book import Book
from pipelines.sweep.report import TrialRecord
from pipelines.sweep.trial import SuccessiveHalving, TrainingTrial
from pipelines.training.driver import check, check_weights, require_cluster, resources

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
        "space": list(config.space),
        "trials": config.trials,
        "data_hash": samples.data_hash,
    }
    run_id = _require_same(folder, record)
    check_weights(base, folder, samples.taxonomy)
    combinations = space.sample(axes, config.trials, base.run.seed)
    for values in combinations:
        _ = with_leaves(base, values).plan  # each value was tried alone; together they may be impossible
    book = Book(folder, combinations)
    if book.open:
        with cluster.session():
            at_once = min(_trials_at_once(base, config.concurrency), len(book.open))
            run_id = _open(base, config, folder, record)
            logger.info(
                "Sweep %s: %d trials of %d steps, %d of them have ended, %d at a time.",
                name, len(book.records), steps, len(book.records) - len(book.open), at_once,
            )  # fmt: skip
            try:
                _run(base, config, book, steps, at_once, run_id)
            except BaseException as error:
                tracking.close_run(base.tracking.uri, run_id, "KILLED", {"cause": type(error).__name__})
                raise
        book.prune(config.keep_gigabytes)
    if book.open:
        tracking.close_run(base.tracking.uri, run_id, "KILLED", {"status": "stopped"})
        best = None
    else:
        best = _conclude(base, book, run_id)
    text = f"{report.table(book.records)}\n\n{report.importance_text(book.records)}"
    return SweepResult(name, str(folder), best, text, base.tracking.uri, run_id)


def _open(base: TrainConfig, config: SweepConfig, folder: Location, record: dict[str, Any]) -> str:
    """Write down what the sweep is, in its folder and in MLflow; return the id of its MLflow run."""
    uri, experiment = base.tracking.uri, base.tracking.experiment
    params = {**record["config"], "sweep": to_dict(config)}
    run_id = tracking.open_run(uri, experiment, base.run.name, str(folder), params)
    tracking.set_status(uri, run_id, "RUNNING")
    (folder / "sweep.json").write_text(json.dumps({**record, "mlflow_run_id": run_id}, indent=1))
    return run_id


def _run(base: TrainConfig, config: SweepConfig, book: Book, steps: int, at_once: int, run_id: str) -> None:
    """Let Tune run the open trials; returns when all have ended, or when it was interrupted."""
    _catch_up(base, book)
    scheduler = SuccessiveHalving(config.grace_period or base.evaluation.every, config.reduction_factor, steps)
    for known in book.records:
        for step, pq in known.results:
            scheduler.judge(known.name, step, pq)
    trials = [
        {"name": trial.name, "config": to_dict(_training(base, book.folder, trial, run_id))} for trial in book.open
    ]
    # On the driver's own node: a trial drives its run, and must not go down with a worker.
    here = f"node:{ray.util.get_node_ip_address()}"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it advises to restore what we do not
    with tempfile.TemporaryDirectory(prefix="maskformer-sweep-") as scratch, _terminated_as_interrupted():
        tune.Tuner(
            tune.with_resources(TrainingTrial, tune.PlacementGroupFactory([{here: 0.001}])),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                callbacks=[book.recorder(config.keep_gigabytes)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial saves by itself
            ),
        ).fit()


def _catch_up(base: TrainConfig, book: Book) -> None:
    """Fetch results that reached MLflow, but not the driver before it was lost: they will not come again."""
    for trial in book.open:
        place = book.folder / trial.name / "config.json"
        if place.exists():
            run_id = json.loads(place.read_text())["mlflow_run_id"]
            for step, pq in tracking.history(base.tracking.uri, run_id, "quick_pq/all"):
                book.add_result(trial.name, step, pq)


def _training(base: TrainConfig, folder: Location, trial: TrialRecord, parent: str) -> TrainConfig:
    config = with_leaves(base, trial.values)
    return replace(
        config,
        run=replace(config.run, name=trial.name, storage=str(folder)),
        tracking=replace(config.tracking, parent=parent),
    )


def _conclude(base: TrainConfig, book: Book, run_id: str) -> TrialRecord:
    """Write down what the sweep has found, in its folder and in MLflow; return the best trial.

    Raises:
        RunFailed: no trial has a result.
    """
    ranking = report.ranking(book.records)
    if not ranking[0].results:
        cause = next((record.cause for record in book.records if record.cause), "none reported a quick PQ")
        tracking.close_run(base.tracking.uri, run_id, "FAILED", {"cause": cause[:5000]})
        raise RunFailed(
            f"No trial of the sweep {base.run.name} has a result. {book.records[0].name}: {cause} The same command "
            f"tries the failed ones again."
        )
    best = ranking[0]
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
    tracking.close_run(
        base.tracking.uri, run_id, "FINISHED", {"best": best.name, **{k: str(v) for k, v in best.values.items()}}
    )
    return best


def _require_metric(base: TrainConfig, config: SweepConfig, steps: int) -> None:
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
        before, now = (leaves({"evaluation": each["config"]["evaluation"]}) for each in (earlier, record))
        changes += [f"{leaf}: {before.get(leaf)} -> {now[leaf]}" for leaf in now if before.get(leaf) != now[leaf]]
        changes += [
            f"{key}: {earlier[key]} -> {record[key]}"
            for key in ("space", "trials", "data_hash")
            if earlier[key] != record[key]
        ]
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


def _trials_at_once(base: TrainConfig, asked: int | None) -> int:
    """Compute how many trials the cluster holds at a time, with the workers and data tasks of each.

    Raises:
        UserError: not even one, or fewer than asked for.
    """
    require_cluster(base)
    there = ray.cluster_resources()
    needed = {kind: amount for kind, amount in resources(base).items() if amount}
    room = int(min((there.get(kind, 0) + 1e-6) // amount for kind, amount in needed.items()))
    if asked is not None and asked > room:
        wanted = ", ".join(f"{asked * amount:g} {kind}" for kind, amount in needed.items())
        found = ", ".join(f"{there.get(kind, 0):g} {kind}" for kind in needed)
        raise UserError(
            f"{asked} trials at a time need {wanted}, and the Ray cluster has {found}: room for {room}. Lower "
            f"--sweep.concurrency, --scaling.workers, --scaling.cpus-per-worker or --scaling.data-cpus, or use a "
            f"larger cluster."
        )
    return asked or room


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, which `ray job stop` sends, do what Ctrl-C does: Tune stops its trials, and each saves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
