"""Weights in and out of every format: mmdetection, detectron2, Hugging Face, ImageNet backbones, and our own."""

from maskformer.weights.architecture import detect
from maskformer.weights.description import class_names, stated_taxonomy
from maskformer.weights.initial import initial_weights
from maskformer.weights.loading import LoadReport, load
from maskformer.weights.reading import Source, Weights, read
from maskformer.weights.saving import Format, save

__all__ = [
    "Format",
    "LoadReport",
    "Source",
    "Weights",
    "class_names",
    "detect",
    "initial_weights",
    "load",
    "read",
    "save",
    "stated_taxonomy",
]
