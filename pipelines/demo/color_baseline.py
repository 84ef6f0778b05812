"""The nearest-color baseline: the PQ that color alone reaches, which a trained model has to exceed.

Each pixel is assigned the class with the nearest mean training color; a thing is a connected component. On the
synthetic data set the baseline is low by design, so a high PQ shows that shapes were learned.

H W image, K classes.
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
"""An image [H, W, 3], its segment ids [H, W] with 0 for void, and COCO's segments_info."""


def color_baseline(training: Iterable[Record], held_out: Iterable[Record], taxonomy: Taxonomy) -> PanopticResult:
    """Return the panoptic quality of nearest colors on the held-out images.

    Raises:
        ValueError: a class has no pixels in the training images.
    """
    colors = mean_colors(training, taxonomy)
    quality = PanopticQuality(taxonomy)
    for number, (image, ids, segments) in enumerate(held_out):
        quality.update(segment_by_color(image, colors, taxonomy), (ids, segments), number)
    return quality.result()


def mean_colors(records: Iterable[Record], taxonomy: Taxonomy) -> NDArray[np.float64]:
    """Return the mean color of each class, [K, 3] in 0..255, without void and crowds.

    Raises:
        ValueError: a class has no pixels.
    """
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
            f"Every class needs training pixels for a mean color, got none of {', '.join(missing)}; "
            f"use more training images."
        )
    return sums / counts[:, None]


def segment_by_color(
    image: NDArray[np.uint8], colors: NDArray[np.float64], taxonomy: Taxonomy
) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    """Return segment ids [H, W] and segments_info of one image [H, W, 3], given the mean colors [K, 3]."""
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(1)), np.float64)  # 3x3
    classes = ((blurred[:, :, None] - colors) ** 2).sum(-1).argmin(-1)
    ids = np.zeros(classes.shape, np.int32)
    segments: list[dict[str, Any]] = []
    for class_index in np.unique(classes):
        parts = classes == class_index
        if taxonomy.is_thing(class_index):
            parts, _ = cast("tuple[NDArray[np.int32], int]", ndimage.label(parts))  # untyped in scipy
        for part in range(1, int(parts.max()) + 1):
            segments.append({"id": len(segments) + 1, "category_id": taxonomy.category_id(class_index)})
            ids[parts == part] = len(segments)
    return ids, segments
