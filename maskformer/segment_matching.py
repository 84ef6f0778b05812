"""Which segments of a prediction match which of the ground truth (Kirillov et al., arXiv:1801.00868, section 4).

Everything that counts segments is computed from this: panoptic quality, and where it is lost.

Letters: H W image, T segments of the ground truth, P of the prediction, S of either, T1 P1 with void in front, M
matches, R runs of equal pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from maskformer.taxonomy import Taxonomy

PanopticMap: TypeAlias = tuple[Integer[np.ndarray, "_ _"], Sequence[Mapping[str, Any]]]
"""An index map [H, W] (0 is void) and its `segments_info`: `id`, `category_id`, and `iscrowd` in ground truth."""

_LARGEST_ID = 2**63 - 1

_MAX_PAIRS = 2**24
"""Pairs of segments of one image. Each takes some 25 bytes while the overlaps are counted."""


class Segments(NamedTuple):
    """One index map and its segments by ascending id."""

    label: str
    """The map, for messages."""
    pixels: Integer[np.ndarray, " HW"]
    ids: Int[np.ndarray, " S"]
    classes: Int[np.ndarray, " S"]
    """Class indices."""
    crowd: Bool[np.ndarray, " S"]
    crowd_of_class: dict[int, int]
    """For each class index with crowd segments the row of one of them, the last listed, as in panopticapi."""
    infos: list[Mapping[str, Any]]
    """The entries of `segments_info` in this order."""


class Matching(NamedTuple):
    """The segments of an image, their overlaps and matches. Areas are in pixels."""

    size: tuple[int, int]
    """Height and width of the image."""
    true: Segments
    predicted: Segments
    overlap: Int[np.ndarray, "T1 P1"]
    """Pixels in common. Row 0 is the void of the ground truth, column 0 that of the prediction."""
    iou: Float[np.ndarray, "T P"]
    """Intersection over union of each pair, whatever their classes. Void pixels of the ground truth do not count."""
    matches: Int[np.ndarray, "2 M"]
    """Row and column of the pairs of one class with an IoU above one half, so each segment is in one pair at most."""
    ignored: Bool[np.ndarray, " P"]
    """Whether more than half of a predicted segment is void or crowd of its class. If it is unmatched, it does not
    count as false."""

    @property
    def true_area(self) -> Int[np.ndarray, " T"]:
        return self.overlap[1:].sum(axis=1)

    @property
    def predicted_area(self) -> Int[np.ndarray, " P"]:
        return self.overlap[:, 1:].sum(axis=0)

    @property
    def missed(self) -> Int[np.ndarray, " _"]:
        """Rows of the segments of the ground truth that count as false negatives."""
        unmatched = ~self.true.crowd
        unmatched[self.matches[0]] = False
        return np.flatnonzero(unmatched)

    @property
    def false(self) -> Int[np.ndarray, " _"]:
        """Columns of the predicted segments that count as false positives."""
        unmatched = ~self.ignored
        unmatched[self.matches[1]] = False
        return np.flatnonzero(unmatched)


def match_segments(
    prediction: PanopticMap, truth: PanopticMap, taxonomy: Taxonomy, image_id: int | str = ""
) -> Matching:
    """Match the segments of one image.

    Raises:
        ValueError: the sizes differ, a category is unknown, an index map and its segments do not have the same ids, or
            there are too many segments. The message names the image.
    """
    predicted = read_segments(*prediction, taxonomy, f"the prediction of image {image_id}")
    true = read_segments(*truth, taxonomy, f"the ground truth of image {image_id}")
    if prediction[0].shape != truth[0].shape:
        raise ValueError(
            f"The maps of image {image_id} differ in size: prediction {tuple(prediction[0].shape)}, ground truth "
            f"{tuple(truth[0].shape)}; resize the prediction to the original image."
        )
    if (len(true.ids) + 1) * (len(predicted.ids) + 1) > _MAX_PAIRS:
        raise ValueError(
            f"Image {image_id} has {len(true.ids):,} segments in the ground truth and {len(predicted.ids):,} in the "
            f"prediction, which are more than {_MAX_PAIRS:,} pairs; leave the image out."
        )
    overlap = count_overlap(true, predicted)
    true_area, predicted_area = overlap.sum(axis=1), overlap.sum(axis=0)
    for segments, area in ((true, true_area), (predicted, predicted_area)):
        absent = segments.ids[area[1:] == 0]
        if absent.size:
            raise ValueError(
                f"The segments {absent.tolist()} have no pixel in {segments.label}; remove them from segments_info."
            )
    iou = pair_iou(overlap, true_area, predicted_area)
    size = (truth[0].shape[0], truth[0].shape[1])
    matches, ignored = matching_pairs(true, predicted, iou), _ignored_predictions(true, predicted, overlap)
    return Matching(size, true, predicted, overlap, iou, matches, ignored)


def read_segments(
    pixels: Integer[np.ndarray, "_ _"], infos: Sequence[Mapping[str, Any]], taxonomy: Taxonomy, label: str
) -> Segments:
    """Check an index map and its segments, except whether their ids agree, which `count_overlap` checks.

    Raises:
        ValueError: the map is not one, or a segment lacks an id or a known category, or two have the same id.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 2 or pixels.dtype.kind not in "iu" or not pixels.size:
        raise ValueError(
            f"An index map is a non-empty integer array [H,W], got {pixels.dtype} {list(pixels.shape)} in {label}."
        )
    for info in infos:
        if "id" not in info or "category_id" not in info:
            missing = sorted({"id", "category_id"} - info.keys())
            raise ValueError(f"A segment needs id and category_id, got {dict(info)} in {label}; add {missing}.")
        if info["category_id"] not in taxonomy:
            raise ValueError(
                f"Segment {info['id']} in {label} has the unknown category_id {info['category_id']}; use category ids "
                f"of the taxonomy, not class indices."
            )
    ordered = sorted(infos, key=lambda info: info["id"])
    ids = [int(info["id"]) for info in ordered]
    if len(set(ids)) < len(ids) or min(ids, default=1) < 1 or max(ids, default=1) > _LARGEST_ID:
        raise ValueError(
            f"Segment ids must be positive and differ (0 is void, the largest 2^63 - 1), got "
            f"{[info['id'] for info in infos]} in {label}; renumber the segments."
        )
    row_of = {identifier: row for row, identifier in enumerate(ids)}
    return Segments(
        label,
        pixels.ravel(),
        ids=np.array(ids, np.int64),
        classes=np.array([taxonomy.class_index(info["category_id"]) for info in ordered], np.int64),
        crowd=np.array([bool(info.get("iscrowd", 0)) for info in ordered], bool),
        crowd_of_class={
            taxonomy.class_index(info["category_id"]): row_of[info["id"]] for info in infos if info.get("iscrowd", 0)
        },
        infos=ordered,
    )


def count_overlap(
    true: Segments, predicted: Segments, counted: Bool[np.ndarray, " HW"] | None = None
) -> Int[np.ndarray, "T1 P1"]:
    """Count the pixels that each pair of segments has in common, void first.

    Args:
        counted: the pixels that count; None: all.

    Raises:
        ValueError: a map has ids that its segments do not have.
    """
    # Index maps consist of runs of equal pixels. Looking up one pixel per run is ten times faster than looking up all,
    # and ids up to 2^24 need no table of that length.
    changes = true.pixels[1:] != true.pixels[:-1]
    changes |= predicted.pixels[1:] != predicted.pixels[:-1]
    if counted is not None:
        changes |= counted[1:] != counted[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    lengths = np.diff(starts, append=true.pixels.size)
    if counted is not None:
        lengths = lengths * counted[starts]
    shape = len(true.ids) + 1, len(predicted.ids) + 1
    pair = rows_of(true, starts) * shape[1] + rows_of(predicted, starts)
    # bincount sums in float64, which is exact below 2^53 pixels.
    return np.bincount(pair, lengths, shape[0] * shape[1]).astype(np.int64).reshape(shape)


def rows_of(segments: Segments, starts: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """Return for the pixels at `starts` 0 if they are void, otherwise 1 + the row of their segment.

    Raises:
        ValueError: the map has an id that its segments do not have.
    """
    values = segments.pixels[starts].astype(np.int64)
    ids = np.concatenate([[0], segments.ids])
    rows = np.searchsorted(ids, values)
    rows[rows == len(ids)] = 0
    known = ids[rows] == values
    if not known.all():
        raise ValueError(
            f"The ids {np.unique(values[~known])[:8].tolist()} are in the map but not in the segments_info of "
            f"{segments.label}; list every segment, or set its pixels to 0 (void)."
        )
    return rows


def pair_iou(
    overlap: Int[np.ndarray, "T1 P1"], true_area: Int[np.ndarray, " T1"], predicted_area: Int[np.ndarray, " P1"]
) -> Float[np.ndarray, "T P"]:
    """Return the intersection over union of each pair of segments. Void of the ground truth is not in the union."""
    intersection = overlap[1:, 1:]
    union = true_area[1:, None] + (predicted_area - overlap[0])[None, 1:] - intersection
    return intersection / union


def comparable_pairs(true: Segments, predicted: Segments) -> Bool[np.ndarray, "T P"]:
    """Return which pairs are of the same class and not a crowd."""
    return (true.classes[:, None] == predicted.classes) & ~true.crowd[:, None]


def matching_pairs(true: Segments, predicted: Segments, iou: Float[np.ndarray, "T P"]) -> Int[np.ndarray, "2 M"]:
    """Return row and column of the comparable pairs whose IoU is above one half."""
    return np.stack(np.nonzero(comparable_pairs(true, predicted) & (iou > 0.5)))


def _ignored_predictions(
    true: Segments, predicted: Segments, overlap: Int[np.ndarray, "T1 P1"]
) -> Bool[np.ndarray, " P"]:
    """Return which predicted segments are void or crowd of their class by more than half."""
    ignorable = overlap[0, 1:].copy()
    if true.crowd_of_class:
        for column, class_index in enumerate(predicted.classes.tolist()):
            row = true.crowd_of_class.get(class_index)
            if row is not None:
                ignorable[column] += overlap[row + 1, column + 1]
    return ignorable / overlap[:, 1:].sum(axis=0) > 0.5
