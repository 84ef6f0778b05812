"""The three losses with deep supervision (arXiv:2107.06278, sections 3.2 and 3.3).

The values equal those of both published implementations.

Letters: L decoder layers, B images, Q queries, K classes (K1 = K + 1, "no object" is index K), N segments, H W padded
image, h w map of the mask logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maskformer.config import LossConfig
from maskformer.mask_losses import mask_losses
from maskformer.matcher import match_layers
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
        dtype = torch.promote_types(class_logits.dtype, torch.float32)
        classification = _classification(class_logits.to(dtype), pairs, targets, config)
        focal, dice = mask_losses(mask_logits, pairs, targets, config).sum(dim=2)
        weighted = [
            config.classification_weight * classification,
            config.focal_weight * focal / num_masks,
            config.dice_weight * dice / num_masks,
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
