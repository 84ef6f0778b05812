"""MaskFormer: per-pixel classification is not all you need for semantic segmentation (arXiv:2107.06278).

`MaskFormer.forward` follows the paper's figure 2: backbone, pixel decoder, transformer decoder, then one class and one
mask for every query.

Letters: L decoder layers, B images, Q queries, K classes (index K is "no object"), C channels, H W padded image,
h w the finest feature map (stride 4; stride 2 for the `small` backbone), both rounded up.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer.backbone import build_backbone
from maskformer.config import ModelConfig
from maskformer.pixel_decoder import PixelDecoder
from maskformer.transformer import TransformerDecoder, sine_positions


class MaskFormerOutput(NamedTuple):
    """What every decoder layer predicts; the last layer is the answer, the others are there for the losses."""

    class_logits: Float[Tensor, "L B Q K+1"]
    mask_logits: Float[Tensor, "L B Q h w"]


class MaskFormer(nn.Module):
    """The network, without pre- and post-processing and without losses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_dim
        self.backbone = build_backbone(config)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, config)
        self.query_embedding = nn.Embedding(config.num_queries, hidden)
        self.transformer_decoder = TransformerDecoder(config)
        self.class_head = nn.Linear(hidden, config.num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
        )

    def forward(
        self, images: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"] | None = None
    ) -> MaskFormerOutput:
        """Predict a class and a mask per query, after every decoder layer.

        Padding is kept out of attention and positions, as in mmdetection; convolutions and GroupNorm see it.

        Args:
            images: RGB, normalised by `config.pixel_mean` and `pixel_std`, with zeros in the padding.
            padding: True outside each image, which lies in the upper left corner; None if nothing is padded.

        Raises:
            ValueError: the padding has another size than the images.
        """
        features = self.backbone(images)
        coarse_padding = _resize_padding(padding, images, features[-1])
        positions = sine_positions(coarse_padding, self.config.hidden_dim)
        ignored = None if padding is None else coarse_padding.flatten(1)

        mask_features, memory = self.pixel_decoder(features, positions, ignored)
        segments = self.transformer_decoder(self.query_embedding.weight, memory, positions, ignored)

        class_logits = self.class_head(segments)
        mask_logits = torch.einsum("lbqc,bchw->lbqhw", self.mask_head(segments), mask_features)
        return MaskFormerOutput(class_logits, mask_logits)


def _resize_padding(padding: Tensor | None, images: Tensor, feature: Tensor) -> Tensor:
    """Take from [B, H, W] the cell that each cell [B, h, w] of the feature starts in; no padding is all False."""
    size = feature.shape[-2:]
    if padding is None:
        return torch.zeros(images.shape[0], *size, dtype=torch.bool, device=images.device)
    expected = (images.shape[0], *images.shape[-2:])
    if padding.shape != expected:
        raise ValueError(
            f"padding must have the batch and the size of the images, {expected}, got {tuple(padding.shape)}; "
            f"pass a mask of the padded images that is True outside each image, or None."
        )
    return F.interpolate(padding[:, None].float(), size=size, mode="nearest")[:, 0].bool()


def build_model(config: ModelConfig) -> MaskFormer:
    """Build a MaskFormer with random weights, without any download.

    ResNets have frozen batch statistics, so they need pretrained weights to train well; load them afterwards.
    """
    return MaskFormer(config)
