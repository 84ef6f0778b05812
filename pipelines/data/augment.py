"""Augmentation as pure functions: (sample, rng, config) -> sample.

The recipe of arXiv:2107.06278 for COCO panoptic: a random flip, then one of two policies with equal probability:
resize the short side; or resize, crop and resize again. One index map per image is transformed instead of N masks.
Segments that lose their last pixel are dropped, unless the configuration keeps them. A sample's random generator
depends only on (seed, epoch, image id), so any sample of any run can be reproduced.
"""

from typing import NamedTuple

import numpy as np
import torch

from maskformer.preprocess import resize_image, resized_shape
from pipelines.data.augment_config import AugmentConfig


class Sample(NamedTuple):
    """One image with its segments."""

    image: np.ndarray
    """[H, W, 3] uint8, RGB."""
    index_map: np.ndarray
    """[H, W] uint8 or uint16: 0 is void or crowd, k is the k-th segment."""
    classes: np.ndarray
    """[N] int16: class index of each segment."""


def sample_rng(seed: int, epoch: int, image_id: int) -> np.random.Generator:
    """Return the random generator of one sample in one epoch."""
    return np.random.default_rng([seed, epoch, image_id])


class Crop(NamedTuple):
    """A resize and a crop."""

    shape: tuple[int, int]
    """Height and width to resize the image to before the crop."""
    window: tuple[slice, slice]
    """Rows and columns to keep."""


class Plan(NamedTuple):
    """What the random numbers of an augmentation decide, in the order in which it is done."""

    flipped: bool
    crop: Crop | None
    shape: tuple[int, int]
    """Height and width in the end."""


def draw_plan(height: int, width: int, rng: np.random.Generator, config: AugmentConfig) -> Plan:
    """Draw the augmentation of an image of this height and width."""
    crop = None
    flipped = rng.random() < config.flip_probability
    if rng.random() < config.crop_probability:
        short_side = config.crop_short_sides[int(rng.integers(len(config.crop_short_sides)))]
        shape = resized_shape(height, width, short_side, config.crop_long_side)
        crop = Crop(shape, draw_window(*shape, rng, config.crop_size))
        height, width = (side.stop - side.start for side in crop.window)
    short_side = config.short_sides[int(rng.integers(len(config.short_sides)))]
    return Plan(flipped, crop, resized_shape(height, width, short_side, config.long_side))


def draw_window(height: int, width: int, rng: np.random.Generator, size: tuple[int, int]) -> tuple[slice, slice]:
    """Draw a rectangle of an image of this height and width, as slices of rows and of columns.

    Args:
        size: smallest and largest side in pixels. Height and width are drawn independently, and are limited by the
            image.
    """
    crop_height = int(rng.integers(min(height, size[0]), min(height, size[1]), endpoint=True))
    crop_width = int(rng.integers(min(width, size[0]), min(width, size[1]), endpoint=True))
    top = int(rng.integers(0, height - crop_height, endpoint=True))
    left = int(rng.integers(0, width - crop_width, endpoint=True))
    return slice(top, top + crop_height), slice(left, left + crop_width)


def augmented_size(height: int, width: int, rng: np.random.Generator, config: AugmentConfig) -> tuple[int, int]:
    """Return the height and width that `augment` gives an image of this height and width."""
    return draw_plan(height, width, rng, config).shape


def augment(sample: Sample, rng: np.random.Generator, config: AugmentConfig) -> Sample:
    """Return a randomly augmented version of `sample`."""
    height, width = sample.index_map.shape
    plan = draw_plan(height, width, rng, config)
    image = transform_image(sample.image, plan, antialias=config.interpolation == "bilinear-antialias")
    index_map, classes = transform_map(sample.index_map, sample.classes, plan, config.keep_empty)
    return Sample(image, index_map, classes)


def transform_image(image: np.ndarray, plan: Plan, antialias: bool) -> np.ndarray:
    """Flip, crop and resize an image [H, W, 3] as planned, with bilinear interpolation."""
    if plan.flipped:
        image = torch.as_tensor(np.ascontiguousarray(image)).flip(1).numpy()  # numpy takes several times as long
    if plan.crop:
        image = resize_image(image, plan.crop.shape, antialias)[plan.crop.window]
    return resize_image(image, plan.shape, antialias)


def transform_map(
    index_map: np.ndarray, classes: np.ndarray, plan: Plan, keep_empty: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Flip, crop and resize an index map [H, W] as planned, with nearest-neighbor interpolation.

    Returns:
        The index map, and the classes of its segments, without segments that have no pixels unless `keep_empty`.
    """
    # All steps select rows and columns, so only their indices go through the steps.
    rows, columns = (np.arange(size) for size in index_map.shape)
    if plan.flipped:
        columns = columns[::-1]
    if plan.crop:
        (height, width), (vertical, horizontal) = plan.crop
        rows, columns = resize_nearest(rows, height)[vertical], resize_nearest(columns, width)[horizontal]
    rows, columns = resize_nearest(rows, plan.shape[0]), resize_nearest(columns, plan.shape[1])
    # Each row that is used is worked on once and repeated in the end, since copies of rows are cheap.
    used, rows = np.unique(rows, return_inverse=True)
    index_map = index_map[used].take(columns, axis=1)
    if not keep_empty:
        index_map, classes = drop_empty(index_map, classes)
    return index_map.take(rows, axis=0), classes


def resize_nearest(line: np.ndarray, length: int) -> np.ndarray:
    """Resize an array [L] to [length] by nearest neighbor, choosing the elements that torch chooses."""
    scale = np.float32(len(line)) / np.float32(length)
    return line[np.minimum((np.arange(length, dtype=np.float32) * scale).astype(np.intp), len(line) - 1)]


def drop_empty(index_map: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop segments without pixels and renumber the others in the same order."""
    count = len(classes)
    if index_map.dtype == np.uint8:
        # Searching and translating bytes is ten times as fast as counting and indexing.
        content = index_map.tobytes()
        kept = np.array([content.find(number) >= 0 for number in range(1, count + 1)], bool)
    else:
        content = None
        kept = np.bincount(index_map.ravel(), minlength=count + 1)[1:] > 0
    if kept.all():
        return index_map, classes
    renumber = np.zeros(256 if content is not None else count + 1, index_map.dtype)
    renumber[1 : count + 1] = np.where(kept, np.cumsum(kept), 0)
    if content is not None:
        index_map = np.frombuffer(content.translate(renumber.tobytes()), np.uint8).reshape(index_map.shape)
    else:
        index_map = renumber[index_map]
    return index_map, classes[kept]
