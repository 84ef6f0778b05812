"""Configuration of the augmentation, separate from augment.py so that `--help` does not import torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random flip, resize and crop. Lengths are in pixels."""

    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """Lengths to draw the short side from when resizing. The aspect ratio is kept."""
    long_side: int = 1333
    """Upper limit of the long side when resizing."""
    crop_probability: float = 0.5
    """Probability of a resize and a crop before the final resize."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Lengths to draw the short side from for the resize before the crop."""
    crop_long_side: int | None = 1333
    """Upper limit of the long side in the resize before the crop. In mmdetection 1333, in the original None."""
    crop_size: tuple[int, int] = (384, 600)
    """Range to draw crop height and crop width from, both ends included."""
    interpolation: Literal["bilinear", "bilinear-antialias"] = "bilinear"
    """Interpolation of images. `bilinear` is OpenCV's, as in mmdetection; `bilinear-antialias` is Pillow's, as in the
    original implementation."""
    keep_empty: bool = False
    """Keep segments without pixels after the crop. The original implementation trains on their empty masks."""

    def __post_init__(self) -> None:
        for name in ("flip_probability", "crop_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("short_sides", "crop_short_sides"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(
                    f"augment.{name} must have at least one length, all positive, got {getattr(self, name)}."
                )
        if not 1 <= self.crop_size[0] <= self.crop_size[1]:
            raise ValueError(f"augment.crop_size must be a range (smallest, largest), got {self.crop_size}.")
