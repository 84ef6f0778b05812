"""From an image to its panoptic, semantic or instance segmentation: resize, normalise, forward, post-process.

One image at a time and without padding, as the published results were made. H W is the original image, h w
the resized one, h4 w4 the map of the mask logits; Q queries, K1 classes and no-object.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode  # pyright: ignore[reportMissingTypeStubs]  # torchvision ships none
from torchvision.transforms.v2 import functional as tv  # pyright: ignore[reportMissingTypeStubs]  # torchvision ships none

from maskformer.config import PanopticConfig
from maskformer.model import MaskFormer
from maskformer.postprocess import Size, instances, panoptic, semantic
from maskformer.taxonomy import Taxonomy


def resized_shape(height: int, width: int, short_side: int, long_side: int | None) -> tuple[int, int]:
    """Return the size, ratio kept, at which the short side is `short_side` or the long side hits its limit."""
    scale = short_side / min(height, width)
    if long_side is not None:
        scale = min(scale, long_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(
    image: UInt8[np.ndarray, "H W 3"], shape: tuple[int, int], antialias: bool = False
) -> UInt8[np.ndarray, "h w 3"]:
    """Resize bilinearly: without `antialias` as OpenCV does (mmdetection), with it as Pillow does (the original)."""
    planes = torch.as_tensor(np.ascontiguousarray(image)).permute(2, 0, 1)
    planes = tv.resize(planes, list(shape), InterpolationMode.BILINEAR, antialias=antialias)
    return planes.permute(1, 2, 0).contiguous().numpy()


def normalise(
    images: UInt8[Tensor, "B 3 H W"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Tensor, "B 3 H W"]:
    """Return (images - mean) / std in float32."""
    shift = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    return (images.float() - shift) / scale


class Segmenter:
    """A model in evaluation mode with all that turns its output into results at the size of the image."""

    def __init__(
        self,
        model: MaskFormer,
        taxonomy: Taxonomy,
        config: PanopticConfig,
        *,
        short_side: int = 800,
        long_side: int = 1333,
    ) -> None:
        self.model = model.eval()
        self.taxonomy, self.config = taxonomy, config
        self.short_side, self.long_side = short_side, long_side

    def __call__(self, image: UInt8[np.ndarray, "H W 3"]) -> tuple[Int32[np.ndarray, "H W"], list[dict[str, object]]]:
        """Segment an RGB image; return segment ids at its own size, 0 for void, and `segments_info`."""
        return self.segment_resized(self._resize(image), (image.shape[0], image.shape[1]))

    def segment_resized(
        self, image: UInt8[np.ndarray, "h w 3"], original: tuple[int, int]
    ) -> tuple[Int32[np.ndarray, "H W"], list[dict[str, object]]]:
        """Segment an image that was resized already; the result has the size `original`."""
        ids, segments = panoptic(*self._forward(image, original), self.config, self.taxonomy)
        return np.asarray(ids), segments

    def semantic(self, image: UInt8[np.ndarray, "H W 3"]) -> Int32[np.ndarray, "H W"]:
        """Return the class index of each pixel of an RGB image; `taxonomy` names them, and none is void."""
        return semantic(*self._forward(self._resize(image), (image.shape[0], image.shape[1])))

    def instances(self, image: UInt8[np.ndarray, "H W 3"]) -> list[dict[str, Any]]:
        """Return the things of an RGB image as COCO instance results without `image_id`, the surest first."""
        return instances(*self._forward(self._resize(image), (image.shape[0], image.shape[1])), self.taxonomy)

    def _resize(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        return resize_image(image, resized_shape(image.shape[0], image.shape[1], self.short_side, self.long_side))

    @torch.inference_mode()
    def _forward(
        self, image: UInt8[np.ndarray, "h w 3"], original: Size
    ) -> tuple[Float[Tensor, "Q K1"], Float[Tensor, "Q h4 w4"], tuple[Size, Size, Size]]:
        """Run the network on a resized image; return the last layer's logits and the sizes post-processing needs."""
        network = self.model.config
        device = next(self.model.parameters()).device
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None].to(device)
        output = self.model(normalise(pixels, network.pixel_mean, network.pixel_std), None)
        shape = (image.shape[0], image.shape[1])
        return output.class_logits[-1, 0], output.mask_logits[-1, 0], (shape, shape, original)
