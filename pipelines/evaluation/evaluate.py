"""evaluate(): the PQ of a checkpoint on a pack, with predictions in COCO's panoptic result format."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from maskformer.analysis.summary import summarize
from maskformer.panoptic_quality import PanopticQuality
from pipelines.checkpoints.fingerprint import weights_hash
from pipelines.checkpoints.pretrained import open_model
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.cluster import checks
from pipelines.cluster.capacity import Demand, require_fit
from pipelines.cluster.session import session
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.pixels import decode_panoptic
from pipelines.data.reading import PACK_AGAIN, UnusableRowError, read_files
from pipelines.errors import UserError
from pipelines.evaluation.folder import PREDICTIONS, EvaluationFolder
from pipelines.evaluation.result import EvaluationResult
from pipelines.evaluation.score import ScoredImage, score_images
from pipelines.progress import progress
from pipelines.storage import locate

_TESTED_IMAGES = 8


def evaluate(
    checkpoint: str | SavedModel,
    data: str | PackedSet,
    *,
    output: str,
    predictors: int = 1,
    device: str = "auto",
    cpus: float = 1.0,
) -> EvaluationResult:
    """Segment every image of a pack exactly once, at its original size, and compute PQ.

    An equal evaluation that was interrupted in `output` is continued.

    Args:
        checkpoint: path or URI of a run's folder (for its best checkpoint with `@best` at the end), one of its
            checkpoints, or a checkpoint of another program; or a model in memory.
            The thresholds and the image size are those of its configuration.
        data: path or URI of the pack, or the opened pack.
        output: folder for the predictions; another evaluation in it is replaced.
        predictors: number of processes with a copy of the model, each with one GPU on `cuda`.
        device: cpu, cuda, or auto: cuda if the cluster has a GPU.
        cpus: CPUs of each predictor, and of each task that reads or scores images.

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
    folder = EvaluationFolder(locate(output))
    score_the_truth(samples)
    with session():
        device = _resolve(device)
        done = folder.start(_identity(saved, samples, device))
        rest = samples.take(np.flatnonzero(~np.isin(samples.image_ids, list(done))))
        results: Iterator[ScoredImage] = iter(())
        if len(rest):
            per_worker = {"CPU": cpus, **({"GPU": 1.0} if device == "cuda" else {})}
            require_fit(
                checks.capacity(),
                Demand(workers=predictors, per_worker=per_worker, data_cpus=cpus),
                "Use fewer --scaling.workers, a lower --scaling.cpus-per-worker, or a larger cluster.",
                what="The evaluation",
            )
            results = score_images(
                saved,
                rest,
                png_folder=str(folder.location / PREDICTIONS),
                predictors=predictors,
                device=device,
                cpus=cpus,
            )
        done |= {image.image_id: image for image in progress(folder.keep(results), len(rest), "images evaluated")}
    return finish(folder, list(done.values()), samples, model=saved, png_folder=str(folder.location / PREDICTIONS))


def score_the_truth(samples: PackedSet) -> None:
    """Check that the ground truth of some images, taken as a prediction, has PQ 100, before a model runs for hours.

    Raises:
        UserError: it has not, or a row is damaged.
    """
    quality = PanopticQuality(samples.taxonomy)
    for entry in samples.subset(_TESTED_IMAGES).index.to_pylist():
        shard, segments = samples.shards[entry["shard"]], entry["segments"]
        try:
            panoptic, _ = read_files(shard, entry, "panoptic", "panoptic")
            ids = decode_panoptic(panoptic, (entry["height"], entry["width"]))
            crowds = [segment["id"] for segment in segments if segment["iscrowd"]]
            predicted = np.where(np.isin(ids, crowds), 0, ids)
            kept = [segment for segment in segments if not segment["iscrowd"]]
            quality.update((predicted, kept), (ids, segments), entry["image_id"])
        except UnusableRowError as error:
            raise UserError(f"{error}. {PACK_AGAIN}.") from error
        except ValueError as error:
            raise UserError(f"Row {entry['row']} of {shard} is not consistent: {error} {PACK_AGAIN}.") from error
    result = quality.result()
    if result.all.num_classes and result.pq != 1.0:
        raise UserError(
            f"The ground truth of {samples.uri} has PQ {100 * result.pq:.2f} instead of 100 when it is taken as a "
            f"prediction, so its PNGs do not fit their segments. {PACK_AGAIN}."
        )


def _resolve(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if checks.capacity().total("GPU") >= 1 else "cpu"


def _identity(saved: SavedModel, samples: PackedSet, device: str) -> dict[str, Any]:
    size = saved.config.evaluation
    return {
        "checkpoint": saved.uri,
        "step": saved.step,
        "weights": weights_hash(saved.weights),
        "panoptic": asdict(saved.config.panoptic),
        "size": [size.short_side, size.long_side],
        "device": device,
        "data_hash": samples.data_hash,
        "images": len(samples),
    }


def finish(folder: EvaluationFolder, images: list[ScoredImage], samples: PackedSet, **facts: Any) -> EvaluationResult:
    """Add up the images of a complete evaluation, and write what is left of its files.

    Args:
        facts: the other fields of the result.
    """
    images.sort(key=lambda image: image.image_id)
    _require_each_once([image.image_id for image in images], samples)
    evaluation = EvaluationResult(
        analysis=summarize([image.analysis for image in images], samples.taxonomy),
        images=images,
        output=str(folder.location),
        data=samples,
        **facts,
    )
    folder.finish(images, evaluation.summary)
    return evaluation


def _require_each_once(image_ids: list[int], samples: PackedSet) -> None:
    if image_ids != sorted(samples.image_ids.tolist()):
        raise RuntimeError(
            f"The evaluation returned {len(image_ids)} results ({len(set(image_ids))} different images) "
            f"for the {len(samples)} images of {samples.uri}."
        )
