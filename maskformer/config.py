"""What configures the model, its losses and its post-processing, and the model presets.

The defaults are the published COCO panoptic model (arXiv:2107.06278) as mmdetection 2.25 trained it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a MaskFormer."""

    backbone: Literal["resnet50", "resnet101", "swin_t", "swin_s", "swin_b", "swin_l", "small"] = "resnet50"
    """`small` is a GroupNorm network of a few hundred thousand parameters, for demonstrations on a CPU."""
    num_classes: int = 133
    """Things and stuff together; index `num_classes` of the class logits is "no object"."""
    num_queries: int = 100
    hidden_dim: int = 256
    num_heads: int = 8
    feedforward_dim: int = 2048
    encoder_layers: int = 6
    """Transformer layers on the coarsest feature map, inside the pixel decoder; 0 is the plain FPN."""
    decoder_layers: int = 6
    dropout: float = 0.1
    """On attention weights, after attention, and in the encoder's feed-forward layers."""
    decoder_feedforward_dropout: float = 0.0
    """0 is what mmdetection 2.25 really ran with, although its configuration says 0.1."""
    drop_path: float = 0.0
    """Probability that a branch of Swin's last block is left out; it rises linearly from 0 in the first block."""
    initialisation: Literal["mmdetection", "original"] = "mmdetection"
    """`original` draws every convolution of the pixel decoder from Caffe2's Xavier. mmdetection means to, but its loop
    ends one level early, so both res4 convolutions start from a wider Kaiming normal."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """RGB, in units of 0..255."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_queries", "hidden_dim", "num_heads", "feedforward_dim", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if self.encoder_layers < 0:
            raise ValueError(
                f"model.encoder_layers must not be negative, got {self.encoder_layers}; 0 is the plain FPN."
            )
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4:
            raise ValueError(
                f"model.hidden_dim must be a multiple of model.num_heads and of 4 (two sine/cosine axes), "
                f"got {self.hidden_dim} with {self.num_heads} heads; use {4 * self.num_heads} or a multiple of it."
            )
        for name in ("dropout", "decoder_feedforward_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} must lie in [0, 1), got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the three losses. The matching costs carry the same weights, as in both published codes."""

    classification_weight: float = 1.0
    focal_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    """Weight of the "no object" class inside the cross-entropy."""
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"loss.{name} must not be negative, got {value}.")


@dataclass(frozen=True, kw_only=True)
class PanopticConfig:
    """Thresholds of the panoptic fusion."""

    score_threshold: float = 0.8
    """A query is kept if its class probability is above this."""
    overlap_threshold: float = 0.8
    """A segment is kept if at least this share of its own mask (probability >= 0.5) is left to it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"panoptic.{name} must lie in [0, 1], got {value}.")


R50 = ModelConfig()
"""ResNet-50 with the transformer-encoder pixel decoder: 45,065,158 parameters."""

R101 = ModelConfig(backbone="resnet101")
"""ResNet-101 with the transformer-encoder pixel decoder."""

SWIN_T = ModelConfig(backbone="swin_t", encoder_layers=0, drop_path=0.3)
"""Swin-T with the plain feature pyramid, as all Swins."""

SWIN_S = ModelConfig(backbone="swin_s", encoder_layers=0, drop_path=0.3)

SWIN_B = ModelConfig(backbone="swin_b", encoder_layers=0, drop_path=0.3)

SWIN_L = ModelConfig(backbone="swin_l", encoder_layers=0, drop_path=0.3)
"""Swin-L, windows of 12: 211,571,258 parameters."""

DEMO = ModelConfig(
    backbone="small",
    initialisation="original",
    num_classes=7,
    num_queries=16,
    hidden_dim=96,
    num_heads=4,
    feedforward_dim=256,
    encoder_layers=1,
    decoder_layers=3,
    dropout=0.0,
)
"""1.4 million parameters and no batch statistics: learns small pictures on a CPU in minutes."""
