"""Boundary panoptic quality (Cheng et al., "Boundary IoU", arXiv:2103.16562).

The boundary of a segment is its pixels within a distance of its contour; pixels at the border of the image belong to
it. A pair of segments counts with the smaller of its mask IoU and the IoU of its boundaries, so that a large segment
with a coarse contour does not count as a good one. Everything else is as in panoptic quality.

Letters: H W image, T segments of the ground truth, P of the prediction, S of either (void is segment 0 in all three),
R runs of equal pixels.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer

from maskformer.panoptic_quality import (
    ClassQuality,
    Segmentation,
    _read_segments,  # pyright: ignore[reportPrivateUsage]  # one reading of segments for all qualities
    _rows,  # pyright: ignore[reportPrivateUsage]
    _Segments,  # pyright: ignore[reportPrivateUsage]
)
from maskformer.taxonomy import Taxonomy

WIDTH_RATIO = 0.02
"""Width of boundaries as a share of the image's diagonal, as in the code of the paper's authors."""


def boundary_quality(prediction: Segmentation, truth: Segmentation, taxonomy: Taxonomy) -> dict[int, ClassQuality]:
    """Return one image's contribution to boundary PQ by category id, for the classes present or predicted in it.

    Two segments match if the smaller of their mask IoU and boundary IoU is above 0.5, and this is what they add to the
    sum of IoU. Void pixels of the ground truth are part of neither union. An unmatched prediction is ignored as in
    panoptic quality: if more than half of its pixels, not only of its boundary, is void or crowd of its class.

    Raises:
        ValueError: the sizes differ, a category is unknown, or an index map and its segments do not have the same ids.
    """
    predicted = _read_segments(*prediction, taxonomy, "the prediction")
    true = _read_segments(*truth, taxonomy, "the ground truth")
    if prediction[0].shape != truth[0].shape:
        raise ValueError(
            f"The maps differ in size: prediction {tuple(prediction[0].shape)}, ground truth {tuple(truth[0].shape)}; "
            f"resize the prediction to the original image."
        )
    height, width = truth[0].shape
    overlap, boundary_overlap = _overlaps(true, predicted, (height, width), boundary_width(height, width))
    iou = np.minimum(_iou(*overlap), _iou(*boundary_overlap))
    return _count(iou, overlap.pairs, true, predicted, taxonomy)


def boundary_width(height: int, width: int) -> int:
    """Return the width of boundaries in an image, in pixels: 2 % of its diagonal, rounded, at least 1.

    A half is rounded to the even number, as in the code of the paper's authors.
    """
    return max(1, round(WIDTH_RATIO * math.sqrt(height**2 + width**2)))


def boundaries(ids: Integer[np.ndarray, "H W"], width: int) -> Bool[np.ndarray, "H W"]:
    """Return which pixels belong to the boundary of their own segment, for all segments of a map at once.

    A pixel is inside a segment, not at its boundary, if the whole square of 2 `width` + 1 pixels around it lies in the
    image and belongs to the segment.
    """
    boundary = np.ones(ids.shape, dtype=bool)
    height, length = ids.shape
    if min(height, length) > 2 * width:
        inner = slice(width, length - width)
        # A square is of one segment if each of its rows is, and its middle column.
        rows = _all_in_window(ids[:, 1:] == ids[:, :-1], 2 * width, axis=1)
        column = _all_in_window(ids[1:, inner] == ids[:-1, inner], 2 * width, axis=0)
        boundary[width : height - width, inner] = ~(_all_in_window(rows, 2 * width + 1, axis=0) & column)
    return boundary


def _all_in_window(values: Bool[np.ndarray, "_ _"], length: int, axis: int) -> Bool[np.ndarray, "_ _"]:
    """Return where a number of consecutive values are all true; the result is `length` - 1 shorter."""
    # A window is two overlapping shorter ones, so its length can double in each pass.
    values, covered = np.moveaxis(values, axis, 0), 1
    while covered < length:
        step = min(covered, length - covered)
        values = values[:-step] & values[step:]
        covered += step
    return np.moveaxis(values, 0, axis)


class _Overlap(NamedTuple):
    """Counts of pixels, of whole segments or of boundaries; void is row and column 0."""

    pairs: Int64[np.ndarray, "T P"]
    """Pixels that a pair has in common. Of boundaries too, all void pixels of the ground truth count."""
    true: Int64[np.ndarray, " T"]
    predicted: Int64[np.ndarray, " P"]


def _overlaps(true: _Segments, predicted: _Segments, size: tuple[int, int], width: int) -> tuple[_Overlap, _Overlap]:
    """Count the pixels of segments and pairs of segments: all of them, and those at boundaries."""
    # Void is no segment, so it has no inside.
    at_true = boundaries(true.pixels.reshape(size), width).ravel() | (true.pixels == 0)
    at_predicted = boundaries(predicted.pixels.reshape(size), width).ravel()
    columns = (true.pixels, predicted.pixels, at_true, at_predicted)
    changes = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    lengths = np.diff(starts, append=true.pixels.size)
    counts = np.zeros((len(true.ids), len(predicted.ids), 2, 2), dtype=np.int64)
    place = (
        _rows(true, starts),
        _rows(predicted, starts),
        at_true[starts].astype(int),
        at_predicted[starts].astype(int),
    )
    np.add.at(counts, place, lengths)
    for segments, area in ((true, counts.sum(axis=(1, 2, 3))), (predicted, counts.sum(axis=(0, 2, 3)))):
        absent = segments.ids[1:][area[1:] == 0]
        if absent.size:
            raise ValueError(
                f"The segments {absent.tolist()} have no pixel in {segments.label}; remove them from segments_info."
            )
    all_pixels = counts.sum(axis=(2, 3))
    return (
        _Overlap(all_pixels, all_pixels.sum(axis=1), all_pixels.sum(axis=0)),
        _Overlap(counts[..., 1, 1], counts[:, :, 1].sum(axis=(1, 2)), counts[..., 1].sum(axis=(0, 2))),
    )


def _iou(
    pairs: Int64[np.ndarray, "T P"], true: Int64[np.ndarray, " T"], predicted: Int64[np.ndarray, " P"]
) -> Float64[np.ndarray, "T1 P1"]:
    """Return the IoU of each pair of segments without void."""
    intersection = pairs[1:, 1:]
    return intersection / (true[1:, None] + (predicted - pairs[0])[None, 1:] - intersection)


def _count(
    iou: Float64[np.ndarray, "T1 P1"],
    overlap: Int64[np.ndarray, "T P"],
    true: _Segments,
    predicted: _Segments,
    taxonomy: Taxonomy,
) -> dict[int, ClassQuality]:
    same_class = true.classes[1:, None] == predicted.classes[None, 1:]
    match = (iou > 0.5) & same_class & ~true.crowd[1:, None]
    ignorable = overlap[0].copy()
    for column, class_index in enumerate(predicted.classes.tolist()):
        if class_index in true.crowd_of_class:
            ignorable[column] += overlap[true.crowd_of_class[class_index], column]
    ignored = ignorable[1:] / overlap.sum(axis=0)[1:] > 0.5

    matched_rows, matched_columns = np.nonzero(match)
    matched_classes = true.classes[1:][matched_rows]
    missed_classes = true.classes[1:][~match.any(axis=1) & ~true.crowd[1:]]
    wrong_classes = predicted.classes[1:][~match.any(axis=0) & ~ignored]
    matched_iou = iou[matched_rows, matched_columns]
    result: dict[int, ClassQuality] = {}
    for class_index in np.unique(np.concatenate([matched_classes, missed_classes, wrong_classes])).tolist():
        category_id = taxonomy.category_id(class_index)
        result[category_id] = ClassQuality(
            category_id,
            iou=math.fsum(matched_iou[matched_classes == class_index]),
            tp=int(np.count_nonzero(matched_classes == class_index)),
            fp=int(np.count_nonzero(wrong_classes == class_index)),
            fn=int(np.count_nonzero(missed_classes == class_index)),
        )
    return result
