"""Batch inference as a Ray Data graph: packed images in, panoptic results and their scores out.

Tasks read and resize the images, a pool of actors holds the model. Each image is segmented on its own, at its
original size, written as a PNG, and scored beside its truth, so that only numbers travel further.
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

from maskformer import PanopticConfig, PanopticQuality, Segmenter, build_model
from maskformer.postprocess import encode_ids
from pipelines.checkpoint import SavedModel
from pipelines.config import EvaluationConfig
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_panoptic
from pipelines.data.schema import RESIZED, require
from pipelines.data.stream import original_errors, resized_images
from pipelines.storage import locate

_ROWS_PER_TASK = 8


@dataclass(frozen=True)
class ImageResult:
    """One image's prediction and its score."""

    image_id: int
    file_name: str
    """Of the PNG."""
    segments_info: list[dict[str, Any]]
    quality: PanopticQuality
    """Has counted this image alone."""


def segmenter(saved: SavedModel, panoptic: PanopticConfig, shown: EvaluationConfig, device: str) -> Segmenter:
    """Build a checkpoint's model for inference."""
    model = build_model(saved.config.model)
    model.load_state_dict(saved.weights)
    return Segmenter(model.to(device), saved.taxonomy, panoptic, short_side=shown.short_side, long_side=shown.long_side)


def score_row(segment: Segmenter, row: dict[str, Any]) -> tuple[np.ndarray, list[dict[str, Any]], PanopticQuality]:
    """Segment one RESIZED row and score it against its truth."""
    image = np.frombuffer(row["image"], np.uint8).reshape(row["height"], row["width"], 3)
    ids, segments = segment.segment_resized(image, (row["original_height"], row["original_width"]))
    quality = PanopticQuality(segment.taxonomy)
    quality.update((ids, segments), (decode_panoptic(row["panoptic"]), row["segments"]), row["image_id"])
    return ids, segments, quality


def predict(
    saved: SavedModel,
    samples: PackedSet,
    panoptic: PanopticConfig,
    shown: EvaluationConfig,
    *,
    png_folder: str,
    predictors: int,
    device: str,
    cpus: float,
) -> Iterator[ImageResult]:
    """Segment every image of `samples` once, in any order; PNGs go to `png_folder`.

    Args:
        predictors: processes that hold the model, one GPU each on `cuda`.
        cpus: CPUs of each predictor, and of each reading task.
    """
    images = resized_images(
        samples,
        short_side=shown.short_side,
        long_side=shown.long_side,
        samples_per_task=_ROWS_PER_TASK,
        cpus=cpus,
    )
    results = images.map_batches(
        _Predictor,  # pyright: ignore[reportArgumentType] -- Ray accepts a class, its stubs only functions
        fn_constructor_args=(ray.put(saved), panoptic, shown, png_folder, device),
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
    """The actor: RESIZED rows in; file name, segments and score of each out."""

    def __init__(self, saved: Any, panoptic: PanopticConfig, shown: EvaluationConfig, png_folder: str, device: str):
        torch.set_num_threads(1)  # parallelism comes from the number of predictors
        self._segment = segmenter(ray.get(saved), panoptic, shown, device)
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
