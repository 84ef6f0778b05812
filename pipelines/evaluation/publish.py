"""Evaluate a checkpoint, log the result to MLflow, and register the model."""

from dataclasses import dataclass, replace

from maskformer import PanopticConfig
from pipelines.checkpoints.pretrained import open_model
from pipelines.cluster.session import session
from pipelines.config.publish import PublishConfig
from pipelines.config.resolve import tracking_uri
from pipelines.config.serialize import to_dict
from pipelines.data.manifest import open_pack
from pipelines.evaluation.evaluate import EvaluationResult, evaluate
from pipelines.storage import locate
from pipelines.tracking import registry
from pipelines.tracking.runs import TrackedRun, require_reachable


@dataclass(frozen=True)
class Published:
    """An evaluation, and where it was logged and registered."""

    evaluation: EvaluationResult
    mlflow_run: TrackedRun
    model_version: str
    """Empty if the model was not registered."""


def publish(config: PublishConfig) -> Published:
    """Evaluate a checkpoint, log the metrics to the MLflow run of its training, and register it if asked to.

    Raises:
        UserError: checkpoint, data, output or MLflow cannot be used.
    """
    samples = open_pack(config.data)
    saved = open_model(config.checkpoint, samples.taxonomy)
    folder = locate(saved.folder)
    uri = tracking_uri(config.tracking.uri or saved.config.tracking.uri, saved.config.run.storage)
    require_reachable(uri)
    given, trained = config.panoptic, saved.config.panoptic
    panoptic = PanopticConfig(
        score_threshold=_or(given.score_threshold, trained.score_threshold),
        overlap_threshold=_or(given.overlap_threshold, trained.overlap_threshold),
    )
    # The registered model must use the same thresholds as the evaluated one.
    saved = replace(saved, config=replace(saved.config, panoptic=panoptic))
    output = config.output or str(folder / "evaluation" / f"{saved.step:08d}-{locate(config.data).name}")
    with session():
        evaluation = evaluate(
            saved,
            samples,
            output=output,
            predictors=config.scaling.workers,
            device=config.scaling.device,
            cpus=config.scaling.cpus_per_worker,
        )
    # The MLflow run of the training run, identified by its folder; a checkpoint of another program gets a new one.
    run = TrackedRun.open(
        uri, saved.config.tracking.experiment, saved.config.run.name, str(folder), to_dict(saved.config)
    )
    of_training = (folder / "config.json").exists()
    number = ""
    if of_training:
        run.settle(folder)
    status = run.status if of_training else "FINISHED"  # evaluation does not change the status of a training run
    try:
        run.log_metrics(saved.step, evaluation.metrics, folder if of_training else None)
        run.log_files({"metrics.json": (locate(output) / "metrics.json").read_bytes()}, "evaluation")
        if config.register:
            number = registry.register(saved, run, config.register, config.alias, evaluation.metrics)
    finally:
        run.set_status(status)
    return Published(evaluation, run, number)


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
