"""Batch inference as a Ray Data pipeline: from packed images to panoptic results and their quality.

Tasks read and resize the images; a pool of actors has the model. Each image is segmented individually, at its
original size, written as a PNG and compared with its ground truth in the actor, so that only numbers are returned.
"""

import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy

from maskformer import PanopticQuality, Segmenter, build_model
from maskformer.coco_format import encode_ids
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.data.execution import original_errors
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_panoptic
from pipelines.data.schema import RESIZED, require
from pipelines.data.stream import resized_images
from pipelines.storage import locate

_ROWS_PER_TASK = 8


@dataclass(frozen=True)
class ImageResult:
    """The prediction for one image and its quality."""

    image_id: int
    file_name: str
    """Name of the PNG in the folder of predictions."""
    segments_info: list[dict[str, Any]]
    quality: PanopticQuality
    """PQ statistics of this image alone."""


def segmenter(saved: SavedModel, device: str) -> Segmenter:
    """Build the model of a checkpoint for inference on `device`."""
    config = saved.config
    model = build_model(config.model)
    model.load_state_dict(saved.weights)
    return Segmenter(
        model.to(device),
        saved.taxonomy,
        config.panoptic,
        short_side=config.evaluation.short_side,
        long_side=config.evaluation.long_side,
    )


def score_row(segment: Segmenter, row: dict[str, Any]) -> tuple[np.ndarray, list[dict[str, Any]], PanopticQuality]:
    """Segment one RESIZED row and compare it with its ground truth.

    Returns:
        Segment ids [H, W] at the original size, segments_info, and the PQ statistics of the image.
    """
    image = np.frombuffer(row["image"], np.uint8).reshape(row["height"], row["width"], 3)
    ids, segments = segment.segment_resized(image, (row["original_height"], row["original_width"]))
    quality = PanopticQuality(segment.taxonomy)
    quality.update((ids, segments), (decode_panoptic(row["panoptic"]), row["segments"]), row["image_id"])
    return ids, segments, quality


def predict(
    saved: SavedModel,
    samples: PackedSet,
    *,
    png_folder: str,
    predictors: int,
    device: str,
    cpus: float,
) -> Iterator[ImageResult]:
    """Segment every image of `samples` once and yield the results in any order.

    Args:
        png_folder: path or URI of the folder to write the PNGs to.
        predictors: number of processes with a copy of the model, each with one GPU on `cuda`.
        device: cpu or cuda.
        cpus: CPUs of each predictor, and of each task that reads images.

    Raises:
        UserError: a packed row is damaged, or a PNG cannot be written.
    """
    images = resized_images(
        samples,
        short_side=saved.config.evaluation.short_side,
        long_side=saved.config.evaluation.long_side,
        samples_per_task=_ROWS_PER_TASK,
        cpus=cpus,
    )
    results = images.map_batches(
        _Predictor,  # pyright: ignore[reportArgumentType] -- Ray accepts a class; its annotations allow only functions
        fn_constructor_args=(ray.put(saved), png_folder, device),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=predictors),
        num_cpus=cpus,
        num_gpus=1 if device == "cuda" else 0,
    )
    with original_errors():
        for row in results.iter_rows():
            yield ImageResult(
                row["image_id"], row["file_name"], json.loads(row["segments_info"]), pickle.loads(row["quality"])
            )


class _Predictor:
    """The actor: maps RESIZED rows to file name, segments and PQ statistics of each image."""

    def __init__(self, saved: Any, png_folder: str, device: str) -> None:
        torch.set_num_threads(1)  # parallelism comes from the number of predictors
        self._segment = segmenter(ray.get(saved), device)
        self._folder = locate(png_folder)

    def __call__(self, table: pa.Table) -> pa.Table:
        require(table, RESIZED, "A batch for inference")
        results = []
        for row in table.to_pylist():
            ids, segments, quality = score_row(self._segment, row)
            name = f"{row['image_id']:012d}.png"
            png = io.BytesIO()
            Image.fromarray(encode_ids(ids)).save(png, "PNG")
            (self._folder / name).write_bytes(png.getvalue())
            results.append(
                {
                    "image_id": row["image_id"],
                    "file_name": name,
                    "segments_info": json.dumps(segments),
                    "quality": pickle.dumps(quality),
                }
            )
        return pa.Table.from_pylist(results)
