"""Average precision of the things of panoptic results, through COCO's own code (pycocotools).

The predicted thing segments are the instances, with their scores. They do not overlap, so the numbers are below those
of a model's instances, which may. Void pixels get no special treatment: COCO's instances know crowd only.

Letters: H W image, S segments of a map, R runs of equal pixels.
"""

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Integer
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskformer.panoptic_quality import ImageId, image_order
from maskformer.segment_matching import read_segments, rows_of
from maskformer.taxonomy import Taxonomy


@dataclass(frozen=True)
class MaskAP:
    """Average precisions of thing masks, as fractions 0..1; nan where the ground truth has no object to find."""

    ap: float
    """Mean over the IoU thresholds 0.50, 0.55, ..., 0.95 and over the classes in the ground truth."""
    ap50: float
    ap75: float
    small: float
    """Of objects of at most 32x32 pixels."""
    medium: float
    large: float
    """Of objects of at least 96x96 pixels."""
    per_class: dict[str, float]
    """`ap` of every thing of the taxonomy, by name."""


def encode_things(
    ids: Integer[np.ndarray, "H W"], segments: Sequence[Mapping[str, Any]], taxonomy: Taxonomy
) -> list[dict[str, Any]]:
    """Encode the thing segments of one image as COCO's instances, in the order of `segments`.

    Returns:
        for each thing `category_id`, `segmentation` (`size` [H, W] and compressed `counts` as text, ready for JSON),
        `area` in pixels, and `score` and `iscrowd` if the segment has them.

    Raises:
        ValueError: a category is unknown, or the index map and its segments do not have the same ids.
    """
    # COCO's run lengths go down the columns.
    read = read_segments(ids.T, segments, taxonomy, "a map of segments")
    starts = np.concatenate([[0], np.flatnonzero(read.pixels[1:] != read.pixels[:-1]) + 1])
    ends = np.append(starts[1:], read.pixels.size)
    rows = rows_of(read, starts)
    order = np.argsort(rows, kind="stable")
    first = np.searchsorted(rows[order], np.arange(len(read.ids) + 2))
    absent = read.ids[np.diff(first)[1:] == 0]
    if absent.size:
        raise ValueError(
            f"The segments {absent.tolist()} have no pixel in {read.label}; remove them from segments_info."
        )
    row_of = {segment_id: row for row, segment_id in enumerate(read.ids.tolist(), 1)}
    instances: list[dict[str, Any]] = []
    for segment in segments:
        if not taxonomy.is_thing(taxonomy.class_index(segment["category_id"])):
            continue
        row = row_of[segment["id"]]
        runs = order[first[row] : first[row + 1]]
        edges = np.stack([starts[runs], ends[runs]], axis=1).ravel()  # where the mask begins, ends, begins, ...
        counts = np.diff(edges, prepend=0, append=read.pixels.size)
        # A mask that reaches the last pixel ends with its own run.
        uncompressed: Any = {"size": list(ids.shape), "counts": counts if counts[-1] else counts[:-1]}
        compressed = cast("dict[str, bytes]", coco_mask.frPyObjects(uncompressed, *ids.shape))
        instances.append(
            {
                "category_id": segment["category_id"],
                "segmentation": {"size": list(ids.shape), "counts": compressed["counts"].decode("ascii")},
                "area": int(counts[1::2].sum()),
                **{key: segment[key] for key in ("score", "iscrowd") if segment.get(key) is not None},
            }
        )
    return instances


def mask_ap(
    predicted: Mapping[ImageId, Sequence[Mapping[str, Any]]],
    true: Mapping[ImageId, Sequence[Mapping[str, Any]]],
    sizes: Mapping[ImageId, tuple[int, int]],
    taxonomy: Taxonomy,
) -> MaskAP:
    """Return the average precisions of predicted things, as `COCOeval` computes them.

    A detection of a crowd segment of its class is neither right nor wrong. A segment without a `score`, as in results
    of other programs, has score 1; with all scores equal, an average precision is little more than a precision. Of a
    class in an image, the 100 highest scores count. The result depends neither on the order of images nor on that of
    their segments. What other threads print to standard output meanwhile is lost, as pycocotools' own lines are.

    Args:
        predicted: things by image id, as `encode_things` returns them; an empty list for an image without any.
        true: the same of the ground truth, with `iscrowd`.
        sizes: height and width of each image.

    Raises:
        ValueError: the three have different image ids, a category is no thing of the taxonomy, or a mask has not the
            size of its image.
    """
    for name, other in (("predictions", predicted), ("sizes", sizes)):
        different = other.keys() ^ true.keys()
        if different:
            raise ValueError(
                f"Mask AP needs {name} of exactly the images of the ground truth, got {len(other)} for {len(true)}, of "
                f"which {len(different)} are on one side only, for example {min(different, key=image_order)!r}; give "
                f"an empty list for an image without things."
            )
    things = [category for category in taxonomy.categories if category.isthing]
    image_ids = sorted(true, key=image_order)
    # Images get numbers, because COCOeval turns a mixture of numbers and text into text.
    images = [
        {"id": number, "height": sizes[image_id][0], "width": sizes[image_id][1]}
        for number, image_id in enumerate(image_ids, start=1)
    ]
    dataset = {"images": images, "categories": [{"id": category.id, "name": category.name} for category in things]}
    thing_ids = {category.id for category in things}
    sides = [
        {**dataset, "annotations": _annotations(side, image_ids, sizes, thing_ids, defaults)}
        for side, defaults in ((true, {"iscrowd": 0}), (predicted, {"score": 1.0}))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation: Any = COCOeval(*map(_index, sides), iouType="segm")
        evaluation.evaluate()
        evaluation.accumulate()
    # [thresholds, recalls, classes, areas, numbers of detections]; of the last, 100.
    precision = evaluation.eval["precision"][..., -1]
    everywhere = precision[..., 0]
    return MaskAP(
        ap=_mean(everywhere),
        ap50=_mean(everywhere[0]),
        ap75=_mean(everywhere[5]),
        small=_mean(precision[..., 1]),
        medium=_mean(precision[..., 2]),
        large=_mean(precision[..., 3]),
        per_class={category.name: _mean(everywhere[:, :, column]) for column, category in enumerate(things)},
    )


def _annotations(
    side: Mapping[ImageId, Sequence[Mapping[str, Any]]],
    image_ids: Iterable[ImageId],
    sizes: Mapping[ImageId, tuple[int, int]],
    thing_ids: set[int],
    defaults: Mapping[str, Any],
) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    for number, image_id in enumerate(image_ids, start=1):
        instances = [{**defaults, **instance} for instance in side[image_id]]
        # Equal scores are taken in this order.
        instances.sort(key=lambda instance: (instance["category_id"], instance["segmentation"]["counts"]))
        for instance in instances:
            if instance["category_id"] not in thing_ids:
                raise ValueError(
                    f"Mask AP is defined for things, got category_id {instance['category_id']} in image {image_id}; "
                    f"give the things of encode_things, with the same taxonomy."
                )
            if tuple(instance["segmentation"]["size"]) != tuple(sizes[image_id]):
                raise ValueError(
                    f"A mask of image {image_id} has the size {tuple(instance['segmentation']['size'])} and the image "
                    f"{tuple(sizes[image_id])}; resize the prediction to the original image."
                )
            # An id of 0 would mean no match.
            annotations.append({**instance, "image_id": number, "id": len(annotations) + 1})
    return annotations


def _index(dataset: dict[str, Any]) -> COCO:
    coco: Any = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _mean(precision: Float[np.ndarray, "..."]) -> float:
    """Return the mean over what is defined; COCOeval marks the rest by -1."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else math.nan
