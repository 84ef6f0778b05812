"""Panoptic quality from index maps in memory (Kirillov et al., arXiv:1801.00868, section 4).

The results equal those of the official panopticapi, corner cases included, without PNG files. Contributions are kept
per image, so accumulators of several workers can be merged in any order with identical results, and no image can be
counted twice.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from maskformer.segment_matching import Matching, PanopticMap, match_segments
from maskformer.taxonomy import Taxonomy

ImageId = TypeVar("ImageId", bound=int | str)


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

    def update(self, prediction: PanopticMap, truth: PanopticMap, image_id: int | str) -> dict[int, ClassQuality]:
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
        contribution = count_segments(match_segments(prediction, truth, self.taxonomy, image_id), self.taxonomy)
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
        return panoptic_result(self._images.values(), self.taxonomy)


def panoptic_result(images: Collection[Mapping[int, ClassQuality]], taxonomy: Taxonomy) -> PanopticResult:
    """Return the qualities over images, from the contribution of each by category id."""
    by_category: defaultdict[int, list[ClassQuality]] = defaultdict(list)
    for contribution in images:
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
        for category in taxonomy.categories
    }
    qualities = list(per_class.values())
    return PanopticResult(
        all=_average(qualities),
        things=_average(qualities[: taxonomy.num_things]),
        stuff=_average(qualities[taxonomy.num_things :]),
        per_class=per_class,
        num_images=len(images),
    )


def image_order(image_id: int | str) -> tuple[bool, int | str]:
    """Return a key by which any image ids can be sorted, numbers before names."""
    return isinstance(image_id, str), image_id


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


def count_segments(matching: Matching, taxonomy: Taxonomy) -> dict[int, ClassQuality]:
    """Return the quality of one image by category id, for the classes present or predicted in it."""
    rows, columns = matching.matches
    classes = matching.true.classes[rows].tolist()
    matched: defaultdict[int, list[float]] = defaultdict(list)
    for class_index, iou in zip(classes, matching.iou[rows, columns].tolist(), strict=True):
        matched[class_index].append(iou)
    missed: Counter[int] = Counter(matching.true.classes[matching.missed].tolist())
    false: Counter[int] = Counter(matching.predicted.classes[matching.false].tolist())
    return {
        category_id: ClassQuality(
            category_id,
            iou=math.fsum(matched[class_index]),
            tp=len(matched[class_index]),
            fp=false[class_index],
            fn=missed[class_index],
        )
        for class_index in sorted({*matched, *missed, *false})
        for category_id in [taxonomy.category_id(class_index)]
    }
