"""Configuration of the model, losses, post-processing, optimizer and schedule, and the model presets.

The defaults are the published COCO panoptic model (arXiv:2107.06278) as mmdetection 2.25 trained it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_type_hints

from maskformer.untrusted import shown

WeightFormat = Literal["native", "mmdet", "mmdet2", "huggingface"]
"""File format of saved weights: safetensors with the native names, mmdetection 3.x or 2.x (.pth), or a folder for
`from_pretrained` of transformers."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a MaskFormer."""

    backbone: Literal["resnet50", "resnet101", "swin_t", "swin_s", "swin_b", "swin_l", "small"] = "resnet50"
    """Backbone network. `small` is a GroupNorm network of a few hundred thousand parameters, for demos on a CPU."""
    num_classes: int = 133
    """Number of classes, things and stuff together. At most 50,000. Index `num_classes` of the class logits is "no
    object"."""
    num_queries: int = 100
    """Number of object queries, the most segments an image can have. At most 2,000."""
    hidden_dim: int = 256
    """Channels of the pixel decoder, the transformer and the query embeddings. At most 8,192."""
    num_heads: int = 8
    """Attention heads per transformer layer."""
    feedforward_dim: int = 2048
    """Hidden units of the transformer's feed-forward networks. At most 65,536."""
    encoder_layers: int = 6
    """Transformer encoder layers in the pixel decoder; 0 is the plain FPN. They process the coarsest feature map. At
    most 100."""
    decoder_layers: int = 6
    """Layers of the transformer decoder. Each has losses of its own. At most 100."""
    dropout: float = 0.1
    """Dropout rate of the transformer. It applies to attention weights, attention outputs and the encoder's
    feed-forward networks."""
    decoder_feedforward_dropout: float = 0.0
    """Dropout rate of the decoder's feed-forward networks. The published training in mmdetection 2.25 used 0, although
    its configuration states 0.1."""
    drop_path: float = 0.0
    """Stochastic depth rate of Swin's last block. The rate rises linearly from 0 in the first block; ResNets and
    `small` ignore it."""
    initialization: Literal["mmdetection", "original"] = "mmdetection"
    """Initialization of the pixel decoder's convolutions. `original` draws all from Caffe2's Xavier. mmdetection
    intends the same, but its loop ends one level early, so both res4 convolutions start from a wider Kaiming normal
    distribution."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass instead of storing them. It takes less memory and more time and
    changes no number. It applies to the blocks of ResNet and Swin and to the pixel decoder's encoder layers."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of each RGB channel, on the scale 0..255."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation of each RGB channel, on the scale 0..255, positive."""

    def __post_init__(self) -> None:
        # It may come from a file, so that nothing is known of the values, not even their types.
        for name in ("backbone", "initialization"):
            allowed = get_args(get_type_hints(ModelConfig)[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name} must be one of {', '.join(allowed)}, got {shown(getattr(self, name))}.")
        for name, most in _MOST.items():
            least = 0 if name == "encoder_layers" else 1
            value = require_integer(f"model.{name}", getattr(self, name))
            if value < least:
                what = "must not be negative" if least == 0 else "must be at least 1"
                raise ValueError(
                    f"model.{name} {what}, got {shown(value)}{'; 0 is the plain FPN' if not least else ''}."
                )
            if value > most:
                raise ValueError(f"model.{name} must be at most {most:,}, got {shown(value)}.")
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4:
            raise ValueError(
                f"model.hidden_dim must be a multiple of model.num_heads and of 4 (two sine/cosine axes), "
                f"got {self.hidden_dim} with {self.num_heads} heads; use {4 * self.num_heads} or a multiple of it."
            )
        for name in ("dropout", "decoder_feedforward_dropout", "drop_path"):
            if not 0 <= require_number(f"model.{name}", getattr(self, name)) < 1:
                raise ValueError(f"model.{name} must lie in [0, 1), got {shown(getattr(self, name))}.")
        if type(self.checkpoint_activations) is not bool:
            raise ValueError(
                f"model.checkpoint_activations must be true or false, got {shown(self.checkpoint_activations)}."
            )
        for name in ("pixel_mean", "pixel_std"):
            values: Any = getattr(self, name)
            if type(cast("object", values)) is not tuple or len(values) != 3:
                raise ValueError(f"model.{name} must be three numbers, got {shown(values)}.")
            for value in values:
                if abs(require_number(f"model.{name}", value)) > 1e6 or (name == "pixel_std" and value <= 0):
                    raise ValueError(f"model.{name} is out of range, got {shown(values)}.")
        if self._parameters() > _MOST_PARAMETERS:
            raise ValueError(
                f"The model would have about {self._parameters():,} parameters besides its backbone, more than "
                f"{_MOST_PARAMETERS:,}. Set a smaller model.hidden_dim, model.feedforward_dim, or number of layers."
            )

    def _parameters(self) -> int:
        """Return the number of parameters besides the backbone's, without biases and norms."""
        hidden, feedforward = self.hidden_dim, self.feedforward_dim
        encoder = self.encoder_layers * (4 * hidden * hidden + 2 * hidden * feedforward)
        decoder = self.decoder_layers * (8 * hidden * hidden + 2 * hidden * feedforward)
        # At most: three lateral and four 3x3 convolutions, one of them of 2048 channels; the projection; the mask head.
        pixels = hidden * (1792 + 2048) + 9 * hidden * (4 * hidden + 2048) + 3 * hidden * hidden
        return encoder + decoder + pixels + hidden * (self.num_queries + self.num_classes + 1)


_MOST = {
    "num_classes": 50_000,
    "num_queries": 2_000,
    "hidden_dim": 8_192,
    "num_heads": 1_024,
    "feedforward_dim": 65_536,
    "encoder_layers": 100,
    "decoder_layers": 100,
}
"""Largest sizes of a model. A file of a few bytes may state any."""
_MOST_PARAMETERS = 1_000_000_000
"""Besides the backbone's; the published Swin-L has 211,571,258 together."""


def require_integer(name: str, value: Any) -> int:
    """Return an integer.

    Raises:
        ValueError: it is none; a boolean is none either.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {shown(value)}.")
    return value


def require_number(name: str, value: Any) -> float:
    """Return a finite number.

    Raises:
        ValueError: it is none; a boolean is none either.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e300:
        raise ValueError(f"{name} must be a finite number, got {shown(value)}.")
    return value


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the three losses. The matching costs use the same weights, as in both published implementations."""

    classification_weight: float = 1.0
    """Weight of the classification loss (cross-entropy) and matching cost."""
    focal_weight: float = 20.0
    """Weight of the focal mask loss and matching cost."""
    dice_weight: float = 1.0
    """Weight of the dice mask loss and matching cost."""
    no_object_weight: float = 0.1
    """Weight of the "no object" class in the cross-entropy."""
    focal_alpha: float = 0.25
    """Weight of pixels inside a mask in the focal loss. Pixels outside get 1 - alpha."""
    focal_gamma: float = 2.0
    """Focusing exponent of the focal loss. Larger values reduce the loss of pixels that are already right."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"loss.{name} must not be negative, got {value}.")


@dataclass(frozen=True, kw_only=True)
class PanopticConfig:
    """Thresholds that turn the predictions into panoptic segments."""

    score_threshold: float = 0.8
    """Class probability above which a query is kept."""
    overlap_threshold: float = 0.8
    """Smallest share of its own mask that a kept segment must win. Its own mask is where its probability is >= 0.5;
    other queries may win some of these pixels."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= require_number(f"panoptic.{name}", value) <= 1:
                raise ValueError(f"panoptic.{name} must lie in [0, 1], got {shown(value)}.")


MAX_SIDE = 10_000
"""Longest side, in pixels, to which images are resized for the network."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW. The defaults are the published ResNet-50 recipe."""

    lr: float = 1e-4
    """Peak learning rate of everything but the backbone."""
    backbone_lr_multiplier: float = 0.1
    """Factor on the learning rate for the backbone."""
    weight_decay: float = 1e-4
    """Weight decay of weights and biases outside norm layers."""
    norm_weight_decay: float = 0.0
    """Weight decay of the norm layers outside the backbone."""
    backbone_norm_weight_decay: float = 0.0
    """Weight decay of the backbone's norm layers. Swin-L was trained with 0.01 in mmdetection, because its inherited
    rule for the backbone takes precedence over the one for norms."""
    query_weight_decay: float = 0.0
    """Weight decay of the query embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""
    eps: float = 1e-8
    """Term added to AdamW's denominator for numerical stability."""
    clip_norm: float = 0.01
    """Largest L2 norm of all gradients together; 0 turns clipping off. Raw norms are far above 0.01, so with the
    default every gradient ends up with this norm."""
    ema_decay: float = 0.0
    """Decay per step of averaged weights (EMA), such as 0.9999; 0 disables them. They are evaluated and registered in
    place of the trained ones."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"optimizer.{name} must be positive, got {value}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optimizer.ema_decay must be at least 0 and below 1, got {self.ema_decay}.")
        decays = ("weight_decay", "norm_weight_decay", "backbone_norm_weight_decay", "query_weight_decay")
        for name in ("backbone_lr_multiplier", *decays, "clip_norm"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"optimizer.{name} must not be negative, got {value}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {self.betas}; the usual pair is (0.9, 0.999).")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate schedule, a factor on every learning rate. The defaults are the published ResNet-50 recipe."""

    kind: Literal["step", "cosine"] = "step"
    """Shape of the schedule. `step` multiplies the rate by 0.1 at each milestone; `cosine` decays from the end of the
    warm-up to zero."""
    milestone_epochs: tuple[float, ...] = (50.0,)
    """Epochs after which the learning rate drops, for `step` only."""
    warmup_steps: int = 0
    """Steps of linear warm-up from `warmup_start_factor` to 1."""
    warmup_start_factor: float = 1e-6
    """Factor on the learning rate at the first warm-up step."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must not be negative, got {self.warmup_steps}; 0 is no warm-up.")
        if not 0 <= self.warmup_start_factor <= 1:
            raise ValueError(f"schedule.warmup_start_factor must lie in [0, 1], got {self.warmup_start_factor}.")
        milestones = self.milestone_epochs
        if not all(0 < epoch < math.inf for epoch in milestones) or list(milestones) != sorted(set(milestones)):
            raise ValueError(
                f"schedule.milestone_epochs must be positive and ascending, got {milestones}; "
                f"write the epochs after which the learning rate drops, for example (50,)."
            )


R50 = ModelConfig()
"""ResNet-50 with the transformer-encoder pixel decoder: 45,065,158 parameters."""

R101 = ModelConfig(backbone="resnet101")
"""ResNet-101 with the transformer-encoder pixel decoder."""

SWIN_T = ModelConfig(backbone="swin_t", encoder_layers=0, drop_path=0.3)
"""Swin-T with the plain feature pyramid, as all Swin presets have."""

SWIN_S = ModelConfig(backbone="swin_s", encoder_layers=0, drop_path=0.3)
"""Swin-S with the plain feature pyramid."""

SWIN_B = ModelConfig(backbone="swin_b", encoder_layers=0, drop_path=0.3)
"""Swin-B with the plain feature pyramid and windows of 12 patches."""

SWIN_L = ModelConfig(backbone="swin_l", encoder_layers=0, drop_path=0.3)
"""Swin-L with the plain feature pyramid and windows of 12 patches: 211,571,258 parameters."""

DEMO = ModelConfig(
    backbone="small",
    initialization="original",
    num_classes=7,
    num_queries=16,
    hidden_dim=96,
    num_heads=4,
    feedforward_dim=256,
    encoder_layers=1,
    decoder_layers=3,
    dropout=0.0,
)
"""Demo model: 1.4 million parameters and no batch statistics. It learns small images on a CPU in minutes."""
