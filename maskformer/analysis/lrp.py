"""Panoptic LRP: the localization-recall-precision error (Oksuz et al., arXiv:2011.10772) of panoptic results.

Every predicted segment counts, whatever its score, as in PQ: a panoptic result has no threshold left to choose.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from maskformer.panoptic_quality import ClassQuality


class LRP(NamedTuple):
    """The error of a class, or means over classes, as fractions 0..1 where 0 is best; nan where nothing counts."""

    lrp: float
    """(sum over matches of (1 - IoU) / (1 - 0.5), plus FP, plus FN) / (TP + FP + FN)."""
    localization: float
    """Mean of 1 - IoU of the matches."""
    false_positives: float
    """FP / (TP + FP): 1 - precision."""
    false_negatives: float
    """FN / (TP + FN): 1 - recall."""


def class_lrp(quality: ClassQuality) -> LRP:
    """Return the error of one class."""
    _, iou, tp, fp, fn = quality
    return LRP(
        lrp=(2 * (tp - iou) + fp + fn) / (tp + fp + fn) if tp + fp + fn else math.nan,
        localization=(tp - iou) / tp if tp else math.nan,
        false_positives=fp / (tp + fp) if tp + fp else math.nan,
        false_negatives=fn / (tp + fn) if tp + fn else math.nan,
    )


def mean_lrp(qualities: Iterable[ClassQuality]) -> LRP:
    """Return the mean of each error over the classes where it is defined."""
    errors = [class_lrp(quality) for quality in qualities]
    return LRP(*(_mean(values) for values in zip(*errors, strict=True))) if errors else LRP(*[math.nan] * 4)


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan
