"""Where panoptic quality is lost: causes whose shares add up to 1 - PQ.

A class has PQ = sum of IoU / D with D = TP + FP / 2 + FN / 2, so it loses 1 - PQ = (sum of (1 - IoU) + FP / 2 + FN / 2)
/ D. Each term belongs to one segment: a match loses 1 - IoU, a false positive or false negative 1/2. Each segment has
one cause and one size, so their sums per class and cause, over D, add up to 1 - PQ of the class; and means over the
classes to 1 - PQ. This way of finding causes follows TIDE (arXiv:2008.08115), which has none for panoptic results.

Letters: T segments of the ground truth, P of the prediction, C causes, Z sizes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from maskformer.panoptic_quality import ClassQuality
from maskformer.segment_matching import Matching, comparable_pairs
from maskformer.taxonomy import Taxonomy

Cause: TypeAlias = Literal["missed", "wrong_class", "split", "merged", "boundary", "false_alarm"]

CAUSES: tuple[Cause, ...] = get_args(Cause)
"""Why quality is lost. The cause of an unmatched segment is the first of these that is true:

1. `wrong_class`: its IoU with a segment of another class is above one half.
2. `split`: two or more predictions lie mostly inside one segment of the ground truth and cover most of it together.
3. `merged`: one prediction covers most of two or more segments of the ground truth.
4. `boundary`: its IoU with a segment of its class is at least 0.1, but not enough for a match.
5. `missed` in the ground truth, `false_alarm` in the prediction: none of these.

What the IoU of a match is short of 1 is `boundary` too. "Most" is more than half of the area. All but `wrong_class`
compare segments of one class.
"""

SIZES = ("small", "medium", "large")
"""Of the segment that loses quality: areas below 32 x 32 and 96 x 96 pixels, and above, as in COCO. A match counts with
the area of its ground truth."""

_LIMITS = (32**2, 96**2)
_NEAR = 0.1

Losses = dict[int, Float[np.ndarray, "C Z"]]
"""What each class loses in an image or several, by category id, in units of a segment (not yet over D)."""


@dataclass(frozen=True)
class LostQuality:
    """Fractions of PQ that are lost, by cause (rows, as `CAUSES`) and size (columns, as `SIZES`)."""

    all: Float[np.ndarray, "C Z"]
    """Adds up to 1 - PQ over all classes; nan if there is no class."""
    things: Float[np.ndarray, "C Z"]
    stuff: Float[np.ndarray, "C Z"]
    per_class: dict[str, Float[np.ndarray, "C Z"]]
    """Of every class that is present or predicted, by name; adds up to 1 - PQ of the class."""


def losses(matching: Matching, taxonomy: Taxonomy) -> Losses:
    """Return what each class loses in one image."""
    found: Losses = {}

    def add(class_index: int, cause: int, area: int, amount: float) -> None:
        loss = found.setdefault(taxonomy.category_id(class_index), np.zeros((len(CAUSES), len(SIZES))))
        loss[cause, sum(area >= limit for limit in _LIMITS)] += amount

    true_area, predicted_area = matching.true_area.tolist(), matching.predicted_area.tolist()
    for row, column in matching.matches.T.tolist():
        add(
            int(matching.true.classes[row]),
            CAUSES.index("boundary"),
            true_area[row],
            1 - float(matching.iou[row, column]),
        )
    of_true, of_predicted = (causes.tolist() for causes in segment_causes(matching))
    for row in matching.missed.tolist():
        add(int(matching.true.classes[row]), of_true[row], true_area[row], 0.5)
    for column in matching.false.tolist():
        add(int(matching.predicted.classes[column]), of_predicted[column], predicted_area[column], 0.5)
    return found


def segment_causes(matching: Matching) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " P"]]:
    """Return the cause of every segment, should it be unmatched, as an index of `CAUSES`."""
    same_class = comparable_pairs(matching.true, matching.predicted)
    other_class = (matching.true.classes[:, None] != matching.predicted.classes) & ~matching.true.crowd[:, None]
    wrong = other_class & (matching.iou > 0.5)
    common = np.where(same_class, matching.overlap[1:, 1:], 0)
    inside = 2 * common > matching.predicted_area  # most of the prediction
    covers = 2 * common > matching.true_area[:, None]  # most of the ground truth

    parts = inside & (inside.sum(axis=1) >= 2)[:, None]
    parts &= (2 * np.where(parts, common, 0).sum(axis=1) > matching.true_area)[:, None]
    together = covers & (covers.sum(axis=0) >= 2)
    near = same_class & (matching.iou >= _NEAR)

    def first(axis: int, otherwise: Cause) -> Int[np.ndarray, " S"]:
        """Return the first cause that is true of each row or column."""
        ordered: Iterable[tuple[Cause, Bool[np.ndarray, "T P"]]] = (
            ("wrong_class", wrong), ("split", parts), ("merged", together), ("boundary", near),
        )  # fmt: skip
        causes = np.full(wrong.shape[1 - axis], CAUSES.index(otherwise))
        for cause, pairs in reversed(list(ordered)):
            causes[pairs.any(axis=axis)] = CAUSES.index(cause)
        return causes

    return first(1, "missed"), first(0, "false_alarm")


def lost_quality(images: Iterable[Losses], per_class: Mapping[str, ClassQuality], taxonomy: Taxonomy) -> LostQuality:
    """Add up what the images lose.

    Args:
        images: the losses of each image.
        per_class: quality of each class over the same images, by name.
    """
    sums: Losses = {}
    for image in images:
        for category_id, loss in image.items():
            sums[category_id] = sums.get(category_id, 0.0) + loss
    shares = {
        name: sums.get(quality.category_id, np.zeros((len(CAUSES), len(SIZES))))
        / (quality.tp + 0.5 * quality.fp + 0.5 * quality.fn)
        for name, quality in per_class.items()
        if quality.tp + quality.fp + quality.fn
    }
    things = [share for name, share in shares.items() if taxonomy.is_thing(taxonomy.names.index(name))]
    stuff = [share for name, share in shares.items() if not taxonomy.is_thing(taxonomy.names.index(name))]
    return LostQuality(_mean([*things, *stuff]), _mean(things), _mean(stuff), shares)


def _mean(shares: list[Float[np.ndarray, "C Z"]]) -> Float[np.ndarray, "C Z"]:
    return np.mean(shares, axis=0) if shares else np.full((len(CAUSES), len(SIZES)), np.nan)
