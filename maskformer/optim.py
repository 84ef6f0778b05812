"""What the optimizer does to which parameter, and the learning rate of every step.

AdamW as MaskFormer uses it (arXiv:2107.06278, section 4.1, and its released configurations): the backbone learns
slower, norms, query embeddings and Swin's position biases do not decay. The learning rate is a pure function of the
step: it needs no saving.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from maskformer.backbone import ShiftedWindowAttention
from maskformer.model import MaskFormer

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
_STEP_DECAY = 0.1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. The defaults are the published ResNet-50 recipe."""

    lr: float = 1e-4
    """For everything but the backbone."""
    backbone_lr_multiplier: float = 0.1
    weight_decay: float = 1e-4
    """Of weights and biases alike."""
    norm_weight_decay: float = 0.0
    """Of the norms outside the backbone."""
    backbone_norm_weight_decay: float = 0.0
    """mmdetection's Swin-L trained with 0.01: its inherited rule for the backbone comes before the one for norms."""
    query_weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 0.01
    """L2 norm of all gradients together after clipping; 0 leaves them. Raw norms are far above 0.01, so with the
    default every gradient has this length."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"optimizer.{name} must be positive, got {value}.")
        decays = ("weight_decay", "norm_weight_decay", "backbone_norm_weight_decay", "query_weight_decay")
        for name in ("backbone_lr_multiplier", *decays, "clip_norm"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"optimizer.{name} must not be negative, got {value}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {self.betas}; the usual pair is (0.9, 0.999).")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The factor on every learning rate over the run. The defaults are the published ResNet-50 recipe."""

    kind: Literal["step", "cosine"] = "step"
    """`step` drops to a tenth at each milestone; `cosine` falls from the end of the warm-up to zero."""
    milestone_epochs: tuple[float, ...] = (50.0,)
    """Epochs finished when the rate drops; for `step` only."""
    warmup_steps: int = 0
    """Steps of linear rise from `warmup_start_factor` to 1."""
    warmup_start_factor: float = 1e-6

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must not be negative, got {self.warmup_steps}; 0 is no warm-up.")
        if not 0 <= self.warmup_start_factor <= 1:
            raise ValueError(f"schedule.warmup_start_factor must lie in [0, 1], got {self.warmup_start_factor}.")
        milestones = self.milestone_epochs
        if not all(0 < epoch < math.inf for epoch in milestones) or list(milestones) != sorted(set(milestones)):
            raise ValueError(
                f"schedule.milestone_epochs must be positive and rise, got {milestones}; "
                f"write the epochs after which the learning rate drops, for example (50,)."
            )


def parameter_groups(model: MaskFormer, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Put every trainable parameter into one group of AdamW; groups without parameters are left out.

    Each group has `name`, `params`, `lr`, `initial_lr` (the rate before any schedule; PyTorch's name for it) and
    `weight_decay`.
    """
    backbone_lr = config.lr * config.backbone_lr_multiplier
    groups = [
        _group("backbone", backbone_lr, config.weight_decay),
        _group("backbone norms", backbone_lr, config.backbone_norm_weight_decay),
        # At the full rate and without decay in every published recipe, whatever the rest of the backbone does.
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
            name = "position biases"  # its own parameter; the projections are modules inside
        elif isinstance(module, _NORMS):
            name = "backbone norms" if module in backbone else "head norms"
        else:
            name = "backbone" if module in backbone else "heads"
        by_name[name]["params"] += [p for p in module.parameters(recurse=False) if p.requires_grad]
    return [group for group in groups if group["params"]]


def _group(name: str, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"name": name, "params": [], "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}


def build_optimizer(model: MaskFormer, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the groups of `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, eps=config.eps)


def learning_rate_factor(step: int, total_steps: int, steps_per_epoch: float, config: ScheduleConfig) -> float:
    """Return the factor for step `step`, counted from 0, on the initial learning rate of every group.

    Args:
        steps_per_epoch: images in the data set / global batch; need not be whole.
    """
    if config.kind == "cosine":
        progress = max(0, step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        # The tolerance keeps 3 epochs of 10 / 3 steps at 10 steps, whichever way the product rounds.
        passed = sum(step + 1e-6 >= epoch * steps_per_epoch for epoch in config.milestone_epochs)
        factor = _STEP_DECAY**passed
    if step < config.warmup_steps:
        start = config.warmup_start_factor
        factor *= start + (1 - start) * step / config.warmup_steps
    return factor
