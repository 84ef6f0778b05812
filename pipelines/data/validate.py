"""Validation of a data set: opens every image and PNG and compares them with the JSON.

`read_coco` checks what needs only the JSON. Errors make a data set unusable and stop the packer; warnings affect
only values that training does not read.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from maskformer.taxonomy import Taxonomy
from pipelines.data.coco import CocoDataset, CocoLayout, Record
from pipelines.data.pixels import MAX_SEGMENTS, decode_image, decode_panoptic, pixel_runs
from pipelines.progress import progress

_MAX_ID = 256**3 - 1


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of a data set."""

    code: str
    """Stable identifier of the kind of fault, such as `png-size`."""
    severity: Literal["error", "warning"]
    file: str
    image_id: int
    segment_id: int | None = None
    message: str
    """What is wrong and how to correct it, in one sentence."""

    def __str__(self) -> str:
        segment = "" if self.segment_id is None else f", segment {self.segment_id}"
        return f"{self.file} (image {self.image_id}{segment}): {self.message} [{self.code}]"


def validate(dataset: CocoDataset, threads: int) -> list[Fault]:
    """Check every record in parallel and return the faults in the order of the records."""
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(partial(check_record, dataset.layout, dataset.taxonomy), dataset.records)
        return [fault for faults in progress(found, len(dataset.records), "images checked") for fault in faults]


def check_record(layout: CocoLayout, taxonomy: Taxonomy, record: Record) -> list[Fault]:
    """Open the image and the PNG of `record` and return all faults; an unreadable file is a fault."""
    return _check_image(layout, record) + _check_listed(layout, taxonomy, record) + _check_png(layout, record)


def _check_image(layout: CocoLayout, record: Record) -> list[Fault]:
    file = layout.images / record.image_file
    at = partial(Fault, severity="error", file=str(file), image_id=record.image_id)
    try:
        height, width, _ = decode_image(file.read_bytes()).shape
    except (OSError, ValueError) as error:
        return [at(code="image-unreadable", message=f"{error}; replace the file or remove the image from the JSON.")]
    if (height, width) != (record.height, record.width):
        message = (
            f"the image is {width} x {height}, but {record.width} x {record.height} in the JSON; "
            f"correct the JSON, or restore the image that was annotated."
        )
        return [at(code="image-size", message=message)]
    return []


def _check_listed(layout: CocoLayout, taxonomy: Taxonomy, record: Record) -> list[Fault]:
    at = partial(Fault, file=str(layout.panoptic / record.panoptic_file), image_id=record.image_id)
    faults: list[Fault] = []
    for identifier, count in Counter(segment["id"] for segment in record.segments).items():
        error = partial(at, severity="error", segment_id=identifier)
        if not 1 <= identifier <= _MAX_ID:
            message = f"the segment id {identifier} does not lie in 1..{_MAX_ID}; renumber the segment in JSON and PNG."
            faults.append(error(code="segment-id-range", message=message))
        if count > 1:
            message = f"the JSON lists the segment {count} times; give each segment a unique id."
            faults.append(error(code="segment-id-repeated", message=message))
    numbered = _count_numbered(taxonomy, record)
    if numbered > MAX_SEGMENTS:
        message = (
            f"the image has {numbered} segments to train on, but an index map can number {MAX_SEGMENTS}; merge some, "
            f"or cut the image into parts."
        )
        faults.append(at(code="segments-too-many", severity="error", message=message))
    for segment in record.segments:
        if segment["iscrowd"] and not taxonomy.is_thing(taxonomy.class_index(segment["category_id"])):
            message = "a stuff segment is marked as a crowd, so it is not trained on; set iscrowd to 0 if it should be."
            faults.append(at(code="crowd-stuff", severity="warning", segment_id=segment["id"], message=message))
    return faults


def _count_numbered(taxonomy: Taxonomy, record: Record) -> int:
    """Count what `index_map` numbers: each thing, and each class of stuff."""
    classes = [taxonomy.class_index(segment["category_id"]) for segment in record.segments if not segment["iscrowd"]]
    things = sum(map(taxonomy.is_thing, classes))
    return things + len({class_index for class_index in classes if not taxonomy.is_thing(class_index)})


def _check_png(layout: CocoLayout, record: Record) -> list[Fault]:
    file = layout.panoptic / record.panoptic_file
    at = partial(Fault, file=str(file), image_id=record.image_id)
    try:
        ids = decode_panoptic(file.read_bytes())
    except (OSError, ValueError) as error:
        message = f"{error}; replace the file or remove the image from the JSON."
        return [at(code="png-unreadable", severity="error", message=message)]
    if ids.shape != (record.height, record.width):
        message = (
            f"the PNG is {ids.shape[1]} x {ids.shape[0]}, but the image {record.width} x {record.height}; "
            f"regenerate the PNG at the size of the image."
        )
        return [at(code="png-size", severity="error", message=message)]

    areas, boxes = _measure(ids)
    listed = {segment["id"] for segment in record.segments}
    faults: list[Fault] = []
    for identifier in sorted(areas.keys() - listed - {0}):
        message = (
            f"the PNG has {areas[identifier]} pixels of a segment that is not in the JSON; add it, or set them to 0."
        )
        faults.append(at(code="segment-unlisted", severity="error", segment_id=identifier, message=message))
    for segment in record.segments:
        warning = partial(at, severity="warning", segment_id=segment["id"])
        if segment["id"] not in areas:
            message = "the JSON lists a segment without pixels in the PNG; remove it from the JSON, or add its pixels."
            faults.append(
                at(code="segment-without-pixels", severity="error", segment_id=segment["id"], message=message)
            )
            continue
        area, box = areas[segment["id"]], boxes[segment["id"]]
        if segment.get("area", area) != area:
            message = f"the area is {segment.get('area')} pixels in the JSON, but {area} in the PNG; correct the JSON."
            faults.append(warning(code="area", message=message))
        if segment.get("bbox", box) != box:
            message = f"the bbox is {segment.get('bbox')} in the JSON, but {box} in the PNG; correct the JSON."
            faults.append(warning(code="bbox", message=message))
    return faults


def _measure(ids: npt.NDArray[np.int32]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Return the area in pixels and the bounding box [x, y, width, height] of each id."""
    values, which, runs = pixel_runs(ids)
    count = len(values)
    left, top = np.full(count, ids.shape[1]), np.full(count, ids.shape[0])
    right, bottom, area = np.zeros(count, int), np.zeros(count, int), np.zeros(count, int)
    np.minimum.at(left, which, runs.x)
    np.minimum.at(top, which, runs.y)
    np.maximum.at(right, which, runs.x + runs.length)
    np.maximum.at(bottom, which, runs.y + 1)
    np.add.at(area, which, runs.length)
    boxes = np.stack([left, top, right - left, bottom - top], axis=1)
    return dict(zip(values.tolist(), area.tolist(), strict=True)), dict(
        zip(values.tolist(), boxes.tolist(), strict=True)
    )
