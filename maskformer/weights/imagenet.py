"""The backbone's first weights: torchvision's ImageNet checkpoint, from torch hub's cache or a file.

Nothing is downloaded here, and reading a file never executes code from it.
"""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights  # pyright: ignore[reportMissingTypeStubs]  # torchvision ships none

from maskformer.model import MaskFormer

_URLS = {"resnet50": ResNet50_Weights.IMAGENET1K_V1.url}
"""What mmdetection names `torchvision://resnet50`."""


def load_backbone(model: MaskFormer, weights: str) -> None:
    """Load ImageNet weights into `model.backbone`.

    Args:
        weights: `imagenet` for torch hub's cache, or the path of a state dict with torchvision's names.

    Raises:
        ValueError: there is no such file, it is not a state dict, or it does not fit the backbone.
    """
    name = model.config.backbone
    if name not in _URLS:
        raise ValueError(
            f"There are no ImageNet weights for the backbone {name!r}. Use --weights none to start from random ones."
        )
    if "://" in weights:
        raise ValueError(
            f"Weights are read from a file, got the URI {weights}. Copy it to a path that every worker sees, and give "
            f"that with --weights PATH."
        )
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(_URLS[name]).name
    path = cached if weights == "imagenet" else Path(weights)
    if not path.is_file():
        raise ValueError(
            f"The ImageNet weights of {name} are not at {path}. Fetch {_URLS[name]} and put it there, name another "
            f"file with --weights PATH, or start from random weights with --weights none."
        )
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}). Give a state dict saved by torch.save, such "
            f"as {_URLS[name]}."
        ) from error
    # The classifier is ImageNet's own. The counter of batches is not a weight, and frozen norms do not count.
    used = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    own = {k: v for k, v in model.backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(used.keys() ^ own.keys()) + [
        f"{k} {tuple(used[k].shape)}, not {tuple(own[k].shape)}"
        for k in used.keys() & own.keys()
        if used[k].shape != own[k].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit the backbone {name}: {len(wrong)} tensors differ, first {wrong[0]}. "
            f"Give torchvision's weights of {name}."
        )
    model.backbone.load_state_dict(used, strict=False)
