"""Panoptic quality from index maps in memory (Kirillov et al., arXiv:1801.00868, section 4).

The results equal those of the official panopticapi, corner cases included, without PNG files. Contributions are kept
per image, so accumulators of several workers can be merged in any order with identical results, and no image can be
counted twice.

Letters: H W image, T segments of the ground truth, P of the prediction, S of either (void is segment 0 in all three),
R runs of equal pixels.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Integer

from maskformer.taxonomy import Taxonomy

Segmentation: TypeAlias = tuple[Integer[np.ndarray, "_ _"], Sequence[Mapping[str, Any]]]
"""An index map [H, W] (0 is void) and its `segments_info`: `id`, `category_id`, and `iscrowd` in ground truth."""


class ClassQuality(NamedTuple):
    """Counts and qualities of one class, over one image or several; the qualities are fractions 0..1."""

    category_id: int
    iou: float
    """Sum of the intersections over union of the true positives."""
    tp: int
    fp: int
    fn: int

    @property
    def pq(self) -> float:
        """Panoptic quality, `sq * rq`; 0 for a class that is neither present nor predicted."""
        return self.iou / (self.tp + 0.5 * self.fp + 0.5 * self.fn) if self.tp else 0.0

    @property
    def sq(self) -> float:
        """Segmentation quality: the mean intersection over union of the true positives."""
        return self.iou / self.tp if self.tp else 0.0

    @property
    def rq(self) -> float:
        """Recognition quality: the F1 score of the segments."""
        return self.tp / (self.tp + 0.5 * self.fp + 0.5 * self.fn) if self.tp else 0.0


class AverageQuality(NamedTuple):
    """Means over the classes that are present or predicted, as fractions 0..1; nan if there is no such class."""

    pq: float
    sq: float
    rq: float
    num_classes: int
    """Number of classes that the means include."""


@dataclass(frozen=True)
class PanopticResult:
    """Qualities over a set of images, as fractions 0..1."""

    all: AverageQuality
    things: AverageQuality
    stuff: AverageQuality
    per_class: dict[str, ClassQuality]
    """Quality of every class of the taxonomy, by name."""
    num_images: int

    @property
    def pq(self) -> float:
        return self.all.pq

    @property
    def sq(self) -> float:
        return self.all.sq

    @property
    def rq(self) -> float:
        return self.all.rq


class PanopticQuality:
    """Accumulator of panoptic quality, image by image; picklable."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self._images: dict[int | str, dict[int, ClassQuality]] = {}

    def update(self, prediction: Segmentation, truth: Segmentation, image_id: int | str) -> dict[int, ClassQuality]:
        """Count one image and return its contribution by category id, for the classes present or predicted in it.

        Two segments match if their intersection over union is above 0.5. Void pixels of the ground truth are not part
        of the union. An unmatched prediction is ignored if more than half of it is void or crowd of its class (of
        several crowd segments of a class only the last listed one counts, as in panopticapi).

        Raises:
            ValueError: the image was counted before, the sizes differ, a category is unknown, or an index map and its
                segments do not have the same ids. The message names the image, and nothing is counted.
        """
        if image_id in self._images:
            raise ValueError(f"Image {image_id} was counted before; count each image once.")
        predicted = _read_segments(*prediction, self.taxonomy, f"the prediction of image {image_id}")
        true = _read_segments(*truth, self.taxonomy, f"the ground truth of image {image_id}")
        if prediction[0].shape != truth[0].shape:
            raise ValueError(
                f"The maps of image {image_id} differ in size: prediction {tuple(prediction[0].shape)}, ground truth "
                f"{tuple(truth[0].shape)}; resize the prediction to the original image."
            )
        contribution = {quality.category_id: quality for quality in _compare(predicted, true, self.taxonomy)}
        self._images[image_id] = contribution
        return contribution

    def merge(self, other: "PanopticQuality") -> "PanopticQuality":
        """Add the images of `other` and return self.

        Raises:
            ValueError: the taxonomies differ, or both have counted the same image; nothing is changed.
        """
        if other.taxonomy != self.taxonomy:
            raise ValueError(
                f"Cannot merge panoptic qualities of different taxonomies ({self.taxonomy.num_classes} and "
                f"{other.taxonomy.num_classes} classes); score both sides with the same taxonomy."
            )
        shared = self._images.keys() & other._images.keys()
        if shared:
            raise ValueError(
                f"Both sides have counted {len(shared)} of the same images, for example image {next(iter(shared))}; "
                f"assign each image to one worker only."
            )
        self._images.update(other._images)
        return self

    def result(self) -> PanopticResult:
        """Return the qualities over all images so far, independent of the order of updates and merges."""
        by_category: defaultdict[int, list[ClassQuality]] = defaultdict(list)
        for contribution in self._images.values():
            for category_id, quality in contribution.items():
                by_category[category_id].append(quality)
        per_class = {
            category.name: ClassQuality(
                category.id,
                # fsum rounds once, so the result does not depend on the order of the images.
                iou=math.fsum(quality.iou for quality in by_category[category.id]),
                tp=sum(quality.tp for quality in by_category[category.id]),
                fp=sum(quality.fp for quality in by_category[category.id]),
                fn=sum(quality.fn for quality in by_category[category.id]),
            )
            for category in self.taxonomy.categories
        }
        qualities = list(per_class.values())
        num_things = self.taxonomy.num_things
        return PanopticResult(
            all=_average(qualities),
            things=_average(qualities[:num_things]),
            stuff=_average(qualities[num_things:]),
            per_class=per_class,
            num_images=len(self._images),
        )


def _average(qualities: Iterable[ClassQuality]) -> AverageQuality:
    counted = [quality for quality in qualities if quality.tp + quality.fp + quality.fn > 0]
    if not counted:
        # panopticapi divides by zero here. There is nothing to average, and 0 would look like a bad result.
        return AverageQuality(math.nan, math.nan, math.nan, num_classes=0)
    return AverageQuality(
        pq=math.fsum(quality.pq for quality in counted) / len(counted),
        sq=math.fsum(quality.sq for quality in counted) / len(counted),
        rq=math.fsum(quality.rq for quality in counted) / len(counted),
        num_classes=len(counted),
    )


class _Segments(NamedTuple):
    """One index map and its segments by ascending id, void first."""

    label: str
    """The map, for messages."""
    pixels: Integer[np.ndarray, " HW"]
    ids: Integer[np.ndarray, " S"]
    classes: Integer[np.ndarray, " S"]
    """Class indices; -1 for void."""
    crowd: Bool[np.ndarray, " S"]
    crowd_of_class: dict[int, int]
    """Row of the crowd segment of each class index that has one."""


def _read_segments(
    pixels: Integer[np.ndarray, "_ _"], infos: Sequence[Mapping[str, Any]], taxonomy: Taxonomy, label: str
) -> _Segments:
    pixels = np.asarray(pixels)
    if pixels.ndim != 2 or pixels.dtype.kind not in "iu" or not pixels.size:
        raise ValueError(
            f"An index map is a non-empty integer array [H,W], got {pixels.dtype} {list(pixels.shape)} in {label}."
        )
    for info in infos:
        missing = {"id", "category_id"} - info.keys()
        if missing:
            raise ValueError(f"A segment needs id and category_id, got {dict(info)} in {label}; add {sorted(missing)}.")
        if info["category_id"] not in taxonomy:
            raise ValueError(
                f"Segment {info['id']} in {label} has the unknown category_id {info['category_id']}; use category ids "
                f"of the taxonomy, not class indices."
            )
    listed = [int(info["id"]) for info in infos]
    if len(set(listed)) < len(listed) or min(listed, default=1) < 1:
        raise ValueError(
            f"Segment ids must be positive and differ (0 is void), got {listed} in {label}; renumber the segments."
        )
    ordered = sorted(infos, key=lambda info: info["id"])
    classes = [taxonomy.class_index(info["category_id"]) for info in ordered]
    ids = [0, *sorted(listed)]
    return _Segments(
        label,
        pixels.ravel(),
        ids=np.array(ids, dtype=np.int64),
        classes=np.array([-1, *classes], dtype=np.int64),
        crowd=np.array([False, *(bool(info.get("iscrowd", 0)) for info in ordered)]),
        crowd_of_class={
            taxonomy.class_index(info["category_id"]): ids.index(info["id"]) for info in infos if info.get("iscrowd", 0)
        },
    )


def _compare(predicted: _Segments, true: _Segments, taxonomy: Taxonomy) -> Iterable[ClassQuality]:
    overlap = _overlap(true, predicted)
    true_area, predicted_area = overlap.sum(axis=1), overlap.sum(axis=0)
    for segments, area in ((true, true_area), (predicted, predicted_area)):
        absent = segments.ids[1:][area[1:] == 0]
        if absent.size:
            raise ValueError(
                f"The segments {absent.tolist()} have no pixel in {segments.label}; remove them from segments_info."
            )

    intersection = overlap[1:, 1:]
    union = true_area[1:, None] + (predicted_area - overlap[0])[None, 1:] - intersection
    iou = intersection / union
    same_class = true.classes[1:, None] == predicted.classes[None, 1:]
    match = (iou > 0.5) & same_class & ~true.crowd[1:, None]  # above one half, so at most one per row and column
    matched_rows, matched_columns = np.nonzero(match)

    ignorable = overlap[0].copy()
    for column, class_index in enumerate(predicted.classes):
        if class_index in true.crowd_of_class:
            ignorable[column] += overlap[true.crowd_of_class[class_index], column]
    ignored = ignorable[1:] / predicted_area[1:] > 0.5

    matched_classes = true.classes[1:][matched_rows]
    missed_classes = true.classes[1:][~match.any(axis=1) & ~true.crowd[1:]]
    wrong_classes = predicted.classes[1:][~match.any(axis=0) & ~ignored]
    matched_iou = iou[matched_rows, matched_columns]
    for class_index in np.unique(np.concatenate([matched_classes, missed_classes, wrong_classes])).tolist():
        yield ClassQuality(
            taxonomy.category_id(class_index),
            iou=math.fsum(matched_iou[matched_classes == class_index]),
            tp=int(np.count_nonzero(matched_classes == class_index)),
            fp=int(np.count_nonzero(wrong_classes == class_index)),
            fn=int(np.count_nonzero(missed_classes == class_index)),
        )


def _overlap(true: _Segments, predicted: _Segments) -> Integer[np.ndarray, "T P"]:
    """Count the pixels that each pair of segments has in common."""
    # Index maps consist of runs of equal pixels. Looking up one pixel per run is ten times faster than looking up all,
    # and ids up to 2^24 need no table of that length.
    changes = (true.pixels[1:] != true.pixels[:-1]) | (predicted.pixels[1:] != predicted.pixels[:-1])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    lengths = np.diff(starts, append=true.pixels.size)
    overlap = np.zeros((len(true.ids), len(predicted.ids)), dtype=np.int64)
    np.add.at(overlap, (_rows(true, starts), _rows(predicted, starts)), lengths)
    return overlap


def _rows(segments: _Segments, starts: Integer[np.ndarray, " R"]) -> Integer[np.ndarray, " R"]:
    values = segments.pixels[starts].astype(np.int64)
    rows = np.minimum(np.searchsorted(segments.ids, values), len(segments.ids) - 1)
    unknown = np.unique(values[segments.ids[rows] != values])
    if unknown.size:
        raise ValueError(
            f"The ids {unknown[:8].tolist()} are in the map but not in the segments_info of {segments.label}; "
            f"list every segment, or set its pixels to 0 (void)."
        )
    return rows
