"""A picture of the mistakes in an image: each wrong pixel has the color of its cause.

Letters: H W image.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from maskformer.analysis.lost_quality import CAUSES, Cause, segment_causes
from maskformer.draw import outlines
from maskformer.segment_matching import Matching, PanopticMap, match_segments
from maskformer.taxonomy import Taxonomy

_PALE, _STRONG = 0.25, 0.8
"""Contrast that is left of the image where it is right, and opacity of the colors where it is wrong."""


def error_map(
    image: UInt8[np.ndarray, "H W 3"],
    prediction: PanopticMap,
    truth: PanopticMap,
    taxonomy: Taxonomy,
    colors: Mapping[Cause, tuple[int, int, int]],
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image, gray and pale, with the pixels that are wrong in the color of their cause.

    A pixel is right if it lies in both segments of a match. Otherwise it has the cause of its segment in the ground
    truth; if that one is matched, the cause of its predicted segment; if that one is matched too, or void, `boundary`.
    Void and crowd of the ground truth are never wrong.

    Args:
        colors: RGB of each of `CAUSES`.

    Raises:
        ValueError: as `match_segments`.
    """
    matching = match_segments(prediction, truth, taxonomy)
    causes = _pixel_causes(matching).reshape(truth[0].shape)
    gray = image.astype(np.float32).mean(axis=2, keepdims=True) * _PALE + 255 * (1 - _PALE)
    palette = np.array([(0, 0, 0), *(colors[cause] for cause in CAUSES)], np.float32)
    opacity = np.where(causes > 0, _STRONG, 0.0)[..., None].astype(np.float32)
    mixed = gray * (1 - opacity) + palette[causes] * opacity
    mixed[outlines(truth[0])] *= 0.75
    return (mixed + 0.5).astype(np.uint8)


def _pixel_causes(matching: Matching) -> np.ndarray:
    """Return for each pixel 0 if it is not wrong, otherwise 1 + the index of its cause."""
    of_true, of_predicted = segment_causes(matching)
    boundary = CAUSES.index("boundary")
    matched_rows, matched_columns = matching.matches
    matched_true, matched_predicted = np.zeros(len(of_true), bool), np.zeros(len(of_predicted), bool)
    matched_true[matched_rows], matched_predicted[matched_columns] = True, True

    # The cause of each pair of a segment of the ground truth and a predicted one, void first in both.
    table = np.zeros(matching.overlap.shape, np.int64)
    table[1:] = 1 + np.where(matched_true, boundary, of_true)[:, None]
    false = ~matched_predicted & ~matching.ignored
    table[1:, 1:][np.ix_(matched_true, false)] = 1 + of_predicted[false]
    table[1:][matching.true.crowd] = 0
    table[matched_rows + 1, matched_columns + 1] = 0
    rows = np.searchsorted(np.concatenate([[0], matching.true.ids]), matching.true.pixels)
    columns = np.searchsorted(np.concatenate([[0], matching.predicted.ids]), matching.predicted.pixels)
    return table[rows, columns]
