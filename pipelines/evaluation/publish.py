"""Evaluate a checkpoint or predictions, write the report, log the result to MLflow, and register the model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from maskformer import PanopticConfig
from maskformer.analysis.bootstrap import Difference, pq_difference
from maskformer.untrusted import escaped
from pipelines.checkpoints.pretrained import open_model
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.cluster.session import session
from pipelines.config.publish import PublishConfig, ThresholdConfig
from pipelines.config.resolve import SQLITE, or_environment, own_database, tracking_uri
from pipelines.config.serialize import to_dict
from pipelines.credentials import redacted
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.errors import RunFailedError, UserError
from pipelines.evaluation.compare import open_evaluation
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.folder import METRICS, OVERLAYS, REPORT
from pipelines.evaluation.official import Check, check_with_panopticapi, require_installed
from pipelines.evaluation.predictions import evaluate_predictions
from pipelines.evaluation.report import write_report
from pipelines.evaluation.result import EvaluationResult
from pipelines.storage import locate
from pipelines.tracking import evaluations, quality, registry
from pipelines.tracking.evaluations import EvaluatedData
from pipelines.tracking.logged_model import logged_model
from pipelines.tracking.model_card import model_card
from pipelines.tracking.quality import Quality
from pipelines.tracking.registry import Registered
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.server import connect, current, explained, found, one_line, require_reachable

logger = logging.getLogger(__name__)

_FILES = (METRICS, REPORT)


@dataclass(frozen=True, kw_only=True)
class Reported:
    """An evaluation with its report."""

    evaluation: EvaluationResult
    report: str
    """Path or URI of the report; empty if none was asked for."""
    other: EvaluationResult | None
    """The evaluation compared with, if there is one."""
    difference: Difference | None
    """PQ of this evaluation minus that of the other."""
    check: Check | None
    """What panopticapi says, if it was asked."""


@dataclass(frozen=True, kw_only=True)
class Published(Reported):
    """An evaluation of a checkpoint, and where it was logged and registered."""

    mlflow_run: TrackedRun
    """The run of the evaluation."""
    model_version: str = ""
    """Empty if the model was not registered."""
    alias_version: str = ""
    """The version that the alias names: this one, a newer one, or what promote.py chose meanwhile."""


def score(config: PublishConfig) -> Reported:
    """Evaluate predictions and write the report. MLflow is not used.

    Raises:
        UserError: predictions, data or output cannot be used.
    """
    samples, other = _opened(config)
    _require_other_output(config.output, other)
    evaluation = evaluate_predictions(
        config.predictions, samples, output=config.output, cpus=config.scaling.cpus_per_worker
    )
    return _reported(evaluation, other, config)


def publish(config: PublishConfig) -> Published:
    """Evaluate a checkpoint, write the report, log both to an MLflow run of the evaluation, and register the model.

    Each evaluation is a new MLflow run, listed under that of the training if this MLflow has it. If MLflow does not
    accept the result, that is a warning: it is in the output folder.

    Raises:
        UserError: checkpoint, data, output or MLflow cannot be used, or MLflow does not allow the name of the model.
        RunFailedError: the model could not be registered after the evaluation.
    """
    samples, other = _opened(config)
    saved = open_model(config.checkpoint, samples.taxonomy)
    uri = _tracking_uri(config, saved)
    given = or_environment("tracking.uri", config.tracking.uri)
    with found("" if given else uri):
        return _publish(config, saved, samples, other, uri, anew=bool(config.register) and not given)


def _publish(
    config: PublishConfig,
    saved: SavedModel,
    samples: PackedSet,
    other: EvaluationResult | None,
    uri: str,
    anew: bool,
) -> Published:
    client = connect(uri, create=uri == own_database(_storage_of(saved)))
    if config.register:
        registry.require_names(client, config.register, config.alias)
    trained = saved.config.panoptic
    saved = _with_thresholds(saved, config.panoptic)
    data = EvaluatedData(
        name=locate(samples.uri).name, hash=samples.data_hash, uri=samples.uri, num_images=len(samples)
    )
    output = config.output or _default_output(saved, trained, data.name)
    _require_other_output(output, other)
    training = TrackedRun.find(uri, saved.config.tracking.experiment, saved.folder)
    history = training.history("quick_pq/all") if training else []
    run, model = _start(client, uri, replace(config, output=output), saved, data, training, anew)
    try:
        with evaluations.system_metrics(run), session():
            evaluation = evaluate(
                saved,
                samples,
                output=output,
                predictors=config.scaling.workers,
                device=config.scaling.device,
                cpus=config.scaling.cpus_per_worker,
            )
            reported = _reported(evaluation, other, config, history)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        run.close("KILLED" if stopped else "FAILED", {"cause": one_line(error)})
        raise
    published = Published(**vars(reported), mlflow_run=run)
    try:
        _log(run, model, data, evaluation, saved.step)
        if config.register:
            _require_agreement(reported.check)
            version = _register(client, run, config, model, saved, data, evaluation)
            published = replace(published, model_version=version.version, alias_version=version.alias_version)
    finally:
        run.close("FINISHED", {})
    return published


def _opened(config: PublishConfig) -> tuple[PackedSet, EvaluationResult | None]:
    """Open the data and the evaluation to compare with, and check that panopticapi is there if it is asked for."""
    if config.check_with == "panopticapi":
        require_installed()
    samples = open_pack(config.data)
    return samples, open_evaluation(config.compare, samples) if config.compare else None


def _reported(
    evaluation: EvaluationResult,
    other: EvaluationResult | None,
    config: PublishConfig,
    history: Sequence[tuple[int, float]] = (),
) -> Reported:
    """Check with panopticapi and write the report, if asked to."""
    check = check_with_panopticapi(evaluation) if config.check_with == "panopticapi" else None
    difference = other and pq_difference(other.per_image_counts, evaluation.per_image_counts, evaluation.taxonomy)
    report = ""
    if config.report_images:
        report = write_report(
            evaluation,
            images=config.report_images,
            other=other,
            difference=difference,
            training=history,
            cpus=config.scaling.cpus_per_worker,
        )
    return Reported(evaluation=evaluation, report=report, other=other, difference=difference, check=check)


def _default_output(saved: SavedModel, trained: PanopticConfig, data: str) -> str:
    """Return the folder of an evaluation of this step on this data; other thresholds have one of their own."""
    used = saved.config.panoptic
    thresholds = "" if used == trained else f"-score{used.score_threshold:g}-overlap{used.overlap_threshold:g}"
    return str(locate(saved.folder) / "evaluation" / f"{saved.step:08d}-{data}{thresholds}")


def _require_other_output(output: str, other: EvaluationResult | None) -> None:
    if other is not None and str(locate(output)) == other.output:
        raise UserError(
            f"The evaluation to compare with lies in {output}, where this one would be written. Choose another "
            f"--output."
        )


def _tracking_uri(config: PublishConfig, saved: SavedModel) -> str:
    """Return where to log: by flag, by environment, or beside the run's folder.

    A checkpoint may come from a stranger. What it names is used only if it is the database of a folder that it lies in.
    """
    folder, trained = locate(saved.folder), saved.config.tracking.uri
    given = or_environment("tracking.uri", config.tracking.uri)
    if not given and folder.is_local and trained.startswith(SQLITE):
        database = Path(trained.removeprefix(SQLITE))
        if database.name == "mlflow.db" and database.is_file() and Path(folder.path).is_relative_to(database.parent):
            given = trained
    uri = tracking_uri(given, _storage_of(saved))
    if trained not in ("", uri):
        logger.info(
            "The training was logged to %s; this evaluation is logged to %s. --tracking.uri or $MLFLOW_TRACKING_URI "
            "chooses another place.",
            escaped(redacted(trained)),
            uri,
        )
    return uri


def _storage_of(saved: SavedModel) -> str:
    """Return the folder of the folder of a run."""
    return str(locate(saved.folder)).rpartition("/")[0]


def _with_thresholds(saved: SavedModel, given: ThresholdConfig) -> SavedModel:
    """Return the model with the thresholds of the command line: the registered model must use the evaluated ones."""
    return replace(saved, config=replace(saved.config, panoptic=given.over(saved.config.panoptic)))


def _start(
    client: MlflowClient,
    uri: str,
    config: PublishConfig,
    saved: SavedModel,
    data: EvaluatedData,
    training: TrackedRun | None,
    anew: bool,
) -> tuple[TrackedRun, LoggedModel]:
    """Create the MLflow run of an evaluation, and link it with the training, the model and the data."""
    experiment = saved.config.tracking.experiment
    if training is not None:
        training.settle(locate(saved.folder))
    about = {**to_dict(config), "panoptic": to_dict(saved.config.panoptic)}
    del about["tracking"]  # MLflow itself
    run = TrackedRun.start(
        uri,
        experiment,
        f"evaluation of step {saved.step} on {data.name}",
        about,
        tags={"checkpoint": saved.uri, "step": str(saved.step), "data_hash": data.hash},
        parent=training.run_id if training else "",
    )
    try:
        with current(uri):
            experiment_id = client.get_run(run.run_id).info.experiment_id
            model = logged_model(client, saved, experiment_id, training.run_id if training else run.run_id, anew)
            evaluations.link(run, model.model_id, data)
    except MlflowException as error:
        run.close("FAILED", {"cause": one_line(error)})
        raise explained(uri, error) from error
    return run, model


def _require_agreement(check: Check | None) -> None:
    if check is not None and not check.agrees:
        raise RunFailedError(
            f"The model is not registered: panopticapi finds PQ {100 * check.pq:.6f}, and a number differs by "
            f"{check.difference:.1e}. Report this with the predictions."
        )


def _log(run: TrackedRun, model: LoggedModel, data: EvaluatedData, evaluation: EvaluationResult, step: int) -> None:
    """Log files, and then metrics; warn about what MLflow does not accept."""
    output = locate(evaluation.output)
    counts = Quality(data_hash=evaluation.data_hash, taxonomy=evaluation.taxonomy, images=evaluation.per_image_counts)
    files = {name: (output / name).read_bytes() for name in output.names() if name in _FILES}
    run.log_files({**files, quality.FILE: counts.to_bytes()}, evaluations.FOLDER)
    overlays = output / OVERLAYS
    if names := overlays.names():
        run.log_files({name: (overlays / name).read_bytes() for name in names}, f"{evaluations.FOLDER}/{OVERLAYS}")
    try:
        require_reachable(run.uri)  # the client itself would retry for minutes
        evaluations.log_metrics(run, model.model_id, data, step, evaluation.metrics)
    except (UserError, MlflowException) as error:
        logger.warning(
            "MLflow did not accept the metrics of run %s; they are in %s: %s", run.run_id, output, one_line(error)
        )


def _register(
    client: MlflowClient,
    run: TrackedRun,
    config: PublishConfig,
    model: LoggedModel,
    saved: SavedModel,
    data: EvaluatedData,
    evaluation: EvaluationResult,
) -> Registered:
    pq = evaluation.quality
    try:
        require_reachable(run.uri)
        with current(run.uri):
            return registry.register(
                client,
                model,
                saved,
                config.register,
                config.alias,
                description=model_card(saved, data, pq, evaluation.analysis.intervals),
                tags={"pq": str(pq.pq), "data_hash": data.hash, "evaluation_run": run.run_id},
            )
    except Exception as error:  # stores of artifacts raise types of their own
        raise RunFailedError(
            f"The model was evaluated but not registered as {config.register}: {one_line(error)} The result is in "
            f"{evaluation.output}. The same command tries again."
        ) from error
