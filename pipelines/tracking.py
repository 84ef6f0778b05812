"""MLflow: one run per training run, owned by the driver and found again by its folder.

Whoever logs metrics does it through a queue in a thread of its own: a server that is slow or away costs metrics,
never training time.
"""

import contextlib
import logging
import os
import queue
import sqlite3
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.time import get_current_time_millis

from pipelines.errors import UserError
from pipelines.leaves import leaves

logger = logging.getLogger(__name__)

_FOLDER_TAG = "maskformer.run"
_PARAMS_PER_CALL = 100


def check(uri: str) -> None:
    """Find out within seconds whether MLflow at `uri` can be used; its own client would try for minutes.

    Raises:
        UserError: the server does not answer or the database cannot be written.
    """
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"The MLflow server {uri} does not answer: {reason}. Start it, mend --tracking.uri or "
                f"$MLFLOW_TRACKING_URI, or leave both out for a SQLite file in the storage folder."
            ) from error
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(13, "the file is read-only")
            with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.rollback()
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"MLflow's database {path} cannot be written: {error}. Choose another place with "
                f"--tracking.uri sqlite:////absolute/path/mlflow.db or another --run.storage."
            ) from error
        return
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"MLflow does not keep runs in a plain folder any more, got {uri}. "
            f"Use --tracking.uri sqlite:////absolute/path/mlflow.db or http://host:5000."
        )


def open_run(uri: str, experiment: str, name: str, folder: str, config: dict[str, Any], parent: str = "") -> str:
    """Return the id of the MLflow run that belongs to a run's folder, made now if there is none.

    With `parent`, the id of another run, MLflow shows it below that one.

    Raises:
        UserError: MLflow refuses.
    """
    try:
        return _open_run(MlflowClient(uri), uri, experiment, name, folder, config, parent)
    except MlflowException as error:
        raise UserError(
            f"MLflow at {uri} refuses the run: {' '.join(str(error).split())[:500]} Mend it, or choose another "
            f"--tracking.uri or --tracking.experiment."
        ) from error


def _open_run(
    client: MlflowClient, uri: str, experiment: str, name: str, folder: str, config: dict[str, Any], parent: str
) -> str:
    experiment_id = _experiment(client, uri, experiment)
    quote = '"' if "'" in folder else "'"
    found = client.search_runs([experiment_id], f"tags.`{_FOLDER_TAG}` = {quote}{folder}{quote}", max_results=1)
    if found:
        return found[0].info.run_id
    tags = {_FOLDER_TAG: folder, **({MLFLOW_PARENT_RUN_ID: parent} if parent else {})}
    run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    params = [Param(key, str(value)) for key, value in leaves(config).items()]
    for start in range(0, len(params), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
    client.log_dict(run_id, config, "config.json")
    return run_id


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A server chooses the place of artifacts itself; for a SQLite file it would be the working directory.
    beside = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts") if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=beside.as_uri() if beside else None)


def status(uri: str, run_id: str) -> str:
    """Return RUNNING, FINISHED, FAILED or KILLED."""
    return MlflowClient(uri).get_run(run_id).info.status


def set_status(uri: str, run_id: str, status: str) -> None:
    """Set what `status` returns."""
    MlflowClient(uri).update_run(run_id, status=status)


def history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """Return a metric's steps and values, as they were logged.

    Raises:
        UserError: MLflow does not answer, or does not know the run.
    """
    check(uri)
    try:
        return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, metric)]
    except MlflowException as error:
        raise UserError(f"MLflow at {uri} has nothing of the run {run_id}: {' '.join(str(error).split())}") from error


def log_files(uri: str, run_id: str, files: dict[str, bytes]) -> None:
    """Log files by their names as artifacts of a run; warn if MLflow is away."""
    try:
        check(uri)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            MlflowClient(uri).log_artifacts(run_id, folder)
    except (UserError, MlflowException) as error:
        logger.warning("MLflow does not have %s of run %s: %s", ", ".join(files), run_id, error)


def close_run(uri: str, run_id: str, status: str, tags: dict[str, str]) -> None:
    """Set the run's final status, FINISHED, FAILED or KILLED, with tags that say why; warn if MLflow is away."""
    try:
        check(uri)  # the client itself would try for minutes
        client = MlflowClient(uri)
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.set_terminated(run_id, status)
    except (UserError, MlflowException) as error:
        logger.warning("MLflow does not know that run %s ended as %s: %s", run_id, status, error)


class MetricLog:
    """Logs metrics by step without ever blocking; steps that the run has already logged are passed over.

    A run that goes on from a checkpoint computes some steps a second time, with the same result.
    """

    def __init__(self, uri: str, run_id: str, capacity: int = 10_000) -> None:
        self._client, self._run_id = MlflowClient(uri), run_id
        self._queue: queue.Queue[list[Metric] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, name="metric log", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queue the metrics of a step."""
        now = get_current_time_millis()
        try:
            self._queue.put_nowait([Metric(key, value, now, step) for key, value in metrics.items()])
        except queue.Full:
            logger.warning("MLflow is too slow: the metrics of step %d are lost.", step)

    def close(self, seconds: float = 60) -> None:
        """Give the queue some time to empty."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("MLflow is too slow: the last metrics of run %s may be lost.", self._run_id)

    def _work(self) -> None:
        last_logged: dict[str, int] = {}
        while (metrics := self._queue.get()) is not None:
            try:
                fresh = [m for m in metrics if m.step > self._last(m.key, last_logged)]
                self._client.log_batch(self._run_id, metrics=fresh)
            except Exception as error:  # nothing that happens to a log may end a training
                logger.warning("MLflow did not take the metrics of step %d: %s", metrics[0].step, error)

    def _last(self, key: str, last_logged: dict[str, int]) -> int:
        if key not in last_logged:
            history = self._client.get_metric_history(self._run_id, key)
            last_logged[key] = max((metric.step for metric in history), default=-1)
        return last_logged[key]
