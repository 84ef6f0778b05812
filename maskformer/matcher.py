"""The bipartite matching of queries and segments of arXiv:2107.06278, section 3.2.

The costs are the terms of the losses, at the resolution of the mask logits. Logarithms are computed from logits, as in
the authors' code; mmdetection computes them from probabilities, which saturate beyond a logit of about 17.

Letters: L decoder layers, B images, Q queries, K classes (K1 = K + 1, "no object" is index K), N segments, h w map of
the mask logits.
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


class NonFiniteLogitsError(ValueError):
    """NaN or infinite logits; the message names the tensor, the image in the batch and the decoder layer."""


def match(
    class_logits: Float[Tensor, "B Q K1"],
    mask_logits: Float[Tensor, "B Q h w"],
    targets: Sequence[Targets],
    config: LossConfig,
) -> list[tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]]:
    """Assign the targets of each image to queries at the lowest total cost.

    No gradient flows.

    Returns:
        for each image the query indices, ascending, and their target indices, on the device of the logits: min(N, Q)
        pairs, each query and each target at most once.

    Raises:
        NonFiniteLogitsError: a logit is NaN or infinite.
        ValueError: the targets do not fit the logits.
    """
    pairs = match_layers(class_logits[None], mask_logits[None], targets, config)
    return [(queries[0], target_indices[0]) for queries, target_indices in pairs]


@torch.no_grad()
def match_layers(
    class_logits: Float[Tensor, "L B Q K1"],
    mask_logits: Float[Tensor, "L B Q h w"],
    targets: Sequence[Targets],
    config: LossConfig,
) -> list[tuple[Int64[Tensor, "L pairs"], Int64[Tensor, "L pairs"]]]:
    """Match each decoder layer separately, as `match` does for one."""
    num_layers, num_images, num_queries, num_columns = class_logits.shape
    _check_targets(targets, num_images, num_columns - 1)
    costs = [
        matching_costs(class_logits[:, image], mask_logits[:, image], target, config)
        for image, target in enumerate(targets)
    ]
    finite = [logits.isfinite().flatten(2).all(dim=2) for logits in (class_logits, mask_logits)]
    # The assignment runs on the host. This single transfer, for all images and layers, synchronizes with the device.
    parts = [*finite, *costs]
    transfer = torch.cat([part.flatten().float() for part in parts]).cpu()
    class_finite, mask_finite, *host_costs = torch.split(transfer, [part.numel() for part in parts])
    _check_finite("class_logits", class_finite.view(num_layers, num_images).numpy())
    _check_finite("mask_logits", mask_finite.view(num_layers, num_images).numpy())

    pairs: list[tuple[Tensor, Tensor]] = []
    for image, (flat, target) in enumerate(zip(host_costs, targets, strict=True)):
        cost = flat.view(num_layers, num_queries, len(target)).numpy()
        if not np.isfinite(cost).all():
            raise NonFiniteLogitsError(
                f"The matching costs of image {image} in the batch are not finite: its logits are too large; lower the "
                f"learning rate, or clip the gradients more."
            )
        assigned = _assign(cost)
        queries, target_indices = torch.as_tensor(assigned, device=class_logits.device)
        pairs.append((queries, target_indices))
    return pairs


@torch.no_grad()
def matching_costs(
    class_logits: Float[Tensor, "L Q K1"],
    mask_logits: Float[Tensor, "L Q h w"],
    target: Targets,
    config: LossConfig,
) -> Float[Tensor, "L Q N"]:
    """Return the cost of each pair of query and segment of one image, in float32 even under autocast."""
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
    """Return the focal loss of a binary decision, without alpha; positive `logits` mean the right decision.

    (1 - p)^gamma * -log p with p = sigmoid(logits), in a form without overflow and cancellation
    (arXiv:1708.02002, equation 4).
    """
    return (-logits).sigmoid().pow(gamma) * F.softplus(-logits)


def _assign(costs: Float[np.ndarray, "L Q N"]) -> np.ndarray:
    """Solve each layer's assignment; return [2, L, min(N, Q)]: query indices, ascending, and target indices."""
    assigned = np.empty((2, len(costs), min(costs.shape[1:])), dtype=np.int64)
    for layer, cost in enumerate(costs):
        assigned[:, layer] = cast("tuple[np.ndarray, np.ndarray]", linear_sum_assignment(cost))
    return assigned


def _check_targets(targets: Sequence[Targets], num_images: int, num_classes: int) -> None:
    if len(targets) != num_images:
        raise ValueError(
            f"Each image needs its Targets, got {len(targets)} for {num_images} images; pass one per image."
        )
    for image, target in enumerate(targets):
        if target.max_class >= num_classes:
            raise ValueError(
                f"The class logits have {num_classes} classes, got a target of class {target.max_class} in image "
                f"{image} of the batch; build the model with the taxonomy of the data."
            )


def _check_finite(name: str, finite: Float[np.ndarray, "L B"]) -> None:
    """Raise NonFiniteLogitsError at the first 0 (not finite)."""
    if not finite.all():
        layer, image = np.argwhere(finite == 0)[0]
        raise NonFiniteLogitsError(
            f"The {name} of image {image} in the batch are not finite at decoder layer {layer} of "
            f"0..{len(finite) - 1}; lower the learning rate, clip the gradients more, or check the image."
        )
