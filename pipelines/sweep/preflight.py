"""Everything that is checked before a sweep starts, on top of what is checked for each of its trials."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from maskformer.untrusted import MAX_JSON_BYTES, escaped, parse_json
from pipelines.cluster import checks
from pipelines.cluster.capacity import Demand, require_fit
from pipelines.config.fields import facts
from pipelines.config.overrides import differing_settings, flatten, with_overrides
from pipelines.config.serialize import VERSION
from pipelines.config.sweep import SweepConfig
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError
from pipelines.storage import Location
from pipelines.sweep.trials import TrialStore
from pipelines.training.lock import LOCK_FILE
from pipelines.training.preflight import PreparedRun, check_cluster, check_weights, prepare_run


def sweep_record(prepared: PreparedRun, config: SweepConfig) -> dict[str, Any]:
    """Return what identifies the sweep: the content of its sweep.json except for the id of its MLflow run."""
    return {
        "version": VERSION,
        "config": prepared.record["config"],
        "sweep": {
            "space": list(config.space),
            "trials": config.trials,
            "grace_period": config.grace_period,
            "reduction_factor": config.reduction_factor,
        },
        "data_hash": prepared.train.data_hash,
    }


def require_fixed_workers(prepared: PreparedRun) -> None:
    """Refuse a range of workers.

    Raises:
        UserError: the number of workers is a range.
    """
    scaling = prepared.config.scaling
    if scaling.min_workers != scaling.max_workers:
        raise UserError(
            f"The trials of a sweep share the cluster, so each needs a fixed number of workers, got --scaling.workers "
            f"{scaling.workers}. Use --scaling.workers {prepared.config.batch_split.workers}."
        )


def require_metric(prepared: PreparedRun, config: SweepConfig) -> None:
    """Refuse a sweep whose quick PQ would never be computed, or too late.

    Raises:
        UserError: the quick PQ is disabled or comes after the end of a trial or of the grace period.
    """
    every, steps = prepared.config.evaluation.every, prepared.total_steps
    if prepared.packs.val is None or not every:
        raise UserError(
            "A sweep compares trials by their quick PQ, and this configuration never computes it. Set a pack of "
            "validation images (--data.val) and the steps between evaluations (--evaluation.every)."
        )
    if every > steps:
        raise UserError(
            f"A trial has {steps} steps, but its first quick PQ is due at step {every}. Lower --evaluation.every."
        )
    if config.grace_period is not None and config.grace_period < every:
        raise UserError(
            f"The grace period of {config.grace_period} steps ends before the first quick PQ at step {every}. Raise "
            f"--sweep.grace-period to at least {every}, or lower --evaluation.every."
        )


def earlier_run_id(folder: Location, record: dict[str, Any]) -> str:
    """Return the id of the sweep's MLflow run, empty if the sweep is new.

    Raises:
        UserError: the folder holds a different sweep or something else.
    """
    file = folder / "sweep.json"
    if not file.exists():
        if set(folder.names()) - {LOCK_FILE}:
            raise UserError(f"{folder} is not empty and holds no sweep. Choose another --run.name.")
        return ""
    try:
        earlier = parse_json(file.read_bytes(MAX_JSON_BYTES))
        run_id: str = earlier["mlflow_run_id"]
        version = earlier.get("version", 1)
        changes = differing_settings(earlier["config"], record["config"])
        # A run may change its evaluation on resume. A sweep may not: its trials could not be compared.
        before, now = (
            flatten({"evaluation": each["config"]["evaluation"], "sweep": each["sweep"], "data": each["data_hash"]})
            for each in (earlier, record)
        )
        changes += [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not the sweep.json of a sweep ({type(error).__name__}: {error}). Choose another --run.name."
        ) from error
    if version != VERSION:
        raise UserError(
            f"{folder} was started by another version of maskformer-ray (its sweep.json has version {version}, this "
            f"program writes {VERSION}). Resume it with the version that started it, or choose another --run.name."
        )
    if changes:
        raise UserError(
            f"{folder} is a different sweep: {'; '.join(changes)}. Start a new one with another --run.name, or resume "
            f"this one with its own settings."
        )
    return run_id


def prepare_trials(prepared: PreparedRun, store: TrialStore) -> dict[str, PreparedRun]:
    """Prepare the run of each open trial. Values that are valid one by one may be invalid in combination.

    Raises:
        UserError: a trial is impossible, has a different number of steps than the others, or has a value of a setting
            that no sweep varies.
    """
    runs: dict[str, PreparedRun] = {}
    checked_weights = set()
    for trial in store.records:  # also those that have ended, of which the best becomes best.json
        if fixed := [name for name in trial.values if facts(name).in_sweep != "varies"]:
            raise UserError(
                f"{store.folder}/trials.json gives {trial.name} values of {escaped(', '.join(fixed))}, which no sweep "
                f"varies. Restore the file, or choose another --run.name."
            )
    for trial in store.open:
        try:
            config = with_overrides(prepared.config, trial.values)
            config = replace(config, run=replace(config.run, name=trial.name, storage=str(store.folder)))
            run = prepare_run(config, prepared)
            if (config.weights, config.model) not in checked_weights:
                checked_weights.add((config.weights, config.model))
                check_weights(run)
        except UserError as error:
            raise UserError(f"The trial with {_settings_text(trial.values)} is impossible. {error}") from error
        if run.total_steps != prepared.total_steps:
            raise UserError(
                f"The trial with {_settings_text(trial.values)} has {run.total_steps} steps and others have "
                f"{prepared.total_steps}, so they cannot be compared. Set the same number for all by --run.steps."
            )
        runs[trial.name] = run
    return runs


def _settings_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def trials_at_once(base: TrainConfig, asked: int | None) -> int:
    """Return how many trials run at a time: `asked`, or by default as many as fit the cluster.

    Resources in use by other jobs count as available.

    Raises:
        UserError: not a single trial fits the cluster, or fewer than `asked`.
    """
    check_cluster(base)
    capacity, demand = checks.capacity(), Demand.of(base.scaling)
    at_once = asked or capacity.jobs(demand)
    remedy = (
        "Lower --sweep.concurrency, --scaling.workers, --scaling.cpus-per-worker or --scaling.data-cpus, or use a "
        "larger cluster."
    )
    require_fit(capacity, demand, remedy, what=f"Running {at_once} trials at a time", at_once=at_once)
    return at_once
