"""A checkpoint is scored, its score goes to MLflow, and the model to the registry."""

import json
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from maskformer import PanopticConfig
from pipelines import cluster, registry, tracking
from pipelines.checkpoint import SavedModel, load_model
from pipelines.config import PublishConfig, to_dict, tracking_uri
from pipelines.evaluation import EvaluationResult, evaluate
from pipelines.storage import absolute, locate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """Where the result can be found."""

    evaluation: EvaluationResult
    tracking_uri: str
    mlflow_run_id: str
    model_version: str
    """Empty if the model was not registered."""


def publish(config: PublishConfig) -> Published:
    """Evaluate a checkpoint, log the metrics into the MLflow run of its training, and register it if asked to.

    Raises:
        UserError: checkpoint, data, output or MLflow cannot be used.
    """
    saved = load_model(locate(config.checkpoint))
    folder = locate(saved.uri.rpartition("/checkpoints/")[0] or saved.uri)
    uri, run_id = _mlflow_run(saved, str(folder), config)
    panoptic = PanopticConfig(
        score_threshold=_or(config.score_threshold, saved.config.panoptic.score_threshold),
        overlap_threshold=_or(config.overlap_threshold, saved.config.panoptic.overlap_threshold),
    )
    # What is registered has to segment as what was scored.
    saved = replace(saved, config=replace(saved.config, panoptic=panoptic))
    output = config.output or str(folder / "evaluation" / f"{saved.step:08d}-{locate(config.data).name}")
    with cluster.session():
        evaluation = evaluate(
            saved,
            config.data,
            output=output,
            predictors=config.predictors,
            device=config.device,
            cpus=config.cpus,
        )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "metrics.json").write_bytes((locate(output) / "metrics.json").read_bytes())
        registry.log_evaluation(uri, run_id, saved.step, evaluation.metrics, Path(scratch))
    number = ""
    if config.register:
        number = registry.register(saved, uri, run_id, config.register, config.alias, evaluation.metrics)
    return Published(evaluation, uri, run_id, number)


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def _mlflow_run(saved: SavedModel, folder: str, config: PublishConfig) -> tuple[str, str]:
    """Return tracking URI and id of the run that trained the checkpoint; a checkpoint on its own gets a new run."""
    record = locate(folder) / "config.json"
    of_training = json.loads(record.read_text()) if record.exists() else {}
    trained_at = saved.config.tracking.uri
    uri = tracking_uri(config.tracking_uri or trained_at, saved.config.run.storage)
    tracking.check(uri)
    if of_training.get("mlflow_run_id") and uri == trained_at:
        return uri, of_training["mlflow_run_id"]
    return uri, tracking.open_run(
        uri, saved.config.tracking.experiment, saved.config.run.name, absolute(folder), to_dict(saved.config)
    )
