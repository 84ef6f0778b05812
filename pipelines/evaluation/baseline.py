"""What colour alone can do: the nearest-colour baseline, which a trained model has to beat.

A pixel gets the class whose mean training colour is nearest; a thing is a connected component. On the synthetic
data set this stays low by design, so that a good score there shows that shapes were learned.

Letters: H W picture, K classes.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage

from maskformer.panoptic_quality import PanopticQuality, PanopticResult
from maskformer.taxonomy import Taxonomy

Record: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.integer[Any]], list[dict[str, Any]]]
"""A picture [H, W, 3], its segment ids [H, W] with 0 for void, and COCO's segments_info."""


def color_baseline(training: Iterable[Record], held_out: Iterable[Record], taxonomy: Taxonomy) -> PanopticResult:
    """Return the panoptic quality that nearest colours reach on the held-out pictures.

    Raises ValueError if a class has no pixel in the training pictures.
    """
    colors = mean_colors(training, taxonomy)
    quality = PanopticQuality(taxonomy)
    for number, (image, ids, segments) in enumerate(held_out):
        quality.update(segment_by_color(image, colors, taxonomy), (ids, segments), number)
    return quality.result()


def mean_colors(records: Iterable[Record], taxonomy: Taxonomy) -> NDArray[np.float64]:
    """Return the mean colour of each class, [K, 3] in 0..255; void and crowd do not count."""
    sums = np.zeros((taxonomy.num_classes, 3))
    counts = np.zeros(taxonomy.num_classes)
    for image, ids, segments in records:
        for segment in segments:
            if not segment["iscrowd"]:
                pixels = image[ids == segment["id"]]
                class_index = taxonomy.class_index(segment["category_id"])
                sums[class_index] += pixels.sum(0)
                counts[class_index] += len(pixels)
    if not counts.all():
        missing = [name for name, count in zip(taxonomy.names, counts, strict=True) if not count]
        raise ValueError(
            f"Every class needs a training pixel to have a mean colour, got none of {', '.join(missing)}; "
            f"use more training pictures."
        )
    return sums / counts[:, None]


def segment_by_color(
    image: NDArray[np.uint8], colors: NDArray[np.float64], taxonomy: Taxonomy
) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    """Return segment ids [H, W] and segments_info of one picture [H, W, 3], given the mean colours [K, 3]."""
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(1)), np.float64)  # 3x3
    classes = ((blurred[:, :, None] - colors) ** 2).sum(-1).argmin(-1)
    ids = np.zeros(classes.shape, np.int32)
    segments: list[dict[str, Any]] = []
    for class_index in np.unique(classes):
        parts = classes == class_index
        if taxonomy.is_thing(class_index):
            parts, _ = cast("tuple[NDArray[np.int32], int]", ndimage.label(parts))  # scipy leaves it untyped
        for part in range(1, int(parts.max()) + 1):
            segments.append({"id": len(segments) + 1, "category_id": taxonomy.category_id(class_index)})
            ids[parts == part] = len(segments)
    return ids, segments
