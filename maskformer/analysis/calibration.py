"""Calibration of segment scores (Guo et al., arXiv:1706.04599, section 2).

Of the predicted segments with a score of 0.8, four in five should be correct. What is correct is the caller's choice,
for example a true positive of panoptic quality; segments that are neither right nor wrong (mostly void or crowd) and
segments without a score should be left out.

Letters: S segments.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True)
class CalibrationBin:
    """The segments whose score is at least `lower` and below `upper` (the last bin includes 1)."""

    lower: float
    upper: float
    count: int
    mean_score: float
    """nan without segments."""
    share_correct: float
    """nan without segments."""


@dataclass(frozen=True)
class Calibration:
    """How far scores are from the share of correct segments, as fractions 0..1."""

    expected_error: float
    """Expected calibration error: the mean over all segments of |mean score - share correct| of their bins; nan without
    segments."""
    maximum_error: float
    """Maximum calibration error: that of the worst bin; nan without segments."""
    bins: tuple[CalibrationBin, ...]
    """Bins of equal width from 0 to 1, empty ones included: a reliability diagram."""


def calibration(scores: Float[np.ndarray, " S"], correct: Bool[np.ndarray, " S"], num_bins: int = 15) -> Calibration:
    """Compare the scores of predicted segments with the share of correct ones, in bins of equal width.

    The result does not depend on the order of the segments.

    Raises:
        ValueError: a score is nan or outside 0..1, or there is no bin.
    """
    if num_bins < 1:
        raise ValueError(f"Calibration needs at least 1 bin, got {num_bins}; 15 are usual.")
    bad = scores[~((scores >= 0) & (scores <= 1))]
    if bad.size:
        raise ValueError(
            f"A score lies in 0..1, got {bad.size} others of {len(scores)}, for example {bad[0]}; leave out segments "
            f"without a score, and turn logits into probabilities."
        )
    edges = np.arange(num_bins + 1) / num_bins
    bin_of = np.minimum(np.searchsorted(edges, scores, side="right") - 1, num_bins - 1)
    bins: list[CalibrationBin] = []
    for index in range(num_bins):
        inside = bin_of == index
        count = int(np.count_nonzero(inside))
        # fsum rounds once, so the result does not depend on the order of the segments.
        mean_score = math.fsum(scores[inside].tolist()) / count if count else math.nan
        share_correct = np.count_nonzero(correct[inside]) / count if count else math.nan
        bins.append(CalibrationBin(float(edges[index]), float(edges[index + 1]), count, mean_score, share_correct))
    filled = [item for item in bins if item.count]
    if not filled:
        return Calibration(math.nan, math.nan, tuple(bins))
    return Calibration(
        expected_error=math.fsum(_error(item) * item.count for item in filled) / len(scores),
        maximum_error=max(map(_error, filled)),
        bins=tuple(bins),
    )


def _error(item: CalibrationBin) -> float:
    return abs(item.mean_score - item.share_correct)
