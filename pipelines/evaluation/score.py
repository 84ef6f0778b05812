"""Evaluation as a Ray Data pipeline: from packed images to panoptic results, compared with their ground truth.

Tasks read and resize the images; a pool of actors runs the network, on GPUs where there are some; tasks compute the
segments, write them as a PNG and compare them with the ground truth. Each image is segmented individually, at its
original size, and only numbers are returned.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from PIL import Image
from ray.data import ActorPoolStrategy

from maskformer import PanopticConfig, PanopticQuality, Segmenter, Taxonomy, build_model, panoptic
from maskformer.analysis.image import ImageAnalysis, analyze_image
from maskformer.coco_format import encode_ids
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.data.execution import original_errors
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_panoptic
from pipelines.data.reading import PACK_AGAIN
from pipelines.data.schema import RESIZED, require
from pipelines.data.stream import resized_images
from pipelines.errors import UserError
from pipelines.storage import locate

_ROWS_PER_TASK = 8


@dataclass(frozen=True)
class ScoredImage:
    """The prediction for an image, compared with its ground truth."""

    file_name: str
    """Name of the PNG in the folder of predictions."""
    segments_info: list[dict[str, Any]]
    analysis: ImageAnalysis

    @property
    def image_id(self) -> int:
        return self.analysis.image_id

    def to_json(self) -> str:
        """Return one line of JSON; `from_json` reads it back unchanged."""
        return json.dumps({"file_name": self.file_name, "segments_info": self.segments_info, **self.analysis.to_json()})

    @classmethod
    def from_json(cls, line: str) -> "ScoredImage":
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        found = json.loads(line)
        return cls(str(found["file_name"]), list(found["segments_info"]), ImageAnalysis.from_json(found))


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


def score_row(segment: Segmenter, row: dict[str, Any]) -> PanopticQuality:
    """Segment one RESIZED row and return its PQ statistics."""
    quality = PanopticQuality(segment.taxonomy)
    size = row["original_height"], row["original_width"]
    prediction = segment.segment_resized(_pixels(row), size)
    quality.update(prediction, (_truth(row), row["segments"]), row["image_id"])
    return quality


def score_images(
    saved: SavedModel, samples: PackedSet, *, png_folder: str, predictors: int, device: str, cpus: float
) -> Iterator[ScoredImage]:
    """Segment every image of `samples` once and yield the results in any order.

    Args:
        png_folder: path or URI of the folder to write the PNGs to.
        predictors: number of processes with a copy of the model, each with one GPU on `cuda`.
        device: cpu or cuda.
        cpus: CPUs of each predictor, and of each task.

    Raises:
        UserError: a packed row is damaged, or a PNG cannot be written.
    """
    size = saved.config.evaluation
    images = resized_images(
        samples,
        short_side=size.short_side,
        long_side=size.long_side,
        samples_per_task=_ROWS_PER_TASK,
        cpus=cpus,
    )
    logits = images.map_batches(
        _Network,  # pyright: ignore[reportArgumentType] -- Ray accepts a class; its annotations allow only functions
        fn_constructor_args=(ray.put(saved), device),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=predictors),
        num_cpus=cpus,
        num_gpus=1 if device == "cuda" else 0,
        max_restarts=-1,  # Ray's default; stated, it keeps Ray from reading in the actors (operator fusion)
    )
    results = logits.map_batches(
        _Fuse(saved.config.panoptic, saved.taxonomy, png_folder),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
    )
    with original_errors():
        for row in results.iter_rows():
            yield ScoredImage.from_json(row["result"])


class _Network:
    """The actor: replaces the pixels of RESIZED rows by the logits of the queries that matter."""

    def __init__(self, saved: Any, device: str) -> None:
        torch.set_num_threads(1)  # parallelism comes from the number of predictors
        self._segment = segmenter(ray.get(saved), device)

    def __call__(self, table: pa.Table) -> pa.Table:
        require(table, RESIZED, "A batch for inference")
        rows = []
        for row in table.to_pylist():
            class_logits, mask_logits = self._segment.run_network(_pixels(row))
            rows.append(
                {
                    **{key: value for key, value in row.items() if key != "image"},
                    "class_logits": class_logits.float().numpy().tobytes(),
                    "mask_logits": mask_logits.float().numpy().tobytes(),
                    "mask_shape": list(mask_logits.shape),
                }
            )
        return pa.Table.from_pylist(rows, schema=_LOGITS)


_LOGITS = pa.schema(
    [
        *(field for field in RESIZED if field.name != "image"),
        pa.field("class_logits", pa.large_binary()),  # [kept, K + 1] float32
        pa.field("mask_logits", pa.large_binary()),  # [kept, h4, w4] float32
        pa.field("mask_shape", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class _Fuse:
    """The task after the network: maps its rows to the results of each image."""

    config: PanopticConfig
    taxonomy: Taxonomy
    png_folder: str

    def __call__(self, table: pa.Table) -> pa.Table:
        torch.set_num_threads(1)
        folder = locate(self.png_folder)
        results = []
        for row in table.to_pylist():
            kept, height, width = row["mask_shape"]
            class_logits = np.frombuffer(row["class_logits"], np.float32).reshape(kept, self.taxonomy.num_classes + 1)
            mask_logits = np.frombuffer(row["mask_logits"], np.float32).reshape(kept, height, width)
            resized, original = (row["height"], row["width"]), (row["original_height"], row["original_width"])
            ids, segments = panoptic(
                torch.tensor(class_logits),
                torch.tensor(mask_logits),
                (resized, resized, original),
                self.config,
                self.taxonomy,
            )
            name = f"{row['image_id']:012d}.png"
            png = io.BytesIO()
            Image.fromarray(encode_ids(ids)).save(png, "PNG")
            (folder / name).write_bytes(png.getvalue())
            truth = _truth(row), row["segments"]
            try:
                analysis = analyze_image((ids, segments), truth, self.taxonomy, row["image_id"])
            except ValueError as error:
                raise UserError(f"The result of an image cannot be compared: {error}") from error
            results.append({"result": ScoredImage(name, segments, analysis).to_json()})
        return pa.Table.from_pylist(results)


def _truth(row: dict[str, Any]) -> np.ndarray:
    """Return the segment ids of the ground truth, int32 [H, W], of a row of RESIZED or _LOGITS.

    Raises:
        UserError: its PNG is not usable.
    """
    try:
        return decode_panoptic(row["panoptic"], (row["original_height"], row["original_width"]))
    except ValueError as error:
        raise UserError(f"Image {row['image_id']} of the pack cannot be used: {error}. {PACK_AGAIN}.") from error


def _pixels(row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(row["image"], np.uint8).reshape(row["height"], row["width"], 3)
