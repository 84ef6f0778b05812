"""evaluate(): the PQ of a checkpoint on a pack, with predictions in COCO's panoptic result format."""

import json
import re
from dataclasses import dataclass
from typing import Any

from maskformer.panoptic_quality import PanopticQuality, PanopticResult
from pipelines.checkpoints.pretrained import open_model
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.cluster import checks
from pipelines.cluster.capacity import Demand, require_fit
from pipelines.cluster.session import session
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.errors import UserError
from pipelines.evaluation.predict import predict
from pipelines.progress import progress
from pipelines.storage import Location, locate

_FORBIDDEN = re.compile(r"[^\w./ :-]")
"""Characters that MLflow does not allow in the names of metrics."""


@dataclass(frozen=True)
class EvaluationResult:
    """Panoptic quality of a checkpoint on a data set, in fractions 0..1."""

    quality: PanopticResult
    per_image: dict[int, PanopticResult]
    output: str
    """Folder with predictions.json, predictions/*.png and metrics.json."""
    model: SavedModel
    data_hash: str
    """Hash of the evaluated pack, as `PackedSet.data_hash`."""

    @property
    def metrics(self) -> dict[str, float]:
        """PQ, SQ and RQ of all classes, of things and of stuff, and the PQ of each class.

        Groups without classes are omitted.
        """
        groups = {"all": self.quality.all, "things": self.quality.things, "stuff": self.quality.stuff}
        flat = {
            f"{name}/{group}": getattr(values, name) for group, values in groups.items() for name in ("pq", "sq", "rq")
        }
        for name, values in self.quality.per_class.items():
            flat[f"pq_class/{_FORBIDDEN.sub('_', name)}"] = values.pq
        return {name: value for name, value in flat.items() if value == value}  # a group without a class is nan


def evaluate(
    checkpoint: str | SavedModel,
    data: str | PackedSet,
    *,
    output: str,
    predictors: int = 1,
    device: str = "cpu",
    cpus: float = 1.0,
) -> EvaluationResult:
    """Segment every image of a pack exactly once, at its original size, and compute PQ.

    Args:
        checkpoint: path or URI of a run's folder (for its best checkpoint with `@best` at the end), one of its
            checkpoints, or a checkpoint of another program; or a model in memory.
            The thresholds and the image size are those of its configuration.
        data: path or URI of the pack, or the opened pack.
        output: folder for the predictions; an earlier evaluation in it is replaced.
        predictors: number of processes with a copy of the model, each with one GPU on `cuda`.
        device: cpu or cuda.
        cpus: CPUs of each predictor, and of each task that reads images.

    Raises:
        UserError: checkpoint or data cannot be read or have different categories, the cluster is too small, or
            `output` has other files.
    """
    samples = data if isinstance(data, PackedSet) else open_pack(data)
    saved = checkpoint if isinstance(checkpoint, SavedModel) else open_model(checkpoint, samples.taxonomy)
    if samples.taxonomy != saved.taxonomy:
        raise UserError(
            f"The checkpoint {saved.uri} has {saved.taxonomy.num_classes} categories, which are not the "
            f"{samples.taxonomy.num_classes} of {samples.uri}. Evaluate on data with the categories it was trained on."
        )
    folder = locate(output)
    _clear(folder)
    with session():
        per_worker = {"CPU": cpus, **({"GPU": 1.0} if device == "cuda" else {})}
        require_fit(
            checks.capacity(),
            Demand(workers=predictors, per_worker=per_worker, data_cpus=cpus),
            "Use fewer --scaling.workers, a lower --scaling.cpus-per-worker, or a larger cluster.",
            what="The evaluation",
        )
        results = predict(
            saved,
            samples,
            png_folder=str(folder / "predictions"),
            predictors=predictors,
            device=device,
            cpus=cpus,
        )
        results = sorted(progress(results, len(samples), "images evaluated"), key=lambda result: result.image_id)
    _require_each_once([result.image_id for result in results], samples)
    total = PanopticQuality(saved.taxonomy)
    for result in results:
        total.merge(result.quality)
    evaluation = EvaluationResult(
        quality=total.result(),
        per_image={result.image_id: result.quality.result() for result in results},
        output=str(folder),
        model=saved,
        data_hash=samples.data_hash,
    )
    annotations = [
        {"image_id": r.image_id, "file_name": r.file_name, "segments_info": r.segments_info} for r in results
    ]
    (folder / "predictions.json").write_text(json.dumps({"annotations": annotations}))
    (folder / "metrics.json").write_text(json.dumps(_summary(evaluation), indent=1))
    return evaluation


def _summary(evaluation: EvaluationResult) -> dict[str, Any]:
    return {
        "checkpoint": evaluation.model.uri,
        "step": evaluation.model.step,
        "data_hash": evaluation.data_hash,
        "num_images": evaluation.quality.num_images,
        "metrics": evaluation.metrics,
    }


def _clear(folder: Location) -> None:
    foreign = [name for name in folder.names() if name not in ("predictions", "predictions.json", "metrics.json")]
    if foreign:
        raise UserError(f"{folder} has {', '.join(foreign[:5])}, which no evaluation wrote. Choose another --output.")
    for name in ("metrics.json", "predictions.json", "predictions"):
        (folder / name).delete()


def _require_each_once(image_ids: list[int], samples: PackedSet) -> None:
    if image_ids != sorted(samples.image_ids.tolist()):
        raise RuntimeError(
            f"The evaluation returned {len(image_ids)} results ({len(set(image_ids))} different images) "
            f"for the {len(samples)} images of {samples.uri}."
        )
