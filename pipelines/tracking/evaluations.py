"""Evaluations in MLflow: runs of their own, linked with the logged model, the data set and the run of the training."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.time import get_current_time_millis

from pipelines.errors import UserError
from pipelines.storage import is_remote
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.server import require_reachable

FOLDER = "evaluation"
"""Artifact folder of an evaluation's files."""

_PQ = "pq/all"
_METRICS_PER_CALL = 1000
_OFF = ("false", "0")


@dataclass(frozen=True, kw_only=True)
class EvaluatedData:
    """The data set of an evaluation."""

    name: str
    hash: str
    """Hash of the pack."""
    uri: str = ""
    num_images: int = 0

    @property
    def digest(self) -> str:
        """What MLflow shows of the hash, and compares; it takes 36 characters at most."""
        return self.hash[:16]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation of a logged model, as MLflow has it."""

    run_id: str
    data_name: str
    digest: str
    pq: float
    time: int
    """Milliseconds since 1970."""


def link(run: TrackedRun, model_id: str, data: EvaluatedData) -> None:
    """State the inputs of an evaluation: the data set and the logged model."""
    source = {"uri": data.uri}
    dataset = Dataset(
        data.name,
        data.digest,
        "s3" if is_remote(data.uri) else "local",
        json.dumps(source),
        profile=json.dumps({"num_images": data.num_images, "hash": data.hash}),
    )
    inputs = [DatasetInput(dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, "evaluation")])]
    MlflowClient(run.uri).log_inputs(run.run_id, inputs, [LoggedModelInput(model_id)])


def log_metrics(run: TrackedRun, model_id: str, data: EvaluatedData, step: int, metrics: Mapping[str, float]) -> None:
    """Log the metrics of an evaluation, of the logged model at its step on the data set."""
    now = get_current_time_millis()
    points = [
        Metric(name, value, now, step, model_id, data.name, data.digest, run.run_id) for name, value in metrics.items()
    ]
    client = MlflowClient(run.uri)
    for start in range(0, len(points), _METRICS_PER_CALL):
        client.log_batch(run.run_id, metrics=points[start : start + _METRICS_PER_CALL])


def evaluations_of(client: MlflowClient, model_id: str) -> dict[str, Evaluation]:
    """Return the newest evaluation of a logged model on each data set, by the digest of the data set."""
    newest: dict[str, Evaluation] = {}
    points = client.get_logged_model(model_id).metrics or []
    for point in sorted(points, key=lambda point: point.timestamp):
        if point.key != _PQ or not point.dataset_digest or not point.run_id or _is_deleted(client, point.run_id):
            continue
        newest[point.dataset_digest] = Evaluation(
            run_id=point.run_id,
            data_name=point.dataset_name or "",
            digest=point.dataset_digest,
            pq=point.value,
            time=point.timestamp,
        )
    return newest


@contextlib.contextmanager
def system_metrics(run: TrackedRun) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPUs of this machine every 10 seconds inside the block.

    $MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false turns it off.
    """
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() in _OFF:
        yield
        return
    monitor = SystemMetricsMonitor(run.run_id, tracking_uri=run.uri)
    monitor.start()
    try:
        yield
    finally:
        with contextlib.suppress(UserError):
            require_reachable(run.uri)  # otherwise its thread, which is waited for, would retry for minutes
            monitor.finish()


def _is_deleted(client: MlflowClient, run_id: str) -> bool:
    return client.get_run(run_id).info.lifecycle_stage == "deleted"
