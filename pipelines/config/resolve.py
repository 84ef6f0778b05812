"""Resolving a configuration: absolute paths, environment variables and other defaults filled in."""

import os
from dataclasses import replace
from datetime import datetime

from pipelines.config.fields import facts
from pipelines.config.train import TrainConfig
from pipelines.credentials import refuse_credentials
from pipelines.errors import UserError
from pipelines.storage import absolute, is_remote

SQLITE = "sqlite:///"


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the configuration with absolute paths and all defaults filled in.

    Raises:
        UserError: no data or storage is set, or the global batch does not divide evenly among the workers.
    """
    train = or_environment("data.train", config.data.train)
    val = or_environment("data.val", config.data.val)
    storage = or_environment("run.storage", config.run.storage)
    missing = [
        f"{what} (--{name} or ${facts(name).variable})"
        for value, what, name in (
            (train, "the packed training data", "data.train"),
            (storage, "a folder for runs", "run.storage"),
        )
        if not value
    ]
    if missing:
        raise UserError(f"The run needs {' and '.join(missing)}. jobs/prepare_data.py packs a COCO folder.")
    name = config.run.name or f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    resolved = replace(
        config,
        weights=config.weights if config.weights in ("imagenet", "none") else absolute(config.weights),
        data=replace(config.data, train=absolute(train), val=absolute(val) if val else ""),
        run=replace(config.run, name=name, storage=absolute(storage)),
        tracking=replace(config.tracking, uri=tracking_uri(config.tracking.uri, storage)),
    )
    if resolved.run.sample_log and is_remote(resolved.run.storage):
        raise UserError(
            f"--run.sample-log appends to a file, which {resolved.run.storage} does not support. "
            f"Use a local --run.storage, or leave --run.sample-log out."
        )
    if resolved.tracking.tensorboard and is_remote(resolved.run.storage):
        raise UserError(
            f"--tracking.tensorboard appends to files, which {resolved.run.storage} does not support. Use a local "
            f"--run.storage, or leave --tracking.tensorboard out: MLflow has the same curves."
        )
    _ = resolved.batch_split  # refuse an impossible number of workers before anything starts
    return resolved


def or_environment(name: str, value: str) -> str:
    """Return `value`, or if it is empty, the value of the environment variable of the field `name`.

    Raises:
        UserError: it is an address with a user name, password, key or token in it.
    """
    found = value or os.environ.get(facts(name).variable, "")
    refuse_credentials(found, f"The address --{name}" if value else f"The address ${facts(name).variable},")
    return found


def tracking_uri(uri: str, storage: str) -> str:
    """Return the MLflow tracking URI to use with a storage folder.

    Raises:
        UserError: none is set, and the storage cannot hold a SQLite file.
    """
    uri = or_environment("tracking.uri", uri)
    if uri.startswith(SQLITE):
        return SQLITE + absolute(uri.removeprefix(SQLITE))
    if uri:
        return uri
    if is_remote(storage):
        raise UserError(
            f"No MLflow server is set, and {storage} cannot hold a SQLite file. "
            f"Set one by --tracking.uri http://host:5000 or $MLFLOW_TRACKING_URI."
        )
    return own_database(storage)


def own_database(storage: str) -> str:
    """Return the tracking URI of the database that is created in a local storage folder if no other is named."""
    return f"{SQLITE}{absolute(storage)}/mlflow.db"


def registry_uri(uri: str) -> str:
    """Return the MLflow tracking URI of a job that has no run; the storage is that of the environment.

    Raises:
        UserError: none of them is set.
    """
    storage = or_environment("run.storage", "")
    if not or_environment("tracking.uri", uri) and not storage:
        raise UserError(
            f"No MLflow server or database is set. Give --tracking.uri http://host:5000 or sqlite:///runs/mlflow.db, "
            f"or set $MLFLOW_TRACKING_URI or ${facts('run.storage').variable}."
        )
    return tracking_uri(uri, storage)
