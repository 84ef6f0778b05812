"""MLflow runs: one for each training run, written by the driver and identified by the training run's folder."""

import contextlib
import functools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.time import get_current_time_millis

from pipelines.config.overrides import flatten
from pipelines.credentials import redacted, without_secrets
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.storage import Location
from pipelines.tracking.server import explained, one_line, require_artifacts, require_reachable
from pipelines.tracking.unsent import RunStatus, Sender, Unsent, is_rejection, read_points

logger = logging.getLogger(__name__)

_FOLDER_TAG = "maskformer.run"
_PARAMS_PER_CALL = 100
_STORAGE_ERRORS = (UserError, StorageUnavailableError, OSError)
_ERRORS = (*_STORAGE_ERRORS, MlflowException, json.JSONDecodeError)  # the last: a proxy's page, or a damaged file


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run, as plain strings, so that it can be sent to any process."""

    uri: str
    """Tracking URI of the server or database."""
    run_id: str

    @classmethod
    def open(
        cls, uri: str, experiment: str, name: str, folder: str, config: dict[str, Any], parent: str = ""
    ) -> "TrackedRun":
        """Return the MLflow run of a training run's folder; create it if it does not exist.

        Args:
            uri: tracking URI of the server or database.
            experiment: name of the experiment, created if it does not exist.
            name: name of a new run.
            folder: the training run's folder, stored as a tag.
            config: logged as parameters and as config.json when the run is created.
            parent: id of the run that MLflow lists this one under.

        Raises:
            UserError: MLflow rejects the request.
        """
        require_reachable(uri, create=True)  # the client itself would try for minutes; the job has checked the path
        with _rejections(uri):
            client = MlflowClient(uri)
            experiment_id = _experiment(client, uri, experiment)
            run_id = _find(client, experiment_id, folder)
            return cls(uri, run_id or _create(client, experiment_id, name, {_FOLDER_TAG: folder}, config, parent))

    @classmethod
    def find(cls, uri: str, experiment: str, folder: str) -> "TrackedRun | None":
        """Return the MLflow run of a training run's folder, if there is one.

        Raises:
            UserError: MLflow does not answer or rejects the request.
        """
        require_reachable(uri)
        with _rejections(uri):
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            run_id = _find(client, found.experiment_id, folder) if found else None
            return cls(uri, run_id) if run_id else None

    @classmethod
    def start(
        cls, uri: str, experiment: str, name: str, config: dict[str, Any], tags: dict[str, str], parent: str = ""
    ) -> "TrackedRun":
        """Create an MLflow run; the arguments are those of `open`, and further tags.

        Raises:
            UserError: MLflow does not answer or rejects the request.
        """
        require_reachable(uri)
        with _rejections(uri):
            client = MlflowClient(uri)
            return cls(uri, _create(client, _experiment(client, uri, experiment), name, tags, config, parent))

    def __str__(self) -> str:
        return f"MLflow run {self.run_id} at {redacted(self.uri)}"

    @property
    def status(self) -> str:
        """Status of the run: RUNNING, FINISHED, FAILED or KILLED."""
        return self._client.get_run(self.run_id).info.status

    def set_status(self, status: str) -> None:
        """Set the status: RUNNING, FINISHED, FAILED or KILLED; warn within seconds if MLflow is unreachable."""
        try:
            require_reachable(self.uri)  # the client itself would retry for minutes
            self._client.update_run(self.run_id, status=status)
        except (UserError, MlflowException) as error:
            logger.warning("MLflow did not set the status of run %s to %s: %s", self.run_id, status, one_line(error))

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Return the steps and values of a metric in the order they were logged.

        Raises:
            UserError: MLflow does not answer or rejects the request.
        """
        require_reachable(self.uri)
        try:
            return [(point.step, point.value) for point in self._client.get_metric_history(self.run_id, metric)]
        except MlflowException as error:
            raise UserError(
                f"MLflow at {redacted(self.uri)} cannot return the metrics of run {self.run_id}: {one_line(error)}"
            ) from error

    def log_metrics(self, step: int, metrics: dict[str, float], folder: Location | None = None) -> None:
        """Log metrics at a step; warn within seconds if MLflow is unreachable.

        Args:
            folder: the training run's folder, where the metrics are kept if MLflow is unreachable.
        """
        now = get_current_time_millis()
        points = [Metric(name, value, now, step) for name, value in metrics.items()]
        try:
            require_reachable(self.uri)
            self._client.log_batch(self.run_id, points)
        except (UserError, MlflowException) as error:
            what = f"metrics of run {self.run_id}"
            if folder is None or (isinstance(error, MlflowException) and is_rejection(error)):
                logger.warning("MLflow did not accept %s: %s", what, one_line(error))
            else:
                _keep(what, error, folder, lambda unsent: unsent.add(points))

    def log_files(self, files: dict[str, bytes], folder: str | None = None) -> None:
        """Log files as artifacts; warn if MLflow or its store of artifacts does not accept them.

        Args:
            files: the content of each file, by name.
            folder: artifact folder of the files.
        """
        try:
            require_reachable(self.uri)
            require_artifacts(self.uri, self._client.get_run(self.run_id).info.artifact_uri or "")
            with tempfile.TemporaryDirectory() as scratch:
                for name, content in files.items():
                    Path(scratch, name).write_bytes(content)
                self._client.log_artifacts(self.run_id, scratch, folder)
        except Exception as error:  # stores of artifacts raise types of their own
            logger.warning("MLflow did not accept %s of run %s: %s", ", ".join(files), self.run_id, one_line(error))

    def close(self, status: str, tags: dict[str, str], folder: Location | None = None) -> None:
        """Set the final status and tags with its cause; warn within seconds if MLflow is unreachable.

        Args:
            status: FINISHED, FAILED or KILLED.
            folder: the training run's folder. What is in it of unsent metrics is sent first. If MLflow is unreachable,
                status and tags are kept there for `settle`.
        """
        final = RunStatus(status, without_secrets(tags))
        try:
            require_reachable(self.uri)  # the client itself would retry for minutes
            if folder is not None:
                with _warned(f"The metrics of run {self.run_id} that are in {folder} were not sent"):
                    self._send_metrics(Unsent(folder))
            final.record(self._client, self.run_id)
            if folder is not None:
                with _warned(f"A status of run {self.run_id} that is outdated stays in {folder}"):
                    Unsent(folder).delete_status()
                    Unsent(folder).tidy()
        except (UserError, MlflowException, json.JSONDecodeError) as error:
            what = f"the status {status} of run {self.run_id}"
            if folder is None or (isinstance(error, MlflowException) and is_rejection(error)):
                logger.warning(
                    "MLflow did not record that run %s ended as %s: %s", self.run_id, status, one_line(error)
                )
            else:
                _keep(what, error, folder, lambda unsent: unsent.write_status(final))

    def settle(self, folder: Location) -> None:
        """Send the metrics and the status that an earlier command kept in the run's folder; warn if that fails.

        Calling it again, or while the run trains, changes nothing that MLflow has already.

        Args:
            folder: the training run's folder.
        """
        unsent = Unsent(folder)
        try:
            if not unsent.folder.names():
                return
            require_reachable(self.uri)
            self._send_metrics(unsent)
            status = unsent.read_status()
            if status is not None:
                self._record(status)
                unsent.delete_status()
            unsent.tidy()
            logger.info("MLflow has what an earlier command on run %s could not send.", self.run_id)
        except _ERRORS as error:
            logger.warning(
                "MLflow still lacks metrics or the status of run %s, which stay in %s: %s",
                self.run_id,
                unsent.folder,
                one_line(error),
            )

    def _send_metrics(self, unsent: Unsent) -> None:
        sender = Sender(self.uri, self.run_id)
        for piece in unsent.pieces():
            if rejected := sender.send(read_points(piece)):
                logger.warning("MLflow rejects metrics of run %s, which are dropped: %s", self.run_id, rejected)
            piece.delete()

    def _record(self, status: RunStatus) -> None:
        try:
            status.record(self._client, self.run_id)
        except MlflowException as error:
            if not is_rejection(error):
                raise
            logger.warning("MLflow rejects the status %s of run %s: %s", status.status, self.run_id, one_line(error))

    @property
    def _client(self) -> MlflowClient:
        return MlflowClient(self.uri)


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """Warn that the storage does not answer, and go on."""
    try:
        yield
    except _STORAGE_ERRORS as error:
        logger.warning("%s: %s", what, one_line(error))


def _keep(what: str, error: Exception, folder: Location, write: Callable[[Unsent], None]) -> None:
    unsent = Unsent(folder)
    try:
        write(unsent)
        kept = f"Kept in {unsent.folder}; the next command on this run sends it."
    except _STORAGE_ERRORS as storage_error:
        kept = f"Lost, since it cannot be kept either: {one_line(storage_error)}"
    logger.warning("MLflow did not accept %s: %s %s", what, one_line(error), kept)


def _create(
    client: MlflowClient, experiment_id: str, name: str, tags: dict[str, str], config: dict[str, Any], parent: str
) -> str:
    about = {**_context(), **without_secrets(tags), **({MLFLOW_PARENT_RUN_ID: parent} if parent else {})}
    run_id = client.create_run(experiment_id, run_name=name, tags=about).info.run_id
    config = without_secrets(config)
    params = [Param(key, str(value)) for key, value in flatten(config).items()]
    for start in range(0, len(params), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
    require_artifacts(client.tracking_uri, client.get_run(run_id).info.artifact_uri or "")
    client.log_dict(run_id, config, "config.json")
    return run_id


@functools.cache
def _context() -> dict[str, str]:
    """Return MLflow's tags of this process: user, source, git commit. It calls git, which takes a while."""
    return resolve_tags()


def _find(client: MlflowClient, experiment_id: str, folder: str) -> str | None:
    quote = '"' if "'" in folder else "'"
    found = client.search_runs([experiment_id], f"tags.`{_FOLDER_TAG}` = {quote}{folder}{quote}", max_results=1)
    return found[0].info.run_id if found else None


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        require_artifacts(uri, found.artifact_location or "")
        return found.experiment_id
    # A server chooses the artifact location; with a SQLite file, the default would be the working directory.
    artifacts = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts") if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=artifacts.as_uri() if artifacts else None)


@contextlib.contextmanager
def _rejections(uri: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.get_http_status_code() in (401, 403):
            raise explained(uri, error) from None
        raise UserError(
            f"MLflow at {redacted(uri)} rejected the run: {one_line(error)} Correct this, or choose "
            f"another --tracking.uri or --tracking.experiment."
        ) from error
