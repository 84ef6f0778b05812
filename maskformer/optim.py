"""AdamW's parameter groups and the learning rate of every step.

The groups follow MaskFormer (arXiv:2107.06278, section 4.1, and its released configurations): the backbone has a lower
learning rate; norms, query embeddings and Swin's position biases have no weight decay. The learning rate is a pure
function of the step, so checkpoints need not store it.
"""

import math
from typing import Any

import torch
from torch import nn

from maskformer.backbone import ShiftedWindowAttention
from maskformer.config import OptimizerConfig, ScheduleConfig
from maskformer.model import MaskFormer

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
_STEP_DECAY = 0.1


def parameter_groups(model: MaskFormer, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Put every trainable parameter into one group of AdamW; groups without parameters are omitted.

    Each group has `name`, `params`, `lr`, `initial_lr` (the rate before the schedule; PyTorch's name for it) and
    `weight_decay`.
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
    return [group for group in groups if group["params"]]


def _group(name: str, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"name": name, "params": [], "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}


def build_optimizer(model: MaskFormer, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW with the groups of `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, eps=config.eps)


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
