"""Every number of an evaluation, from what its images contribute."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from maskformer.analysis.bootstrap import Interval, pq_intervals
from maskformer.analysis.calibration import Calibration, calibration
from maskformer.analysis.image import ImageAnalysis
from maskformer.analysis.lost_quality import LostQuality, lost_quality
from maskformer.analysis.lrp import LRP, mean_lrp
from maskformer.analysis.mask_ap import MaskAP, mask_ap
from maskformer.panoptic_quality import PanopticResult, panoptic_result
from maskformer.taxonomy import Taxonomy


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Every number over a set of images, as fractions 0..1."""

    quality: PanopticResult
    intervals: dict[str, Interval]
    """Of PQ over all classes, things and stuff; empty if they were not asked for."""
    boundary: PanopticResult
    lost: LostQuality
    lrp: dict[str, LRP]
    """Over all classes, things and stuff."""
    iou: dict[str, float]
    """Of the pixels of each class that occurs, by name."""
    calibration: Calibration
    mask_ap: MaskAP

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur; nan if none does."""
        return math.fsum(self.iou.values()) / len(self.iou) if self.iou else math.nan


def summarize(images: Iterable[ImageAnalysis], taxonomy: Taxonomy, *, draws: int = 10_000) -> Analysis:
    """Add up the images. The result does not depend on their order.

    Args:
        draws: of the bootstrap for the intervals; 0 leaves them out.

    Raises:
        ValueError: an image occurs twice.
    """
    ordered = sorted(images, key=lambda image: image.image_id)
    for one, other in pairwise(ordered):
        if one.image_id == other.image_id:
            raise ValueError(f"Image {one.image_id} was counted before; count each image once.")
    quality = panoptic_result([image.quality for image in ordered], taxonomy)
    per_class = list(quality.per_class.values())
    scored = [segment for image in ordered for segment in image.scored]
    counts = {image.image_id: image.quality for image in ordered}
    return Analysis(
        quality=quality,
        intervals=pq_intervals(counts, taxonomy, draws=draws) if draws and ordered else {},
        boundary=panoptic_result([image.boundary for image in ordered], taxonomy),
        lost=lost_quality([image.losses for image in ordered], quality.per_class, taxonomy),
        lrp={
            "all": mean_lrp(per_class),
            "things": mean_lrp(per_class[: taxonomy.num_things]),
            "stuff": mean_lrp(per_class[taxonomy.num_things :]),
        },
        iou=_class_iou(ordered, taxonomy),
        calibration=calibration(
            np.array([segment.score for segment in scored], np.float64),
            np.array([segment.correct for segment in scored], bool),
        ),
        mask_ap=mask_ap(
            {image.image_id: image.predicted_things for image in ordered},
            {image.image_id: image.true_things for image in ordered},
            {image.image_id: image.size for image in ordered},
            taxonomy,
        ),
    )


def _class_iou(images: list[ImageAnalysis], taxonomy: Taxonomy) -> dict[str, float]:
    found: dict[str, float] = {}
    for category in taxonomy.categories:
        counts = [image.pixels[category.id] for image in images if category.id in image.pixels]
        intersection = sum(pixels.intersection for pixels in counts)
        union = sum(pixels.truth + pixels.prediction for pixels in counts) - intersection
        if union:
            found[category.name] = intersection / union
    return found
