"""AdamW's parameter groups, the learning rate of every step, and averaged weights.

The groups follow MaskFormer (arXiv:2107.06278, section 4.1, and its released configurations): the backbone has a lower
learning rate; norms, query embeddings and Swin's position biases have no weight decay. The learning rate is a pure
function of the step, so checkpoints need not store it.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maskformer.backbone import ShiftedWindowAttention
from maskformer.config import OptimizerConfig, ScheduleConfig
from maskformer.model import MaskFormer

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
_STEP_DECAY = 0.1


def parameter_groups(model: MaskFormer, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Put every trainable parameter into one group of AdamW; groups without parameters are omitted.

    Those with equal learning rate and weight decay are one group, so that AdamW updates them together; it has the names
    of all of them. Each group has `name`, `params`, `lr`, `initial_lr` (the rate before the schedule; PyTorch's name
    for it) and `weight_decay`.
    """
    backbone_lr = config.lr * config.backbone_lr_multiplier
    groups = [
        _group("backbone", backbone_lr, config.weight_decay),
        _group("backbone norms", backbone_lr, config.backbone_norm_weight_decay),
        # Every published recipe trains them at the full rate and without decay, unlike the other backbone weights.
        _group("position biases", config.lr, 0.0),
        _group("heads", config.lr, config.weight_decay),
        _group("head norms", config.lr, config.norm_weight_decay),
        _group("queries", config.lr, config.query_weight_decay),
    ]
    by_name = {group["name"]: group for group in groups}
    backbone = set(model.backbone.modules())
    for module in model.modules():
        if module is model.query_embedding:
            name = "queries"
        elif isinstance(module, ShiftedWindowAttention):
            name = "position biases"  # its only direct parameter; the projections are submodules
        elif isinstance(module, _NORMS):
            name = "backbone norms" if module in backbone else "head norms"
        else:
            name = "backbone" if module in backbone else "heads"
        by_name[name]["params"] += [p for p in module.parameters(recurse=False) if p.requires_grad]
    return _merged([group for group in groups if group["params"]])


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for group in groups:
        same = merged.setdefault((group["lr"], group["weight_decay"]), group)
        if same is not group:
            same["name"] += f", {group['name']}"
            same["params"] += group["params"]
    return list(merged.values())


def _group(name: str, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"name": name, "params": [], "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}


def build_optimizer(model: MaskFormer, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW with the groups of `parameter_groups`."""
    # Fused: one pass over parameters, gradients and moments.
    return torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, eps=config.eps, fused=True)


def learning_rate_factor(step: int, total_steps: int, steps_per_epoch: float, config: ScheduleConfig) -> float:
    """Return the factor on the initial learning rate of every group.

    Args:
        step: index of the optimization step, from 0.
        total_steps: optimization steps of the run, at which `cosine` reaches zero.
        steps_per_epoch: images in the data set / global batch size; need not be an integer.
    """
    if config.kind == "cosine":
        progress = max(0, step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        # The tolerance makes 3 epochs of 10 / 3 steps end at step 10, whichever way the product rounds.
        passed = sum(step + 1e-6 >= epoch * steps_per_epoch for epoch in config.milestone_epochs)
        factor = _STEP_DECAY**passed
    if step < config.warmup_steps:
        start = config.warmup_start_factor
        factor *= start + (1 - start) * step / config.warmup_steps
    return factor


class AveragedWeights:
    """The exponential moving average (EMA) of a model's trainable parameters.

    After every step, averaged = decay * averaged + (1 - decay) * trained; the initial weights are the first average.
    Buffers and frozen parameters have their latest values. The tensors of `state_dict` are the complete state.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights of `model` after a step to the average."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.requires_grad:
                self._tensors[name].lerp_(tensor, 1 - self._decay)
            else:
                self._tensors[name].copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights under the names of the model's own state; they change at the next update."""
        return dict(self._tensors)

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the result of `state_dict`.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, tensor in self._tensors.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def swapped(self, model: nn.Module) -> Generator[None]:
        """Give `model` the averaged weights inside the block, and its own again after it, bit for bit."""
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self._tensors)
        try:
            yield
        finally:
            model.load_state_dict(trained)
