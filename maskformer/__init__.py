"""MaskFormer for panoptic segmentation (arXiv:2107.06278): model, losses, post-processing and panoptic quality.

The names below are imported on first use, so `import maskformer` is fast: importing torch alone takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskformer import draw, taxonomy, weights
    from maskformer.checkpoint import load
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
    from maskformer.images import read_image
    from maskformer.inference import Segmentation, Segmenter
    from maskformer.matcher import match
    from maskformer.model import MaskFormer, MaskFormerOutput, build_model
    from maskformer.panoptic_quality import PanopticQuality
    from maskformer.postprocess import instances, panoptic, semantic
    from maskformer.targets import Targets
    from maskformer.taxonomy import Taxonomy

_NAMES = {
    "checkpoint": "load",
    "config": ("DEMO R50 R101 SWIN_B SWIN_L SWIN_S SWIN_T LossConfig ModelConfig PanopticConfig"),
    "criterion": "Losses compute_losses",
    "images": "read_image",
    "inference": "Segmentation Segmenter",
    "matcher": "match",
    "model": "MaskFormer MaskFormerOutput build_model",
    "panoptic_quality": "PanopticQuality",
    "postprocess": "instances panoptic semantic",
    "targets": "Targets",
    "taxonomy": "Taxonomy",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

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
    "Segmentation",
    "Segmenter",
    "Targets",
    "Taxonomy",
    "build_model",
    "compute_losses",
    "draw",
    "instances",
    "load",
    "match",
    "panoptic",
    "read_image",
    "semantic",
    "taxonomy",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in ("draw", "taxonomy", "weights"):
        return import_module(f"maskformer.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'maskformer' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"maskformer.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
