"""MaskFormer for panoptic segmentation (arXiv:2107.06278): the model, its losses, its results, and their score."""

from maskformer import taxonomy, weights
from maskformer.config import (
    DEMO,
    R50,
    R101,
    SWIN_B,
    SWIN_L,
    SWIN_S,
    SWIN_T,
    LossConfig,
    ModelConfig,
    PanopticConfig,
)
from maskformer.criterion import Losses, compute_losses
from maskformer.inference import Segmenter
from maskformer.matcher import match
from maskformer.model import MaskFormer, MaskFormerOutput, build_model
from maskformer.panoptic_quality import PanopticQuality
from maskformer.postprocess import instances, panoptic, semantic
from maskformer.targets import Targets
from maskformer.taxonomy import Taxonomy

__all__ = [
    "DEMO",
    "R50",
    "R101",
    "SWIN_B",
    "SWIN_L",
    "SWIN_S",
    "SWIN_T",
    "LossConfig",
    "Losses",
    "MaskFormer",
    "MaskFormerOutput",
    "ModelConfig",
    "PanopticConfig",
    "PanopticQuality",
    "Segmenter",
    "Targets",
    "Taxonomy",
    "build_model",
    "compute_losses",
    "instances",
    "match",
    "panoptic",
    "semantic",
    "taxonomy",
    "weights",
]
