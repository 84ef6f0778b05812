"""The three losses with deep supervision (arXiv:2107.06278, sections 3.2 and 3.3).

The values equal those of both published implementations.

Letters: L decoder layers, B images, Q queries, K classes (K1 = K + 1, "no object" is index K), N segments, H W padded
image, h w map of the mask logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maskformer.config import LossConfig
from maskformer.matcher import focal, match_layers
from maskformer.model import MaskFormerOutput
from maskformer.targets import Targets


class Losses(NamedTuple):
    """The weighted losses of a batch, float32."""

    by_layer: Float[Tensor, "L 3"]
    """Classification, focal and dice loss of each decoder layer."""

    @property
    def classification(self) -> Float[Tensor, ""]:
        return self.by_layer[:, 0].sum()

    @property
    def focal(self) -> Float[Tensor, ""]:
        return self.by_layer[:, 1].sum()

    @property
    def dice(self) -> Float[Tensor, ""]:
        return self.by_layer[:, 2].sum()

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum over losses and layers, on which to call `backward`."""
        return self.by_layer.sum()


def compute_losses(
    output: MaskFormerOutput, targets: Sequence[Targets], config: LossConfig, num_masks: float | None = None
) -> Losses:
    """Match every decoder layer's queries to the targets and return the losses, in float32 even under autocast.

    Void, crowd and padding count as outside of every mask. An image without targets trains its queries to predict "no
    object" and keeps the graph: its mask logits get gradients of zero.

    Args:
        num_masks: divisor of the mask losses. With gradient accumulation or data parallelism, pass the mean number of
            matched masks over all micro-batches of the step. None uses the number of this batch, at least 1.

    Raises:
        NonFiniteLogitsError: a logit is NaN or infinite.
        ValueError: targets do not fit the logits, or `num_masks` is not positive.
    """
    class_logits, mask_logits = output
    if num_masks is None:
        num_queries = class_logits.shape[2]
        num_masks = max(1, sum(min(len(target), num_queries) for target in targets))
    if not num_masks > 0:
        raise ValueError(f"num_masks must be positive, got {num_masks}; clamp the mean of the matched masks to 1.")
    with torch.autocast(mask_logits.device.type, enabled=False):
        pairs = match_layers(class_logits, mask_logits, targets, config)
        classification = _classification(class_logits.float(), pairs, targets, config)
        mask_losses = torch.stack(
            [
                mask_losses_of_image(mask_logits[:, image], queries, target.selected(target_indices.flatten()), config)
                for image, (target, (queries, target_indices)) in enumerate(zip(targets, pairs, strict=True))
            ]
        ).sum(dim=0)
        weighted = [
            config.classification_weight * classification,
            config.focal_weight * mask_losses[0] / num_masks,
            config.dice_weight * mask_losses[1] / num_masks,
        ]
        return Losses(torch.stack(weighted, dim=-1))


def _classification(
    class_logits: Float[Tensor, "L B Q K1"],
    pairs: Sequence[tuple[Int64[Tensor, "L _"], Int64[Tensor, "L _"]]],
    targets: Sequence[Targets],
    config: LossConfig,
) -> Float[Tensor, " L"]:
    """Return each layer's cross-entropy: a weighted mean over the queries of the batch."""
    no_object = class_logits.shape[-1] - 1
    class_targets = class_logits.new_full(class_logits.shape[:3], no_object, dtype=torch.int64)
    for image, (target, (queries, target_indices)) in enumerate(zip(targets, pairs, strict=True)):
        class_targets[:, image].scatter_(1, queries, target.classes[target_indices])
    weights = torch.where(class_targets == no_object, config.no_object_weight, 1.0)
    losses = F.cross_entropy(class_logits.flatten(0, 2), class_targets.flatten(), reduction="none").view_as(weights)
    # Without targets and with a "no object" weight of 0, all weights are 0 and the loss must be 0, not NaN.
    divisor = weights.sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    return (weights * losses).sum(dim=(1, 2)) / divisor


def mask_losses_of_image(
    mask_logits: Float[Tensor, "L Q h w"],
    queries: Int64[Tensor, "L pairs"],
    masks: Bool[Tensor, "L*pairs H W"],
    config: LossConfig,
) -> Float[Tensor, "2 L"]:
    """Return each layer's focal and dice loss of one image, summed over the matched pairs.

    Only matched queries are resized to full resolution. Without pairs the sums are empty: 0, but with a graph.
    """
    layers = torch.arange(len(queries), device=queries.device)[:, None]
    matched = mask_logits[layers, queries].flatten(0, 1).float()
    logits = F.interpolate(matched[:, None], masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]

    right = torch.where(masks, logits, -logits)
    alpha = torch.where(masks, config.focal_alpha, 1 - config.focal_alpha)
    focal_losses = (alpha * focal(right, config.focal_gamma)).mean(dim=(1, 2))

    share = logits.sigmoid()
    sums = share.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    dice_losses = 1 - (2 * (share * masks).sum(dim=(1, 2)) + 1) / (sums + 1)
    return torch.stack([focal_losses, dice_losses]).view(2, *queries.shape).sum(dim=2)
