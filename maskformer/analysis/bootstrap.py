"""Intervals of panoptic quality by a bootstrap over images (Efron and Tibshirani, 1993, chapters 13 and 16).

A draw takes as many images as there are, with replacement, and computes PQ from the images taken, each counted as often
as it was taken. An interval reaches from one percentile of the PQ of the draws to another. It says how much PQ would
change with other images of the same kind; it says nothing about training with another seed.

The draws are counts of images (multinomial) times dense matrices, in blocks. The memory is that of the matrices, 24 I K
bytes for each set of results, and of a block, 8 MB: 24 MB for 5,000 images and 133 classes, 40 MB for two sets.

Letters: I images, K classes, D draws of a block.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Float32, Float64

from maskformer.panoptic_quality import ClassQuality
from maskformer.taxonomy import Taxonomy

Counts: TypeAlias = Mapping[int, ClassQuality]
"""One image's contribution by category id, as `PanopticQuality.update` returns it."""

_BLOCK = 1 << 21  # counts of images that are in memory at a time
_ALL = slice(None)


class Interval(NamedTuple):
    """A panoptic quality and its interval, as fractions 0..1."""

    value: float
    """PQ of all images, each counted once."""
    low: float
    high: float
    confidence: float


class Difference(NamedTuple):
    """The panoptic quality of one set of results minus that of another, as a fraction -1..1."""

    value: float
    """PQ of the second minus PQ of the first, over all images, each counted once."""
    low: float
    high: float
    p_value: float
    """Two-sided: 2 min(1 + draws with a difference <= 0, 1 + draws with a difference >= 0) / (1 + draws), at most 1."""
    confidence: float
    images: int
    """Number of images, the same on both sides."""


def pq_intervals(
    images: Mapping[int | str, Counts],
    taxonomy: Taxonomy,
    *,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return PQ over all classes, things and stuff with percentile intervals, as `all`, `things` and `stuff`.

    In each draw, PQ is averaged over the classes that are present or predicted in its images. A draw without any class
    of a group is left out of that group's interval, and a group without classes in the data has no entry. The result
    depends on the seed, not on the order of `images`.

    Raises:
        ValueError: the confidence is not between 0 and 1, there is no draw, or a category is unknown.
    """
    _check(confidence, draws)
    iou, weight = _quantities(images, taxonomy)
    groups = {"all": _ALL, "things": slice(taxonomy.num_things), "stuff": slice(taxonomy.num_things, None)}
    values = {name: _pq_of_all(iou, weight, group) for name, group in groups.items()}
    of_draws: dict[str, list[Float64[np.ndarray, " D"]]] = {
        name: [] for name, value in values.items() if not math.isnan(value)
    }
    if not of_draws:
        return {}
    iou, weight = iou.astype(np.float32), weight.astype(np.float32)
    for counts in resamples(len(images), draws, seed):
        sums = counts @ iou, counts @ weight
        for name, parts in of_draws.items():
            parts.append(_pq(*sums, groups[name]))
    return {
        name: Interval(values[name], *_percentiles(np.concatenate(parts), confidence), confidence)
        for name, parts in of_draws.items()
    }


def pq_difference(
    first: Mapping[int | str, Counts],
    second: Mapping[int | str, Counts],
    taxonomy: Taxonomy,
    *,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return the PQ over all classes of `second` minus that of `first`, with an interval and a p-value.

    Each draw takes the same images for both, so what makes an image hard for both cancels out. The p-value is twice the
    share of draws on the rarer side of zero; a difference of exactly zero counts on both sides, and one draw is added
    to each side and to the total. So it is at least 2 / (1 + draws), and 1 for two equal sets of results. A draw
    without any class is left out.

    Raises:
        ValueError: the two sets have different images, a side has no class that is present or predicted, the confidence
            is not between 0 and 1, there is no draw, or a category is unknown.
    """
    _check(confidence, draws)
    different = first.keys() ^ second.keys()
    if different:
        raise ValueError(
            f"A paired difference needs the same images on both sides, got {len(first)} and {len(second)}, of which "
            f"{len(different)} are on one side only, for example {min(different, key=_order)!r}; score both on the "
            f"same data."
        )
    sides = [_quantities(images, taxonomy) for images in (first, second)]
    values = [_pq_of_all(*side, _ALL) for side in sides]
    if any(map(math.isnan, values)):
        raise ValueError(
            f"There is no PQ to compare: on at least one side, no class is present or predicted in the {len(first)} "
            f"images; score images with segments."
        )
    sides = [(iou.astype(np.float32), weight.astype(np.float32)) for iou, weight in sides]
    parts: list[Float64[np.ndarray, " D"]] = []
    for counts in resamples(len(first), draws, seed):
        before, after = (_pq(counts @ iou, counts @ weight, _ALL) for iou, weight in sides)
        parts.append(after - before)
    differences = np.concatenate(parts)
    differences = differences[~np.isnan(differences)]
    rarer = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return Difference(
        values[1] - values[0],
        *_percentiles(differences, confidence),
        p_value=min(1.0, 2 * (1 + int(rarer)) / (1 + len(differences))),
        confidence=confidence,
        images=len(first),
    )


def resamples(num_images: int, draws: int, seed: int) -> Iterator[Float32[np.ndarray, "_ _"]]:
    """Yield how often each draw takes each image, images by ascending id, as blocks [D, I]."""
    random = np.random.default_rng(seed)
    rows = max(1, _BLOCK // num_images)
    for start in range(0, draws, rows):
        counts = np.empty((min(rows, draws - start), num_images), dtype=np.float32)
        for row in counts:
            row[:] = np.bincount(random.integers(num_images, size=num_images), minlength=num_images)
        yield counts


def _check(confidence: float, draws: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"A confidence lies between 0 and 1, got {confidence}; 0.95 is usual.")
    if draws < 1:
        raise ValueError(f"A bootstrap needs at least 1 draw, got {draws}; 10000 are usual.")


def _order(image_id: int | str) -> tuple[bool, int | str]:
    return isinstance(image_id, str), image_id


def _quantities(
    images: Mapping[int | str, Counts], taxonomy: Taxonomy
) -> tuple[Float64[np.ndarray, "I K"], Float64[np.ndarray, "I K"]]:
    """Return the sum of IoU and the denominator of PQ by image, in ascending order of their ids, and class."""
    iou = np.zeros((len(images), taxonomy.num_classes))
    weight = np.zeros_like(iou)
    for row, image_id in enumerate(sorted(images, key=_order)):
        for category_id, quality in images[image_id].items():
            column = taxonomy.class_index(category_id)
            iou[row, column] = quality.iou
            weight[row, column] = quality.tp + 0.5 * quality.fp + 0.5 * quality.fn
    return iou, weight


def _pq_of_all(iou: Float64[np.ndarray, "I K"], weight: Float64[np.ndarray, "I K"], group: slice) -> float:
    return float(_pq(iou.sum(axis=0, keepdims=True), weight.sum(axis=0, keepdims=True), group)[0])


def _pq(iou: Float[np.ndarray, "D K"], weight: Float[np.ndarray, "D K"], group: slice) -> Float64[np.ndarray, " D"]:
    """Return the PQ of each draw, averaged over the classes of a group; nan for a draw without any of them."""
    iou, weight = iou[:, group], weight[:, group]
    counted = weight > 0
    pq = np.divide(iou, weight, out=np.zeros_like(iou), where=counted)
    num_classes = counted.sum(axis=1)
    total = pq.sum(axis=1, dtype=np.float64)
    return np.divide(total, num_classes, out=np.full(len(iou), np.nan), where=num_classes > 0)


def _percentiles(values: Float64[np.ndarray, " _"], confidence: float) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
