"""The pictures of a report: input, ground truth, prediction and mistakes of an image, as small JPEGs."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from PIL import Image

from maskformer.analysis.error_map import error_map
from maskformer.analysis.lost_quality import Cause
from maskformer.draw import overlay
from maskformer.image_files import MAX_BYTES, load_image, open_image
from pipelines.data.execution import mapped, outputs
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import FORMATS, decode_panoptic
from pipelines.data.reading import PACK_AGAIN, UnusableRowError, read_files, unusable
from pipelines.errors import UserError
from pipelines.evaluation.result import EvaluationResult
from pipelines.storage import locate

_SIDE, _QUALITY = 360, 75
"""Pixels of the long side of a picture, and quality of its JPEG: 15 to 25 KB of a photograph."""
_IMAGES_PER_TASK = 10

_Segments = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of an image, as JPEGs."""

    image_id: int
    input: bytes
    truth: bytes
    prediction: bytes
    errors: bytes
    other: bytes | None
    """The prediction of the evaluation compared with, if there is one."""


def draw_pictures(
    evaluation: EvaluationResult,
    other: EvaluationResult | None,
    image_ids: Sequence[int],
    colors: Mapping[Cause, tuple[int, int, int]],
    cpus: float,
) -> Iterator[Pictures]:
    """Yield the pictures of these images in any order, drawn in Ray Data tasks.

    Args:
        colors: RGB of each cause of lost quality.
        cpus: CPUs of each task.

    Raises:
        UserError: a file of the data or of the predictions is missing or damaged.
    """
    places = {image_id: index for index, image_id in enumerate(evaluation.data.image_ids.tolist())}
    predicted, others = (
        {image.image_id: (image.file_name, image.segments_info) for image in each.images} if each else {}
        for each in (evaluation, other)
    )
    wanted = [(places[image_id], predicted[image_id], others.get(image_id)) for image_id in image_ids]
    if not wanted:
        return
    parts = [wanted[start : start + _IMAGES_PER_TASK] for start in range(0, len(wanted), _IMAGES_PER_TASK)]
    tasks = ray.data.from_items([{"images": json.dumps(part)} for part in parts], override_num_blocks=len(parts))
    draw = _Draw(evaluation.data, evaluation.png_folder, other.png_folder if other else "", dict(colors))
    for table in outputs(mapped(tasks, draw, "draw report", in_order=False, task_cpus=min(1.0, cpus))):
        for row in table.to_pylist():
            yield Pictures(**row)


@dataclass(frozen=True)
class _Draw:
    """The task: maps images to their pictures."""

    samples: PackedSet
    png_folder: str
    other_folder: str
    colors: dict[Cause, tuple[int, int, int]]

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [
            self._drawn(index, named, other)
            for text in table["images"].to_pylist()
            for index, named, other in json.loads(text)
        ]
        return pa.Table.from_pylist(rows, schema=_PICTURES)

    def _predicted(
        self, folder: str, name: str, segments: _Segments, size: tuple[int, int]
    ) -> tuple[npt.NDArray[Any], _Segments]:
        file = locate(folder) / name
        try:
            return decode_panoptic(file.read_bytes(MAX_BYTES), size), segments
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be drawn: {error}. Evaluate again into another --output.") from error

    def _drawn(
        self,
        index: int,
        named: tuple[str, _Segments],
        other_named: tuple[str, _Segments] | None,
    ) -> dict[str, Any]:
        (entry,) = self.samples.index.take([index]).to_pylist()
        size = entry["height"], entry["width"]
        prediction = self._predicted(self.png_folder, *named, size)
        other = self._predicted(self.other_folder, *other_named, size) if other_named else None
        try:
            panoptic, content = read_files(self.samples.shards[entry["shard"]], entry, "panoptic", "image")
            taxonomy, truth = self.samples.taxonomy, (decode_panoptic(panoptic, size), entry["segments"])
            image = _small(content)
        except UnusableRowError as error:
            raise UserError(f"{error}. {PACK_AGAIN}.") from error
        except ValueError as error:
            raise UserError(f"{unusable(self.samples.shards[entry['shard']], entry, error)}. {PACK_AGAIN}.") from error
        sides = [_present(_resized(ids, image.shape[:2]), segments) for ids, segments in (truth, prediction)]
        return {
            "image_id": entry["image_id"],
            "input": _jpeg(image),
            "truth": _jpeg(overlay(image, *sides[0], taxonomy)),
            "prediction": _jpeg(overlay(image, *sides[1], taxonomy)),
            "errors": _jpeg(error_map(image, sides[1], sides[0], taxonomy, self.colors)),
            "other": other
            and _jpeg(overlay(image, *_present(_resized(other[0], image.shape[:2]), other[1]), taxonomy)),
        }


_PICTURES = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        *(pa.field(name, pa.binary()) for name in ("input", "truth", "prediction", "errors", "other")),
    ]
)


def _small(content: bytes | memoryview) -> npt.NDArray[np.uint8]:
    """Return the image with a long side of at most `_SIDE` pixels, tiny ones enlarged by repeating pixels."""
    image = open_image(content, FORMATS)
    image.draft("RGB", (_SIDE, _SIDE))  # a JPEG can be decoded at a fraction of its size
    load_image(image)
    image = image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    times = max(1, _SIDE // max(image.size))
    return np.asarray(image).repeat(times, axis=0).repeat(times, axis=1)


def _resized(ids: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return the map with another size: of each block of pixels the one in the middle."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * found / wanted).astype(int) for wanted, found in zip(shape, ids.shape, strict=True)
    )
    return ids[rows[:, None], columns]


def _present(ids: npt.NDArray[Any], segments: _Segments) -> tuple[npt.NDArray[Any], _Segments]:
    """Return the map with those of its segments that still have a pixel."""
    found = set(np.unique(ids).tolist())
    return ids, [segment for segment in segments if segment["id"] in found]


def _jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
