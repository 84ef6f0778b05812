"""evaluate(): a checkpoint's PQ over a packed set, with the predictions in COCO's panoptic result format."""

import json
import re
from dataclasses import dataclass
from typing import Any

from maskformer import PanopticConfig, PanopticQuality
from maskformer.panoptic_quality import PanopticResult
from pipelines import cluster
from pipelines.checkpoint import SavedModel
from pipelines.config import EvaluationConfig
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.errors import UserError
from pipelines.evaluation.predict import predict
from pipelines.pretrained import open_model
from pipelines.progress import progress
from pipelines.storage import Location, locate

_FORBIDDEN = re.compile(r"[^\w./ :-]")
"""What MLflow takes in no metric's name."""


@dataclass(frozen=True)
class EvaluationResult:
    """What a checkpoint is worth on a data set. Qualities are fractions 0..1."""

    quality: PanopticResult
    per_image: dict[int, PanopticResult]
    output: str
    """Folder with predictions.json, predictions/*.png and metrics.json."""
    model: SavedModel
    data_hash: str

    @property
    def metrics(self) -> dict[str, float]:
        """PQ, SQ and RQ over all classes, the things and the stuff, and each class's PQ."""
        groups = {"all": self.quality.all, "things": self.quality.things, "stuff": self.quality.stuff}
        flat = {
            f"{name}/{group}": getattr(values, name) for group, values in groups.items() for name in ("pq", "sq", "rq")
        }
        for name, values in self.quality.per_class.items():
            flat[f"pq_class/{_FORBIDDEN.sub('_', name)}"] = values.pq
        return {name: value for name, value in flat.items() if value == value}  # a group without a class is nan


def evaluate(
    checkpoint: str | SavedModel,
    data: str,
    *,
    output: str,
    panoptic: PanopticConfig | None = None,
    shown: EvaluationConfig | None = None,
    predictors: int = 1,
    device: str = "cpu",
    cpus: float = 1.0,
) -> EvaluationResult:
    """Segment every image of the pack `data` exactly once, at its original size, and score it.

    Args:
        checkpoint: a run's folder, one of its checkpoints, a checkpoint of another program, or a model in memory.
        output: folder for the predictions; an earlier evaluation there is replaced.
        panoptic: thresholds; the checkpoint's own if None.
        shown: sizes at which images are shown to the model; the checkpoint's own if None.

    Raises:
        UserError: checkpoint or data cannot be read or do not belong together, or `output` holds other files.
    """
    samples = open_pack(data)
    saved = checkpoint if isinstance(checkpoint, SavedModel) else open_model(checkpoint, samples.taxonomy)
    if samples.taxonomy != saved.taxonomy:
        raise UserError(
            f"The checkpoint {saved.uri} knows {saved.taxonomy.num_classes} categories, and they are not the "
            f"{samples.taxonomy.num_classes} of {samples.uri}. Evaluate on data with the categories it was trained on."
        )
    place = locate(output)
    _clear(place)
    with cluster.session():
        cluster.require(
            {"CPU": cpus * (predictors + 1), **({"GPU": predictors} if device == "cuda" else {})},
            f"{predictors} predictors and a reading task take {cpus:g} CPU each. Use fewer --predictors, less --cpus, "
            f"or a larger cluster.",
        )
        results = predict(
            saved,
            samples,
            panoptic or saved.config.panoptic,
            shown or saved.config.evaluation,
            png_folder=str(place / "predictions"),
            predictors=predictors,
            device=device,
            cpus=cpus,
        )
        results = sorted(progress(results, len(samples), "images evaluated"), key=lambda result: result.image_id)
    _require_each_once([result.image_id for result in results], samples)
    whole = PanopticQuality(saved.taxonomy)
    for result in results:
        whole.merge(result.quality)
    evaluation = EvaluationResult(
        quality=whole.result(),
        per_image={result.image_id: result.quality.result() for result in results},
        output=str(place),
        model=saved,
        data_hash=samples.data_hash,
    )
    annotations = [
        {"image_id": r.image_id, "file_name": r.file_name, "segments_info": r.segments_info} for r in results
    ]
    (place / "predictions.json").write_text(json.dumps({"annotations": annotations}))
    (place / "metrics.json").write_text(json.dumps(_summary(evaluation), indent=1))
    return evaluation


def _summary(evaluation: EvaluationResult) -> dict[str, Any]:
    return {
        "checkpoint": evaluation.model.uri,
        "step": evaluation.model.step,
        "data_hash": evaluation.data_hash,
        "num_images": evaluation.quality.num_images,
        "metrics": evaluation.metrics,
    }


def _clear(place: Location) -> None:
    foreign = [name for name in place.names() if name not in ("predictions", "predictions.json", "metrics.json")]
    if foreign:
        raise UserError(f"{place} holds {', '.join(foreign[:5])}, which no evaluation wrote. Choose another --output.")
    for name in ("metrics.json", "predictions.json", "predictions"):
        (place / name).delete()


def _require_each_once(image_ids: list[int], samples: PackedSet) -> None:
    if image_ids != sorted(samples.image_ids.tolist()):
        raise RuntimeError(
            f"The evaluation returned {len(image_ids)} results ({len(set(image_ids))} different images) "
            f"for the {len(samples)} images of {samples.uri}."
        )
