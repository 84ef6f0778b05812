"""MaskFormer: per-pixel classification is not all you need for semantic segmentation (arXiv:2107.06278).

`MaskFormer.forward` follows the paper's figure 2: backbone, pixel decoder, transformer decoder, then one class and one
mask for every query.

Letters: L decoder layers, B images, Q queries, K classes (K1 = K + 1, "no object" is index K), C channels, H W padded
image, h w finest feature map (stride 4; stride 2 for the `small` backbone), both rounded up.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer.config import ModelConfig
from maskformer.pixel_decoder import PixelDecoder
from maskformer.small_backbone import SmallBackbone
from maskformer.transformer import TransformerDecoder, sine_positions

if TYPE_CHECKING:
    from maskformer.backbone import ResNet, Swin


class MaskFormerOutput(NamedTuple):
    """Predictions of every decoder layer; the last layer is the result, the others serve deep supervision."""

    class_logits: Float[Tensor, "L B Q K1"]
    mask_logits: Float[Tensor, "L B Q h w"]


class MaskFormer(nn.Module):
    """The network, without pre-processing, post-processing and losses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_dim
        self.backbone = _build_backbone(config)
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

        Attention and positions ignore the padding, as in mmdetection; convolutions and GroupNorm do not.

        Args:
            images: RGB, normalized with `config.pixel_mean` and `config.pixel_std`, zero in the padding.
            padding: True outside each image, which is in the upper left corner; None if nothing is padded.

        Raises:
            ValueError: the padding does not have the size of the images.
        """
        # Convolutions are faster in this layout. Weights keep theirs, because checkpoints store it.
        features = self.backbone(images.to(memory_format=torch.channels_last))
        coarse_padding = _resize_padding(padding, images, features[-1])
        positions = sine_positions(coarse_padding, self.config.hidden_dim)
        ignored = None if padding is None else coarse_padding.flatten(1)

        mask_features, memory = self.pixel_decoder(features, positions, ignored)
        segments = self.transformer_decoder(self.query_embedding.weight, memory, positions, ignored)

        class_logits = self.class_head(segments)
        mask_logits = torch.einsum("lbqc,bchw->lbqhw", self.mask_head(segments), mask_features)
        return MaskFormerOutput(class_logits, mask_logits)


def _resize_padding(padding: Tensor | None, images: Tensor, feature: Tensor) -> Tensor:
    """Resize [B, H, W] to the cells [B, h, w] of a feature map by nearest neighbor; all False without padding."""
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
    """Build a MaskFormer with random weights; nothing is downloaded.

    ResNets have frozen batch statistics, so they need pretrained weights to train well. Load them afterwards with
    `maskformer.weights.initial_weights`.
    """
    return MaskFormer(config)


def _build_backbone(config: ModelConfig) -> "ResNet | Swin | SmallBackbone":
    if config.backbone == "small":
        return SmallBackbone()
    from maskformer.backbone import build_backbone  # imports torchvision, which takes a second

    return build_backbone(config)
