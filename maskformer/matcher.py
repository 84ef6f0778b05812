"""The bipartite matching of queries and segments of arXiv:2107.06278, section 3.2.

The costs are the terms of the losses, at the resolution of the mask logits. Logarithms are computed from logits, as in
the authors' code; mmdetection computes them from probabilities, which saturate beyond a logit of about 17.

Letters: L decoder layers, B images, Q queries, K classes (K1 = K + 1, "no object" is index K), N segments, h w map of
the mask logits, cells h * w.
"""

from collections.abc import Sequence
from itertools import product
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from torch import Tensor

from maskformer.config import LossConfig
from maskformer.mask_losses import softplus
from maskformer.pieces import for_each, piece_size
from maskformer.targets import Targets, to_device


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
    costs, mask_finite = matching_costs(class_logits, mask_logits, targets, config)
    class_finite = class_logits.isfinite().flatten(2).all(dim=2)
    # The assignment runs on the host. This single transfer, for all images and layers, waits for the device.
    parts = [class_finite, mask_finite, *costs]
    transfer = torch.cat([part.flatten().to(costs[0].dtype) for part in parts]).cpu()
    class_finite, mask_finite, *host_costs = torch.split(transfer, [part.numel() for part in parts])
    _check_finite("class_logits", class_finite.view(num_layers, num_images).numpy())
    _check_finite("mask_logits", mask_finite.view(num_layers, num_images).numpy())

    assigned: list[np.ndarray] = []
    for image, (flat, target) in enumerate(zip(host_costs, targets, strict=True)):
        cost = flat.view(num_layers, num_queries, len(target)).numpy()
        if not np.isfinite(cost).all():
            raise NonFiniteLogitsError(
                f"The matching costs of image {image} in the batch are not finite: its logits are too large; lower the "
                f"learning rate, or clip the gradients more."
            )
        assigned.append(_assign(cost))
    pairs = to_device(torch.as_tensor(np.concatenate(assigned, axis=2)), class_logits.device)
    queries, indices = (torch.split(each, [of_image.shape[2] for of_image in assigned], dim=1) for each in pairs)
    return list(zip(queries, indices, strict=True))


@torch.no_grad()
def matching_costs(
    class_logits: Float[Tensor, "L B Q K1"],
    mask_logits: Float[Tensor, "L B Q h w"],
    targets: Sequence[Targets],
    config: LossConfig,
) -> tuple[list[Float[Tensor, "L Q N"]], Bool[Tensor, "L B"]]:
    """Return the cost of each pair of query and segment for each image, and whether its mask logits are all finite.

    Computed in float32, also under autocast, or in float64 for logits in float64. Each map is read once, in pieces.
    """
    num_layers, num_images, num_queries = mask_logits.shape[:3]
    device, size = mask_logits.device, mask_logits.shape[-2:]
    dtype = torch.promote_types(mask_logits.dtype, torch.float32)
    masks = [target.resized(*size).flatten(-2) for target in targets]
    costs = [torch.empty(num_layers, num_queries, len(target), dtype=dtype, device=device) for target in targets]
    finite = torch.empty(num_layers, num_images, dtype=torch.bool, device=device)

    def compute(task: tuple[int, int]) -> None:
        layer, image = task
        with torch.autocast(device.type, enabled=False):
            probability = class_logits[layer, image].to(dtype).softmax(dim=-1)
            class_cost = -probability[:, targets[image].classes]
            logits = mask_logits[layer, image].flatten(1)
            mask_cost, finite[layer, image] = _mask_costs(logits, masks[image], len(targets[image]), config)
            costs[image][layer] = config.classification_weight * class_cost + mask_cost

    for_each(compute, list(product(range(num_layers), range(num_images))), device)
    return costs, finite


def _mask_costs(
    logits: Float[Tensor, "Q cells"], masks: Tensor, num_segments: int, config: LossConfig
) -> tuple[Float[Tensor, "Q N"], Bool[Tensor, ""]]:
    """Return the weighted focal and dice costs of one image and layer, and whether its logits are all finite.

    Args:
        masks: [N, cells] bool, or the index map [cells].
    """
    num_queries, pixels = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gamma, alpha = config.focal_gamma, config.focal_alpha
    common, inside = logits.new_zeros(2, num_queries, num_segments, dtype=dtype)
    outside, share_sum = logits.new_zeros(2, num_queries, 1, dtype=dtype)
    area = logits.new_zeros(num_segments, dtype=dtype)
    lowest, highest = logits.new_zeros(2, dtype=dtype)
    numbers = torch.arange(1, num_segments + 1, device=masks.device)
    piece = max(1, piece_size(logits.device) // num_queries)
    for start in range(0, pixels, piece):
        part = logits[:, start : start + piece].to(dtype)
        here = masks[..., start : start + piece]
        truth = (here.T if masks.ndim == 2 else here[:, None] == numbers).to(dtype)
        # NaN and infinity reach the limits.
        low, high = part.aminmax()
        lowest, highest = torch.minimum(lowest, low), torch.maximum(highest, high)
        share = part.sigmoid()
        other = 1 - share
        # softplus(part), the loss of a pixel outside; softplus(-part), that of one inside, is less by the logit.
        loss = softplus(part, share, other)
        loss_inside = (loss - part).mul_(alpha * other.pow_(gamma))
        loss.mul_(share.pow(gamma)).mul_(1 - alpha)
        # sum over pixels of t * inside + (1 - t) * outside, with one matrix product instead of two
        inside.addmm_(loss_inside.sub_(loss), truth)
        outside += loss.sum(dim=1, keepdim=True)
        common.addmm_(share, truth)
        share_sum += share.sum(dim=1, keepdim=True)
        area += truth.sum(dim=0)
    focal_cost = (inside + outside) / pixels
    dice_cost = 1 - (2 * common + 1) / (share_sum + area + 1)
    return config.focal_weight * focal_cost + config.dice_weight * dice_cost, lowest.isfinite() & highest.isfinite()


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
