"""Layers whose activations are recomputed in the backward pass instead of kept for it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]  # torch leaves it untyped


def call_layers(layers: Iterable[nn.Module], x: Tensor, *rest: Tensor | None, recompute: bool) -> Tensor:
    """Apply layers one after the other, each to the result of the one before and to `rest`.

    Args:
        recompute: of each layer that trains, keep only the inputs for the backward pass, and compute the layer again
            there. Results, random draws and gradients are bit for bit the same.
    """
    for layer in layers:
        if recompute and layer.training and torch.is_grad_enabled():
            x = checkpoint(layer, x, *rest, use_reentrant=False, preserve_rng_state=True)
        else:
            x = layer(x, *rest)
    return x
