"""Detect the format of a file and the network in it from the names and shapes of its tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from maskformer.config import R50, R101, SWIN_B, SWIN_L, SWIN_S, SWIN_T, ModelConfig
from maskformer.weights.description import model_fields
from maskformer.weights.detectron2 import DETECTRON2, DETECTRON2_BACKBONE
from maskformer.weights.huggingface import HUGGINGFACE
from maskformer.weights.imagenet import SWIN, TIMM, TORCHVISION
from maskformer.weights.mmdet import MMDET_2, MMDET_3
from maskformer.weights.names import Layout, Row
from maskformer.weights.reading import Source, Weights, read

_PARTS = ("backbone", "pixel_decoder", "query_embedding", "transformer_decoder", "class_head", "mask_head")
NATIVE = Layout("native", [Row(f"{part}.*", f"{part}.*") for part in _PARTS])
LAYOUTS = (MMDET_3, MMDET_2, DETECTRON2, HUGGINGFACE, TORCHVISION, SWIN, TIMM, DETECTRON2_BACKBONE, NATIVE)

_SWINS = {(96, 6): SWIN_T, (96, 18): SWIN_S, (128, 18): SWIN_B, (192, 18): SWIN_L}
"""The Swin presets by channels of the first stage and blocks of the third."""

_DIMENSIONS = {
    "query_embedding.weight": 2,
    "class_head.bias": 1,
    "transformer_decoder.layers.0.feedforward.0.bias": 1,
    "backbone.features.0.0.weight": 4,
}
"""Number of dimensions of the tensors whose sizes are read."""


def recognize(weights: Weights) -> Layout:
    """Return the layout that matches most of the names.

    Raises:
        ValueError: no layout matches any name.
    """
    counts = [sum(map(layout.matches, weights.tensors)) for layout in LAYOUTS]
    if not any(counts):
        raise ValueError(
            f"{weights.source} has no tensor of a MaskFormer or of its backbones; its names begin with "
            f"{', '.join(list(weights.tensors)[:3])}. Give weights of mmdetection, detectron2, Hugging Face, "
            f"torchvision or Swin, or native weights."
        )
    return LAYOUTS[counts.index(max(counts))]


def detect_config(source: Source) -> ModelConfig:
    """Return the configuration of the model in a file: its backbone, sizes and numbers of layers.

    Fields that cannot be read from tensors, such as the number of heads and dropout, are taken from the configuration
    in the file if it has one, else from the published model.

    Raises:
        ValueError: the file cannot be read, or is not a complete MaskFormer of a known architecture.
    """
    weights = read(source)
    stated = model_fields(weights)
    fields = stated if "backbone" in stated else {**_detected_fields(weights), **stated}
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{weights.source} holds a model that cannot be built: {error}") from None


def _detected_fields(weights: Weights) -> dict[str, Any]:
    """Return the fields that follow from the tensors; the others are as published for the backbone."""
    renamed = recognize(weights).to_native(weights.tensors, weights.source)
    tensors = renamed.tensors
    for name, dimensions in _DIMENSIONS.items():
        if name in tensors and tensors[name].dim() != dimensions:
            raise ValueError(
                f"{weights.source} is not a MaskFormer: its tensor {renamed.foreign[name]} has the shape "
                f"{tuple(tensors[name].shape)}, where {name} has {dimensions} dimensions. Give the checkpoint of a "
                f"complete model."
            )
    try:
        num_queries, hidden_dim = tensors["query_embedding.weight"].shape
        return {
            **vars(_with_backbone(tensors, weights.source)),
            "num_classes": len(tensors["class_head.bias"]) - 1,
            "num_queries": num_queries,
            "hidden_dim": hidden_dim,
            "feedforward_dim": len(tensors["transformer_decoder.layers.0.feedforward.0.bias"]),
            "encoder_layers": _count(tensors, r"pixel_decoder\.encoder\.(\d+)\."),
            "decoder_layers": _count(tensors, r"transformer_decoder\.layers\.(\d+)\."),
        }
    except KeyError as error:
        raise ValueError(
            f"{weights.source} is not a complete MaskFormer: it has no {error.args[0]}. Give the checkpoint of a "
            f"complete model; a backbone alone can only initialize a training."
        ) from None


def _with_backbone(tensors: Mapping[str, Tensor], source: str) -> ModelConfig:
    if "backbone.conv1.weight" in tensors:
        found = _count(tensors, r"backbone\.layer3\.(\d+)\.")
        known = {6: R50, 23: R101}.get(found)
        what = f"a ResNet with {found} blocks in its third stage"
    elif "backbone.features.0.0.weight" in tensors:
        shape = len(tensors["backbone.features.0.0.weight"]), _count(tensors, r"backbone\.features\.5\.(\d+)\.")
        known = _SWINS.get(shape)
        what = f"a Swin with {shape[0]} channels and {shape[1]} blocks in its third stage"
    else:
        known, what = None, "of another kind, and its number of attention heads is not in the file"
    if known is None:
        raise ValueError(
            f"The backbone in {source} cannot be detected from its tensors: it is {what}. Give a model with resnet50, "
            f"resnet101, swin_t, swin_s, swin_b or swin_l, or a file in the native format."
        )
    return known


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
