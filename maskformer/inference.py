"""Panoptic, semantic or instance segmentation of an image: resize, normalize, forward, post-process.

Images are processed one at a time and without padding, as for the published results.

Letters: H W original image, h w resized image, h4 w4 map of the mask logits, Q queries, K1 classes and "no object".
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from maskformer.config import PanopticConfig
from maskformer.images import ImageSource, read_image
from maskformer.model import MaskFormer
from maskformer.postprocess import Size, instances, keep_queries, panoptic, semantic
from maskformer.preprocess import normalize, resize_image, resized_shape
from maskformer.taxonomy import Taxonomy


class Segmentation(NamedTuple):
    """A panoptic segmentation of one image."""

    ids: Int32[np.ndarray, "H W"]
    """Segment id of each pixel, 0 for void."""
    segments: list[dict[str, Any]]
    """COCO's `segments_info`: `id`, `category_id`, `isthing`, `area` in pixels, and `score`."""


class Segmenter:
    """A model in evaluation mode with its pre- and post-processing; results have the size of the original image.

    Images are given as `maskformer.images.read_image` takes them: a path, the bytes of a file, a Pillow image, or RGB
    pixels as uint8 [H, W, 3]. Files and Pillow images are turned upright by their EXIF orientation, arrays are not.
    """

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

    def segment(self, image: ImageSource) -> Segmentation:
        """Segment an image, upright.

        Raises:
            ValueError: it cannot be read; see `read_image`.
        """
        pixels = read_image(image)
        return Segmentation(*self.segment_resized(self.resize(pixels), (pixels.shape[0], pixels.shape[1])))

    __call__ = segment

    def segment_resized(
        self, image: UInt8[np.ndarray, "h w 3"], original: tuple[int, int]
    ) -> tuple[Int32[np.ndarray, "H W"], list[dict[str, object]]]:
        """Segment an image that is already resized; the result has the size `original` (height, width)."""
        ids, segments = panoptic(*self._forward(image, original), self.config, self.taxonomy)
        return np.asarray(ids), segments

    def run_network(
        self, image: UInt8[np.ndarray, "h w 3"]
    ) -> tuple[Float[Tensor, "kept K1"], Float[Tensor, "kept h4 w4"]]:
        """Return the logits, on the CPU, from which `panoptic` computes the segments of a resized image.

        The network and post-processing can so run in different processes, with results equal to `segment_resized`.
        """
        class_logits, mask_logits, _ = self._forward(image, (1, 1))
        kept_logits, kept_masks = keep_queries(class_logits, mask_logits, self.config, self.taxonomy)
        return kept_logits.cpu(), kept_masks.cpu()

    def semantic(self, image: ImageSource) -> Int32[np.ndarray, "H W"]:
        """Return the class index of each pixel of an image, as numbered by `taxonomy`; no pixel is void."""
        pixels = read_image(image)
        return semantic(*self._forward(self.resize(pixels), (pixels.shape[0], pixels.shape[1])))

    def instances(self, image: ImageSource) -> list[dict[str, Any]]:
        """Return the things of an image as COCO instance results without `image_id`, highest score first."""
        pixels = read_image(image)
        return instances(*self._forward(self.resize(pixels), (pixels.shape[0], pixels.shape[1])), self.taxonomy)

    def resize(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Resize RGB pixels for `segment_resized`."""
        return resize_image(image, resized_shape(image.shape[0], image.shape[1], self.short_side, self.long_side))

    @torch.inference_mode()
    def _forward(
        self, image: UInt8[np.ndarray, "h w 3"], original: Size
    ) -> tuple[Float[Tensor, "Q K1"], Float[Tensor, "Q h4 w4"], tuple[Size, Size, Size]]:
        """Run the network on a resized image; return the last layer's logits and the sizes post-processing needs."""
        network = self.model.config
        device = next(self.model.parameters()).device
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None].to(device)
        output = self.model(normalize(pixels, network.pixel_mean, network.pixel_std), None)
        shape = (image.shape[0], image.shape[1])
        return output.class_logits[-1, 0], output.mask_logits[-1, 0], (shape, shape, original)
