"""Resize and normalize images for the model, in the same way for training and inference.

Letters: B images, H W original image, h w resized image.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F


def resized_shape(height: int, width: int, short_side: int, long_side: int | None) -> tuple[int, int]:
    """Return the height and width in pixels of the resized image, with the aspect ratio kept.

    The short side becomes `short_side`, unless the long side would exceed `long_side` (None: no limit).
    """
    scale = short_side / min(height, width)
    if long_side is not None:
        scale = min(scale, long_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(
    image: UInt8[np.ndarray, "H W 3"], shape: tuple[int, int], antialias: bool = False
) -> UInt8[np.ndarray, "h w 3"]:
    """Resize bilinearly, like OpenCV (mmdetection) without `antialias`, like Pillow (the original code) with it.

    The result is that of torchvision, whose import takes seconds in each process that loads data.
    """
    if image.shape[:2] == shape:
        return np.ascontiguousarray(image)
    # With the dimension of the batch in front, torch takes pixels whose channels come last as they are.
    pixels = torch.as_tensor(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, shape, mode="bilinear", align_corners=False, antialias=antialias)
    return pixels[0].permute(1, 2, 0).contiguous().numpy()


def normalize(
    images: UInt8[Tensor, "B 3 H W"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Tensor, "B 3 H W"]:
    """Return (images - mean) / std in float32."""
    normalized = images.to(torch.float32, copy=True)
    # Numbers instead of tensors, which would have to be copied to the device.
    for channel, (shift, scale) in enumerate(zip(mean, std, strict=True)):
        normalized[:, channel].sub_(shift).div_(scale)
    return normalized
