"""Focal and dice loss of matched masks at full resolution, with their gradients, in bounded memory.

The definition is short: resize the matched mask logits to the size of the image, compare them with the masks there, and
sum (arXiv:2107.06278, section 3.3). With autograd, each matched mask keeps several maps of full resolution. Here one
pass over strips of rows computes the losses and their gradients with respect to the mask logits, and keeps nothing of
full resolution. The tests have the short definition.

Bilinear resizing is linear, so it is a product with one matrix for the columns and one for the rows. The gradient takes
the products with the transposed matrices.

Letters: L decoder layers, B images, Q queries, M matched pairs that are processed together, H W padded image, h w map
of the mask logits, R rows of a strip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskformer.config import LossConfig
from maskformer.pieces import for_each, piece_size
from maskformer.targets import Targets

_BAND = 256
"""Columns of the image that one product computes. It needs only the columns of the map that lie below them."""


def mask_losses(
    mask_logits: Float[Tensor, "L B Q h w"],
    pairs: Sequence[tuple[Int64[Tensor, "L _"], Int64[Tensor, "L _"]]],
    targets: Sequence[Targets],
    config: LossConfig,
    *,
    piece: int | None = None,
) -> Float[Tensor, "2 L B"]:
    """Return the focal and the dice loss of each layer and image, summed over the matched pairs.

    Computed in float32, or in float64 for logits in float64. An image without pairs has losses of 0 and gradients of 0.
    The gradients are computed together with the losses, also under `no_grad`, and cannot be differentiated again.

    Args:
        pairs: for each image its matched query indices and target indices, on the device of the logits.
        piece: pixels of full resolution to process at a time; None chooses by the device.
    """
    piece = piece or piece_size(mask_logits.device)
    with torch.autocast(mask_logits.device.type, enabled=False):
        return _MaskLosses.apply(mask_logits, pairs, targets, config, piece)  # pyright: ignore[reportReturnType]


class _MaskLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mask_logits: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        targets: Sequence[Targets],
        config: LossConfig,
        piece: int,
    ) -> Tensor:
        map_size = mask_logits.shape[-2:]
        dtype = torch.promote_types(mask_logits.dtype, torch.float32)
        # Of the pairs of all layers, one layer after the other.
        losses = [mask_logits.new_zeros(2, queries.numel(), dtype=dtype) for queries, _ in pairs]
        gradients = [mask_logits.new_empty(2, queries.numel(), *map_size, dtype=dtype) for queries, _ in pairs]
        layers = [torch.arange(len(q), device=q.device)[:, None].expand_as(q).flatten() for q, _ in pairs]
        resizings = [_Resizing.between(map_size, target.size, piece, losses[0]) for target in targets]
        tasks = [
            (image, slice(start, start + resizing.together))
            for image, (resizing, (queries, _)) in enumerate(zip(resizings, pairs, strict=True))
            for start in range(0, queries.numel(), resizing.together)
        ]

        def compute(task: tuple[int, slice]) -> None:
            image, part = task
            queries, indices = (each.flatten()[part] for each in pairs[image])
            maps = mask_logits[layers[image][part], image, queries].to(dtype)
            losses[image][:, part] = _sweep(
                maps, targets[image], indices, config, resizings[image], gradients[image][:, part]
            )

        for_each(compute, tasks, mask_logits.device)
        ctx.save_for_backward(*gradients)
        ctx.queries = [queries for queries, _ in pairs]
        ctx.shape, ctx.dtype = mask_logits.shape, mask_logits.dtype
        by_layer = [
            of_image.view(2, *queries.shape).sum(dim=2) for of_image, queries in zip(losses, ctx.queries, strict=True)
        ]
        return torch.stack(by_layer, dim=2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the base class takes any number of gradients
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        result = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)
        for image, (queries, gradients) in enumerate(zip(ctx.queries, ctx.saved_tensors, strict=True)):
            by_layer = gradients.unflatten(1, queries.shape)
            for layer, of_layer in enumerate(queries):
                focal, dice = by_layer[:, layer]
                weighted = (grad[0, layer, image] * focal).addcmul_(grad[1, layer, image], dice)
                result[layer, image, of_layer] = weighted.to(ctx.dtype)
        return result, None, None, None, None


class _Band(NamedTuple):
    """A few outputs of a bilinear resizing along one axis, with the inputs below them."""

    outputs: slice
    inputs: slice
    weights: Float[Tensor, "outputs inputs"]


@dataclass(frozen=True)
class _Resizing:
    """The weights with which maps become masks of full resolution, in bands that limit the size of a product."""

    rows: list[_Band]
    columns: list[_Band]
    together: int
    """Maps to process together."""

    @classmethod
    def between(cls, map_size: Sequence[int], size: tuple[int, int], piece: int, like: Tensor) -> "_Resizing":
        height, width = size
        together = max(1, piece // (height * width))
        step = max(1, piece // (together * width))
        return cls(_bands(map_size[0], height, step, like), _bands(map_size[1], width, _BAND, like), together)


def _bands(size: int, resized: int, step: int, like: Tensor) -> list[_Band]:
    """Return the weights of F.interpolate without align_corners, `step` outputs at a time."""
    ratio = size / resized
    bands: list[_Band] = []
    for start in range(0, resized, step):
        stop = min(start + step, resized)
        first = min(int(max(0.0, (start + 0.5) * ratio - 0.5)), size - 1)
        last = min(int(max(0.0, (stop - 0.5) * ratio - 0.5)) + 1, size - 1)
        outputs = torch.arange(start, stop, dtype=like.dtype, device=like.device)
        inputs = torch.arange(first, last + 1, dtype=like.dtype, device=like.device)
        places = ((outputs + 0.5) * ratio - 0.5).clamp_(0, size - 1)
        weights = (1 - (places[:, None] - inputs).abs()).clamp_(min=0)
        bands.append(_Band(slice(start, stop), slice(first, last + 1), weights))
    return bands


def _sweep(
    maps: Float[Tensor, "M h w"],
    target: Targets,
    indices: Int64[Tensor, " M"],
    config: LossConfig,
    resizing: _Resizing,
    gradients: Float[Tensor, "2 M h w"],
) -> Float[Tensor, "2 M"]:
    """Return the focal and dice loss of each map, and write their gradients to `gradients`."""
    height, width = target.size
    wide = maps.new_empty(*maps.shape[:2], width)
    for band in resizing.columns:
        torch.mm(maps.flatten(0, 1)[:, band.inputs], band.weights.T, out=wide.flatten(0, 1)[:, band.outputs])

    # Gradients of the focal losses, of the sum of the probabilities, and of their sum inside the mask. Their rows are
    # those of the map already, their columns still those of the image.
    pulled = maps.new_zeros(3, *wide.shape)
    sums = maps.new_zeros(4, len(maps), dtype=torch.float64)
    for band in resizing.rows:
        inside = target.selected(indices, band.outputs).to(maps.dtype)
        strip, strip_sums = _strip(band.weights @ wide[:, band.inputs], inside, config)
        pulled[:, :, band.inputs] += band.weights.T @ strip
        sums += strip_sums

    area, wrong, wrong_inside, focal = sums
    # The probability of a pixel is 1 - wrong inside its mask, and wrong outside.
    common = area - wrong_inside
    total = common + (wrong - wrong_inside) + area + 1
    dice_losses = 1 - (2 * common + 1) / total
    by_sum, by_common = ((2 * common + 1) / total.square()).to(maps.dtype), (-2 / total).to(maps.dtype)
    pulled[1].mul_(by_sum[:, None, None]).addcmul_(by_common[:, None, None], pulled[2])

    flat = pulled[:2].flatten(0, 2)
    result = maps.new_zeros(len(flat), maps.shape[-1])
    for band in resizing.columns:
        result[:, band.inputs].addmm_(flat[:, band.outputs], band.weights)
    gradients.copy_(result.view(gradients.shape))
    pixels = height * width
    gradients[0].div_(pixels)
    return torch.stack([focal / pixels, dice_losses]).to(maps.dtype)


def softplus(logits: Tensor, share: Tensor, other: Tensor) -> Tensor:
    """Return log(1 + exp(logits)), given their sigmoid `share` and `other` = 1 - share.

    The absolute error is at most that of rounding 1. PyTorch's own function takes six times as long on a CPU.
    """
    return logits.clamp(min=0).sub_(torch.maximum(share, other).log_())


def _strip(
    logits: Float[Tensor, "M R W"], inside: Float[Tensor, "M R W"], config: LossConfig
) -> tuple[Float[Tensor, "3 M R W"], Float[Tensor, "4 M"]]:
    """Return the gradients with respect to the logits, and the sums over pixels.

    With z the logit of the right decision (the logit inside the mask, its negative outside) and q = sigmoid(-z) the
    probability of the wrong one, the focal loss is alpha q^gamma softplus(-z). No pixel's term overflows at any finite
    logit. In float32, softplus is exact to 1e-7, which is coarse beside its own value only where q^gamma is tiny.

    Returns:
        the gradients of the focal loss, of the sum of the probabilities, and of their sum inside the mask; the sums of
        `inside`, of q, of q inside, and of the focal losses.
    """
    gamma = config.focal_gamma
    result = logits.new_empty(3, *logits.shape)
    focal_gradient, slope, slope_inside = result
    wrong_logits = torch.rsub(inside, 1, alpha=2).mul_(logits)
    wrong = wrong_logits.sigmoid()
    right = 1 - wrong
    power = wrong.square() if gamma == 2 else wrong.pow(gamma)
    focal = softplus(wrong_logits, wrong, right).mul_(power)

    torch.mul(wrong, right, out=slope)
    torch.mul(slope, inside, out=slope_inside)
    # With respect to -z and without alpha, it is q^gamma (gamma (1 - q) softplus(-z) + q).
    torch.mul(focal, right, out=focal_gradient).mul_(gamma).addcmul_(power, wrong)
    # alpha with the sign of -z: -alpha inside, 1 - alpha outside.
    weight = 1 - config.focal_alpha - inside
    focal_gradient.mul_(weight)
    sums = [inside, wrong, wrong * inside, focal.mul_(weight.abs_())]
    return result, torch.stack([each.sum(dim=(1, 2)) for each in sums])
