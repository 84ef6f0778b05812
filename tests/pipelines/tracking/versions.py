"""Versions of registered models with evaluations, as `publish` logs them, but without weights or images."""

from collections.abc import Mapping
from typing import Any

from mlflow.tracking import MlflowClient

from maskformer.panoptic_quality import ClassQuality
from maskformer.taxonomy import Taxonomy
from pipelines.tracking import evaluations, quality
from pipelines.tracking.alias import move_forward
from pipelines.tracking.evaluations import EvaluatedData
from pipelines.tracking.quality import Quality
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.server import current

TAXONOMY = Taxonomy.from_coco(
    [{"id": 1, "name": "disc", "isthing": 1}, {"id": 7, "name": "sky", "isthing": 0}],
)
IMAGES = 40
DATA = EvaluatedData(name="val", hash="a1" * 32, uri="/data/val", num_images=IMAGES)
OTHER_DATA = EvaluatedData(name="test", hash="b2" * 32, uri="/data/test", num_images=IMAGES)


def counts(good: int) -> dict[int, dict[int, ClassQuality]]:
    """Return counts of images, in each of which one of two discs and the sky are found; in `good` of them both discs.

    PQ is that of hand: for 0 good ones, discs have TP 1, FN 1 in each image at IoU 0.75, sky TP 1.
    """
    return {
        image: {1: ClassQuality(1, 1.5, 2, 0, 0) if image < good else ClassQuality(1, 0.75, 1, 0, 1), 7: SKY}
        for image in range(IMAGES)
    }


SKY = ClassQuality(7, 0.9, 1, 0, 0)


def pq(good: int) -> float:
    """Return the PQ of `counts(good)` by its definition."""
    found, missed = IMAGES + good, IMAGES - good
    return (0.75 * found / (found + 0.5 * missed) + 0.9) / 2


def new_version(uri: str, name: str) -> tuple[str, str]:
    """Add a version without files to a registered model; return its number and the id of its logged model."""
    client = MlflowClient(uri)
    if not client.search_registered_models(f"name='{name}'"):
        client.create_registered_model(name)
    experiment_id = client.get_run(_run(uri).run_id).info.experiment_id
    model = client.create_logged_model(experiment_id, "panoptic")
    with current(uri):
        version = client.create_model_version(name, f"models:/{model.model_id}", model_id=model.model_id)
    return str(version.version), model.model_id


def register_versions(uri: str, name: str, alias: str, count: int, creating: Any, ready: Any) -> None:
    """Register versions as several programs do at once.

    Args:
        creating: a lock of threads or processes. MLflow gives up if several versions are created at once.
        ready: a barrier of threads or processes, which all wait for each other before the first and the last version.
    """
    client = MlflowClient(uri)
    for number in range(count):
        with creating:
            version, _ = new_version(uri, name)
        if number in (0, count - 1):
            ready.wait(120)
        now = move_forward(client, name, alias, version)
        assert int(now) >= int(version)


def evaluate(
    uri: str,
    model_id: str,
    good: int,
    data: EvaluatedData = DATA,
    taxonomy: Taxonomy = TAXONOMY,
    files: Mapping[str, bytes] | None = None,
) -> TrackedRun:
    """Log an evaluation of a logged model with the counts of `counts(good)`."""
    run = _run(uri)
    evaluations.link(run, model_id, data)
    content = Quality(data_hash=data.hash, taxonomy=taxonomy, images=counts(good)).to_bytes()
    run.log_files({quality.FILE: content} if files is None else dict(files), evaluations.FOLDER)
    evaluations.log_metrics(run, model_id, data, 10, {"pq/all": pq(good)})
    run.close("FINISHED", {})
    return run


def evaluated_version(uri: str, name: str, good: int) -> str:
    number, model_id = new_version(uri, name)
    evaluate(uri, model_id, good)
    return number


def _run(uri: str) -> TrackedRun:
    return TrackedRun.start(uri, "gate", "evaluation", {}, {})
