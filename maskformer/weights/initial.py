"""Initial weights of a training: the published ImageNet weights, or those of any file.

This module downloads nothing.
"""

from pathlib import Path

import torch

from maskformer.model import MaskFormer
from maskformer.taxonomy import Taxonomy
from maskformer.weights.loading import LoadReport, in_classifier, load
from maskformer.weights.reading import Source

_SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
_URLS = {
    "swin_t": _SWIN + "swin_tiny_patch4_window7_224.pth",
    "swin_s": _SWIN + "swin_small_patch4_window7_224.pth",
    "swin_b": _SWIN + "swin_base_patch4_window12_384_22k.pth",
    "swin_l": _SWIN + "swin_large_patch4_window12_384_22k.pth",
}
"""Where to find the ImageNet weights that the published models with a Swin started from."""


def initial_weights(model: MaskFormer, weights: Source, taxonomy: Taxonomy | None = None) -> LoadReport:
    """Load a complete MaskFormer or a backbone, in any format that `load` reads, into `model`.

    Args:
        weights: as for `load`, or `imagenet` for the published backbone in the torch hub cache.
        taxonomy: the classes of the data set, as for `load`.

    Raises:
        ValueError: as for `load`; or the backbone is incomplete, or not in the torch hub cache.
    """
    source = _imagenet(model.config.backbone) if weights == "imagenet" else weights
    state, report = load(source, model.config, taxonomy)
    absent = [name for name in report.missing if in_classifier(name)]
    if absent:
        raise ValueError(
            f"{report.source} does not fit the backbone {model.config.backbone}: it lacks {len(absent)} tensors, first "
            f"{absent[0]}. Give weights of {model.config.backbone}."
        )
    model.load_state_dict(state, strict=False)
    return report


def _imagenet(backbone: str) -> Path:
    urls = {**_URLS, **_resnet_urls()}
    if backbone not in urls:
        raise ValueError(
            f"There are no ImageNet weights for the backbone {backbone!r}. Use --weights none to start from random "
            f"weights."
        )
    url = urls[backbone]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        raise ValueError(
            f"The ImageNet weights of {backbone} are not at {path}. Download {url} to this path, give another file "
            f"with --weights PATH, or start from random weights with --weights none."
        )
    return path


def _resnet_urls() -> dict[str, str]:
    from torchvision.models import (  # pyright: ignore[reportMissingTypeStubs]  # torchvision ships none
        ResNet50_Weights,  # takes a second to import
        ResNet101_Weights,
    )

    # The former is torchvision://resnet50 in mmdetection.
    return {"resnet50": ResNet50_Weights.IMAGENET1K_V1.url, "resnet101": ResNet101_Weights.IMAGENET1K_V1.url}
