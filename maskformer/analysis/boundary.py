"""Boundary panoptic quality (Cheng et al., "Boundary IoU", arXiv:2103.16562).

The boundary of a segment is its pixels within a distance of its contour; pixels at the border of the image belong to
it. A pair of segments counts with the smaller of its mask IoU and the IoU of its boundaries, so that a large segment
with a coarse contour does not count as a good one. Everything else is as in panoptic quality.

Letters: H W image.
"""

import math

import numpy as np
from jaxtyping import Bool, Integer

from maskformer.panoptic_quality import ClassQuality, count_segments
from maskformer.segment_matching import Matching, count_overlap, matching_pairs, pair_iou
from maskformer.taxonomy import Taxonomy

WIDTH_RATIO = 0.02
"""Width of boundaries as a share of the image's diagonal, as in the code of the paper's authors."""


def boundary_quality(matching: Matching, taxonomy: Taxonomy) -> dict[int, ClassQuality]:
    """Return one image's contribution to boundary PQ by category id, for the classes present or predicted in it.

    Two segments match if the smaller of their mask IoU and boundary IoU is above 0.5, and this is what they add to the
    sum of IoU. Void pixels of the ground truth are part of neither union. An unmatched prediction is ignored as in
    panoptic quality: if more than half of its pixels, not only of its boundary, is void or crowd of its class.

    Args:
        matching: of the whole segments.
    """
    true, predicted, width = matching.true, matching.predicted, boundary_width(*matching.size)
    # Void is no segment, so it has no inside.
    at_true = boundaries(true.pixels.reshape(matching.size), width).ravel() | (true.pixels == 0)
    at_predicted = boundaries(predicted.pixels.reshape(matching.size), width).ravel()
    boundary_iou = pair_iou(
        count_overlap(true, predicted, at_true & at_predicted),
        count_overlap(true, predicted, at_true).sum(axis=1),
        count_overlap(true, predicted, at_predicted).sum(axis=0),
    )
    iou = np.minimum(matching.iou, boundary_iou)
    return count_segments(matching._replace(iou=iou, matches=matching_pairs(true, predicted, iou)), taxonomy)


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
