"""Read and write weights: mmdetection, detectron2, Hugging Face, ImageNet backbones, and the native format."""

from maskformer.weights.architecture import detect_config
from maskformer.weights.description import class_names, stated_taxonomy
from maskformer.weights.initial import initial_weights
from maskformer.weights.loading import LoadReport, check_fit, load
from maskformer.weights.model_card import Evaluation, ModelDetails
from maskformer.weights.reading import Source, Weights, read
from maskformer.weights.saving import save

__all__ = [
    "Evaluation",
    "LoadReport",
    "ModelDetails",
    "Source",
    "Weights",
    "check_fit",
    "class_names",
    "detect_config",
    "initial_weights",
    "load",
    "read",
    "save",
    "stated_taxonomy",
]
