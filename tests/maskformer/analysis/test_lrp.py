"""Panoptic LRP against its definition over lists of segments."""

import math

import pytest

from maskformer.analysis.lrp import class_lrp, mean_lrp
from maskformer.panoptic_quality import ClassQuality


def slow(ious: list[float], fp: int, fn: int) -> tuple[float, ...]:
    tp, total = len(ious), len(ious) + fp + fn
    error = sum((1 - iou) / (1 - 0.5) for iou in ious) / total + fp / total + fn / total if total else math.nan
    return (
        error,
        sum(1 - iou for iou in ious) / tp if tp else math.nan,
        1 - tp / (tp + fp) if tp + fp else math.nan,
        1 - tp / (tp + fn) if tp + fn else math.nan,
    )


CASES = [([0.9, 0.6], 1, 2), ([1.0], 0, 0), ([], 3, 0), ([], 0, 2), ([], 0, 0), ([0.51, 0.7, 0.99], 4, 0)]


def quality(ious: list[float], fp: int, fn: int) -> ClassQuality:
    return ClassQuality(1, sum(ious), len(ious), fp, fn)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case: tuple[list[float], int, int]) -> None:
    assert class_lrp(quality(*case)) == pytest.approx(slow(*case), nan_ok=True, abs=1e-12)


def test_means_leave_out_classes_without_a_value() -> None:
    columns = list(zip(*(slow(*case) for case in CASES), strict=True))
    defined = [[value for value in column if not math.isnan(value)] for column in columns]
    assert mean_lrp(quality(*case) for case in CASES) == pytest.approx([sum(d) / len(d) for d in defined], abs=1e-12)
    assert all(map(math.isnan, mean_lrp([])))
