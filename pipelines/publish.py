"""A checkpoint is scored, its score goes to MLflow, and the model to the registry."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from maskformer import PanopticConfig
from pipelines import cluster, registry, tracking
from pipelines.config import PublishConfig, to_dict, tracking_uri
from pipelines.data.manifest import open_pack
from pipelines.evaluation import EvaluationResult, evaluate
from pipelines.pretrained import open_model
from pipelines.storage import locate


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
    saved = open_model(config.checkpoint, open_pack(config.data).taxonomy)
    folder = locate(saved.folder)
    uri = tracking_uri(config.tracking_uri or saved.config.tracking.uri, saved.config.run.storage)
    tracking.check(uri)
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
    # The run of the training, found by its folder; a checkpoint that lies elsewhere gets a run of its own.
    run_id = tracking.open_run(
        uri, saved.config.tracking.experiment, saved.config.run.name, str(folder), to_dict(saved.config)
    )
    # To score a training does not change how it ended.
    status = tracking.status(uri, run_id) if (folder / "config.json").exists() else "FINISHED"
    number = ""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "metrics.json").write_bytes((locate(output) / "metrics.json").read_bytes())
            registry.log_evaluation(uri, run_id, saved.step, evaluation.metrics, Path(scratch))
        if config.register:
            number = registry.register(saved, uri, run_id, config.register, config.alias, evaluation.metrics)
    finally:
        tracking.set_status(uri, run_id, status)
    return Published(evaluation, uri, run_id, number)


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
