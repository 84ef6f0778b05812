"""Describing a configuration in numbers: model, length, schedule, optimizer groups."""

import math

import torch

from maskformer import build_model
from maskformer.optim import parameter_groups
from maskformer.untrusted import escaped
from pipelines.config.recipes import PUBLISHED
from pipelines.config.train import TrainConfig
from pipelines.data.order import total_steps


def describe(config: TrainConfig, num_images: int, source: str) -> str:
    """Describe a resolved configuration as text: model, length, schedule and effective optimizer groups.

    Args:
        num_images: number of training images.
        source: description of their origin, such as `of COCO train2017`.

    Raises:
        UserError: the global batch does not divide evenly among the workers.
    """
    with torch.device("meta"):
        model = build_model(config.model)
    run, network, augment = config.run, config.model, config.data.augment
    steps = run.steps or total_steps(run.epochs, num_images, run.global_batch)
    steps_per_epoch = num_images / run.global_batch
    low, high = augment.crop_size
    sizes = [parameter.numel() for parameter in model.parameters()]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = [
        ("recipe", config.recipe),
        ("published", PUBLISHED.get(config.recipe, "nothing")),
        ("model", f"{network.backbone}, {sum(sizes):,} parameters, {trainable:,} trainable; "
                  f"{network.num_classes} classes, {network.num_queries} queries"),
        ("dropout", f"{network.dropout:g}, decoder feed-forward layers {network.decoder_feedforward_dropout:g}, "
                    f"drop path {network.drop_path:g}"),
        ("weights", config.weights),
        ("precision", f"{config.network_precision('cuda')} on GPUs, {config.network_precision('cpu')} on CPUs"),
        ("images", f"{num_images:,} {source}"),
        ("batch", f"{config.batch_split} (workers, micro-batch, accumulation)"),
        ("length", f"{steps:,} steps = {steps / steps_per_epoch:,.2f} epochs: {steps * run.global_batch:,} images"),
        ("augment", f"flip {augment.flip_probability:g}; short side {_range(augment.short_sides)}, "
                    f"long side <= {augment.long_side}; {augment.interpolation}"),
        ("crop", f"probability {augment.crop_probability:g}: short side {_range(augment.crop_short_sides)}, long side "
                 f"<= {augment.crop_long_side or 'infinity'}, height and width cropped to {low}..{high}; "
                 f"empty segments are {'kept' if augment.keep_empty else 'dropped'}"),
        ("loss weights", f"classification {config.loss.classification_weight:g}, focal {config.loss.focal_weight:g}, "
                         f"dice {config.loss.dice_weight:g}, no object {config.loss.no_object_weight:g}"),
        ("schedule", _schedule(config, steps, steps_per_epoch)),
        ("optimizer", f"AdamW, betas {config.optimizer.betas}, eps {config.optimizer.eps:g}, "
                      f"gradients clipped at {config.optimizer.clip_norm:g}"),
    ]  # fmt: skip
    lines = [f"{name:<14}{value}" for name, value in rows]
    groups = parameter_groups(model, config.optimizer)
    width = max(16, *(len(group["name"]) for group in groups)) + 2
    lines += ["", f"{'group':<{width}}{'tensors':>8}{'parameters':>14}{'lr':>10}{'decay':>10}"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group['name']:<{width}}{len(group['params']):>8}{count:>14,}{group['lr']:>10.3g}{group['weight_decay']:>10.3g}"
        )
    return "\n".join(map(escaped, lines))


def _range(values: tuple[int, ...]) -> str:
    return f"{values[0]}..{values[-1]}" if len(values) > 3 else ", ".join(map(str, values))


def _schedule(config: TrainConfig, steps: int, steps_per_epoch: float) -> str:
    schedule = config.schedule
    warmup = f"linear over {schedule.warmup_steps:,} steps from x{schedule.warmup_start_factor:g}; "
    if schedule.kind == "cosine":
        rest = "cosine to zero"
    else:
        drops = [(epoch, math.ceil(epoch * steps_per_epoch - 1e-6)) for epoch in schedule.milestone_epochs]
        rest = "; ".join(
            f"x0.1 from step {step:,} (epoch {epoch:.4g})" + (", after the end" if step >= steps else "")
            for epoch, step in drops
        )
    return (warmup if schedule.warmup_steps else "no warm-up; ") + (rest or "constant")
