"""Which query answers for which segment: the bipartite matching of arXiv:2107.06278, section 3.2.

The costs are the terms of the losses, on the small maps the model predicts. Logarithms are taken from logits, as in
the authors' code; mmdetection takes them from probabilities, which saturate beyond a logit of about 17.

L decoder layers, B images, Q queries, K classes (K1 = K + 1: no-object is index K), N segments, h w the map of the
mask logits.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from torch import Tensor
from torch.nn import functional as F

from maskformer.config import LossConfig
from maskformer.targets import Targets


class NonFiniteLogits(ValueError):
    """NaN or infinite logits; the message names the tensor, the image in the batch and the decoder layer."""


def match(
    class_logits: Float[Tensor, "B Q K1"],
    mask_logits: Float[Tensor, "B Q h w"],
    targets: Sequence[Targets],
    config: LossConfig,
) -> list[tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]]:
    """Assign the targets of each image to queries at the lowest total cost.

    Returns per image the query indices, ascending, and their target indices, on the device of the logits: min(N, Q)
    pairs, each query and each target at most once. No gradient flows.

    Raises ValueError if logits are not finite, or the targets do not fit the logits.
    """
    pairs = match_layers(class_logits[None], mask_logits[None], targets, config)
    return [(queries[0], places[0]) for queries, places in pairs]


@torch.no_grad()
def match_layers(
    class_logits: Float[Tensor, "L B Q K1"],
    mask_logits: Float[Tensor, "L B Q h w"],
    targets: Sequence[Targets],
    config: LossConfig,
) -> list[tuple[Int64[Tensor, "L pairs"], Int64[Tensor, "L pairs"]]]:
    """Match each decoder layer by itself, as `match` does one."""
    num_layers, num_images, num_queries, num_columns = class_logits.shape
    _check_targets(targets, num_images, num_columns - 1)
    costs = [
        matching_costs(class_logits[:, image], mask_logits[:, image], target, config)
        for image, target in enumerate(targets)
    ]
    finite = [logits.isfinite().flatten(2).all(dim=2) for logits in (class_logits, mask_logits)]
    # The assignment runs on the host. This one transfer, for all images and layers, is where it waits for the device.
    parts = [*finite, *costs]
    transfer = torch.cat([part.flatten().float() for part in parts]).cpu()
    class_finite, mask_finite, *host_costs = torch.split(transfer, [part.numel() for part in parts])
    _check_finite("class_logits", class_finite.view(num_layers, num_images).numpy())
    _check_finite("mask_logits", mask_finite.view(num_layers, num_images).numpy())

    pairs: list[tuple[Tensor, Tensor]] = []
    for cost, target in zip(host_costs, targets, strict=True):
        assigned = _assign(cost.view(num_layers, num_queries, len(target)).numpy())
        queries, places = torch.as_tensor(assigned, device=class_logits.device)
        pairs.append((queries, places))
    return pairs


@torch.no_grad()
def matching_costs(
    class_logits: Float[Tensor, "L Q K1"],
    mask_logits: Float[Tensor, "L Q h w"],
    target: Targets,
    config: LossConfig,
) -> Float[Tensor, "L Q N"]:
    """Return what it costs to give each query each segment of one image, in float32 even under autocast."""
    with torch.autocast(mask_logits.device.type, enabled=False):
        probability = class_logits.float().softmax(dim=-1)
        class_cost = -probability[..., target.classes]

        logits = mask_logits.float().flatten(2)
        masks = target.resized(*mask_logits.shape[-2:]).flatten(1).float().T
        inside = config.focal_alpha * focal(logits, config.focal_gamma)
        outside = (1 - config.focal_alpha) * focal(-logits, config.focal_gamma)
        # sum over pixels of t * inside + (1 - t) * outside, with one matrix product instead of two
        focal_cost = ((inside - outside) @ masks + outside.sum(dim=-1, keepdim=True)) / logits.shape[-1]

        share = logits.sigmoid()
        sums = share.sum(dim=-1, keepdim=True) + masks.sum(dim=0)
        dice_cost = 1 - (2 * share @ masks + 1) / (sums + 1)
    return config.classification_weight * class_cost + config.focal_weight * focal_cost + config.dice_weight * dice_cost


def focal(logits: Float[Tensor, "..."], gamma: float) -> Float[Tensor, "..."]:
    """Return the focal loss of a binary decision, without alpha; `logits` favour the right answer.

    (1 - p)^gamma * -log p with p = sigmoid(logits), in a form without overflow or cancellation
    (arXiv:1708.02002, equation 4).
    """
    return (-logits).sigmoid().pow(gamma) * F.softplus(-logits)


def _assign(costs: Float[np.ndarray, "L Q N"]) -> np.ndarray:
    """Solve each layer's assignment; [2, L, min(N, Q)]: query indices, ascending, and target indices."""
    assigned = np.empty((2, len(costs), min(costs.shape[1:])), dtype=np.int64)
    for layer, cost in enumerate(costs):
        assigned[:, layer] = cast("tuple[np.ndarray, np.ndarray]", linear_sum_assignment(cost))
    return assigned


def _check_targets(targets: Sequence[Targets], num_images: int, num_classes: int) -> None:
    if len(targets) != num_images:
        raise ValueError(f"Each image needs its Targets, got {len(targets)} for {num_images} images.")
    for image, target in enumerate(targets):
        if target.max_class >= num_classes:
            raise ValueError(
                f"The class logits have {num_classes} classes, got a target of class {target.max_class} in image "
                f"{image} of the batch; build the model with the taxonomy of the data."
            )


def _check_finite(name: str, finite: Float[np.ndarray, "L B"]) -> None:
    """Raise NonFiniteLogits at the first 0 (not finite)."""
    if not finite.all():
        layer, image = np.argwhere(finite == 0)[0]
        raise NonFiniteLogits(
            f"The {name} of image {image} in the batch are not finite at decoder layer {layer} of "
            f"0..{len(finite) - 1}; lower the learning rate, clip the gradients more, or look at the image."
        )
