"""Augmentation as pure functions: (sample, rng, config) -> sample.

The recipe of arXiv:2107.06278 for COCO panoptic: a flip; then one of two policies, half the time each:
resize the short side; or resize, crop, resize again. Geometry touches one index plane instead of N masks.
Segments that lose their last pixel are dropped, unless the configuration keeps them. A sample's generator
depends on (seed, epoch, image id) alone, so any sample of any run can be made again.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from maskformer.inference import resize_image, resized_shape


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Flip, resize and crop. Sides are in pixels."""

    flip_probability: float = 0.5
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """One is drawn; the image is resized, keeping its ratio, until its short side has this length."""
    long_side: int = 1333
    """No resize makes the long side longer than this."""
    crop_probability: float = 0.5
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Short side before the crop."""
    crop_long_side: int | None = 1333
    """Long side's limit before the crop; mmdetection's 1333, None in the original."""
    crop_size: tuple[int, int] = (384, 600)
    """Crop height and width are each drawn from this range, both ends included."""
    interpolation: Literal["bilinear", "bilinear-antialias"] = "bilinear"
    """`bilinear` as OpenCV does it (mmdetection), `bilinear-antialias` as Pillow does (the original)."""
    keep_empty: bool = False
    """Teach segments that the crop left without a pixel as empty masks, as the original does."""

    def __post_init__(self) -> None:
        for name in ("flip_probability", "crop_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("short_sides", "crop_short_sides"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"augment.{name} must name at least one positive length, got {getattr(self, name)}.")
        if not 1 <= self.crop_size[0] <= self.crop_size[1]:
            raise ValueError(f"augment.crop_size must be a range (smallest, largest), got {self.crop_size}.")


class Sample(NamedTuple):
    """One image with its segments."""

    image: np.ndarray
    """[H, W, 3] uint8, RGB."""
    index_map: np.ndarray
    """[H, W] uint16: 0 is void or crowd, k the k-th segment."""
    classes: np.ndarray
    """[N] int16: class index of each segment."""


def sample_rng(seed: int, epoch: int, image_id: int) -> np.random.Generator:
    """Return the generator of one sample in one epoch."""
    return np.random.default_rng([seed, epoch, image_id])


def augment(sample: Sample, rng: np.random.Generator, config: AugmentConfig) -> Sample:
    """Draw one augmented version of `sample`."""
    if rng.random() < config.flip_probability:
        sample = flip(sample)
    if rng.random() < config.crop_probability:
        sample = resize(sample, int(rng.choice(config.crop_short_sides)), config.crop_long_side, config.interpolation)
        sample = random_crop(sample, rng, config.crop_size)
    sample = resize(sample, int(rng.choice(config.short_sides)), config.long_side, config.interpolation)
    return sample if config.keep_empty else drop_empty(sample)


def flip(sample: Sample) -> Sample:
    """Mirror left and right."""
    return sample._replace(image=sample.image[:, ::-1], index_map=sample.index_map[:, ::-1])


def random_crop(sample: Sample, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
    """Cut out a rectangle whose sides are drawn independently from `size`, as far as the image has them."""
    height, width = sample.index_map.shape
    crop_height = int(rng.integers(min(height, size[0]), min(height, size[1]), endpoint=True))
    crop_width = int(rng.integers(min(width, size[0]), min(width, size[1]), endpoint=True))
    top = int(rng.integers(0, height - crop_height, endpoint=True))
    left = int(rng.integers(0, width - crop_width, endpoint=True))
    window = np.s_[top : top + crop_height, left : left + crop_width]
    return sample._replace(image=sample.image[window], index_map=sample.index_map[window])


def resize(sample: Sample, short_side: int, long_side: int | None, interpolation: str) -> Sample:
    """Resize the image bilinearly and the index map to the nearest pixel."""
    height, width = sample.index_map.shape
    shape = resized_shape(height, width, short_side, long_side)
    # torchvision has no uint16 kernels; int32 holds every index exactly.
    plane = torch.from_numpy(sample.index_map.astype(np.int32))[None]
    plane = tv.resize(plane, list(shape), InterpolationMode.NEAREST)
    image = resize_image(sample.image, shape, antialias=interpolation == "bilinear-antialias")
    return sample._replace(image=image, index_map=plane[0].numpy().astype(np.uint16))


def drop_empty(sample: Sample) -> Sample:
    """Drop segments without a pixel and number the rest anew, in the same order."""
    counts = np.bincount(sample.index_map.ravel(), minlength=len(sample.classes) + 1)
    kept = counts > 0
    kept[0] = False
    renumber = np.where(kept, np.cumsum(kept), 0).astype(np.uint16)
    return sample._replace(index_map=renumber[sample.index_map], classes=sample.classes[kept[1:]])
