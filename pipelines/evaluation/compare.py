"""Finding another evaluation on disk, to compare one with."""

from typing import Any

from maskformer.analysis.summary import summarize
from maskformer.untrusted import MAX_JSON_BYTES, escaped, parse_json
from pipelines.credentials import redacted
from pipelines.data.manifest import PackedSet
from pipelines.errors import UserError
from pipelines.evaluation.folder import IMAGES, METRICS, EvaluationFolder
from pipelines.evaluation.result import EvaluationResult
from pipelines.storage import Location, is_remote, locate


def open_evaluation(uri: str, samples: PackedSet) -> EvaluationResult:
    """Read a complete evaluation on the same data.

    Args:
        uri: the folder of an evaluation, or of a run, for the evaluation of its newest checkpoint on this data.
        samples: the data.

    Raises:
        UserError: there is none, it is damaged, or it is on other data.
    """
    location = locate(uri)
    folder, summary = _newest(location, samples)
    predictions = str(summary["predictions"])
    if is_remote(predictions) and not f"{predictions}/".startswith(f"{_bucket(folder)}/"):
        raise UserError(
            f"The evaluation {folder} names {escaped(redacted(predictions))} as its predictions, another place, "
            f"which is not opened unasked. Evaluate those predictions again, with an --output in the same bucket."
        )
    images = EvaluationFolder(folder).finished()
    if [image.image_id for image in images] != sorted(samples.image_ids.tolist()):
        raise UserError(f"{folder} does not have each image of {samples.uri} once. Evaluate again.")
    return EvaluationResult(
        analysis=summarize([image.analysis for image in images], samples.taxonomy),
        images=images,
        output=str(folder),
        png_folder=predictions,
        data=samples,
    )


def _bucket(folder: Location) -> str:
    return "/".join(str(folder).split("/")[:3]) if is_remote(str(folder)) else str(folder)


def _newest(location: Location, samples: PackedSet) -> tuple[Location, dict[str, Any]]:
    folders = [location]
    if not (location / METRICS).exists():
        folders = [location / "evaluation" / name for name in (location / "evaluation").names()]
    found = [(folder, summary) for folder in folders if (summary := _summary(folder)) is not None]
    if not found:
        raise UserError(
            f"There is no complete evaluation by this version at {location} to compare with. Evaluate that run first, "
            f"or give the folder of its evaluation, which has {METRICS} and {IMAGES}."
        )
    same = [(folder, summary) for folder, summary in found if summary["data_hash"] == samples.data_hash]
    if not same:
        raise UserError(
            f"The evaluation at {location} is on other data than {samples.uri} (the hashes of their manifests differ), "
            f"so the two cannot be compared. Evaluate that run on this data first."
        )
    return max(same, key=lambda each: _step(each[1]))


def _step(summary: dict[str, Any]) -> int:
    step = summary.get("step")
    return step if isinstance(step, int) else 0  # of another type only in a file that no evaluation wrote


def _summary(folder: Location) -> dict[str, Any] | None:
    """Return what metrics.json says; None if there is none of a complete evaluation by this version."""
    if not (folder / METRICS).exists() or not (folder / IMAGES).exists():
        return None
    try:
        summary = parse_json((folder / METRICS).read_bytes(MAX_JSON_BYTES))
        return {**summary, "data_hash": summary["data_hash"], "predictions": summary["predictions"]}
    except (KeyError, TypeError, ValueError):
        return None
