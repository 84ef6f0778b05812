"""The parts of jobs/bench/peers.py: the same work done by this project and by Hugging Face's transformers."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

from maskformer import (
    R50,
    SWIN_L,
    LossConfig,
    MaskFormerOutput,
    ModelConfig,
    PanopticConfig,
    Targets,
    build_model,
    compute_losses,
    panoptic,
)
from maskformer.config import OptimizerConfig
from maskformer.optim import build_optimizer
from maskformer.taxonomy import COCO

Sides: TypeAlias = dict[str, Callable[[], object]]
"""What to call by whose it is: "theirs", and one or more that start with "ours"."""

QUERIES, CLASSES, LAYERS = 100, 133, 6
PADDED, COARSE, ORIGINAL = (800, 1216), (200, 304), (480, 640)
"""Padded input, map of its mask logits, and original image."""
KEPT = 30
"""Queries that the fusion keeps, and segments per image in the part criterion."""
SIDE, SEGMENTS = 512, 15
"""Side in pixels of an image and its segments in training steps."""
STAGES = ["stage1", "stage2", "stage3", "stage4"]
PEER: Any = transformers
"""Not typed: what its classes take is not declared."""


def sides_of(part: str, bfloat16: bool) -> Sides:
    """Prepare a part; `bfloat16` adds a side with autocast to the training steps."""
    match part:
        case "criterion":
            return _criterion()
        case "step":
            return _step(encoder_layers=0, bfloat16=bfloat16)
        case "encoder":
            return _step(encoder_layers=6, bfloat16=bfloat16)
        case "swin":
            return _swin()
        case _:
            return _fusion()


def _index_map(segments: int, height: int, width: int) -> Tensor:
    """Return an int32 map of Voronoi regions [height, width]: a void one (0) and one for each segment (1, 2, ...)."""
    points = torch.randperm(height * width)[: segments + 1]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    distances = torch.stack([(rows - p // width) ** 2 + (columns - p % width) ** 2 for p in points])
    return distances.argmin(0).int()


def _targets(images: int, segments: int, size: tuple[int, int]) -> tuple[list[Targets], list[Tensor], list[Tensor]]:
    """Return our targets, and the same as their float masks and classes."""
    ours = [Targets(torch.randint(CLASSES, (segments,)), _index_map(segments, *size)) for _ in range(images)]
    numbers = torch.arange(1, segments + 1)[:, None, None]
    return ours, [(each.masks == numbers).float() for each in ours], [each.classes for each in ours]


def _criterion() -> Sides:
    """Matching, losses and their backward pass for all decoder layers of a batch of two."""
    targets, masks, classes = _targets(2, KEPT, PADDED)
    class_logits = torch.randn(LAYERS, 2, QUERIES, CLASSES + 1, requires_grad=True)
    mask_logits = torch.randn(LAYERS, 2, QUERIES, *COARSE, requires_grad=True)
    weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
    peer = MaskFormerLoss(
        num_labels=CLASSES,
        matcher=MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0),
        weight_dict=weights,
        eos_coef=0.1,
    )

    def forget_gradients() -> None:
        class_logits.grad = mask_logits.grad = None

    def ours() -> None:
        compute_losses(MaskFormerOutput(class_logits, mask_logits), targets, LossConfig()).total.backward()
        forget_gradients()

    def theirs() -> None:
        *others, last = (
            {"masks_queries_logits": mask, "class_queries_logits": label}
            for mask, label in zip(mask_logits, class_logits, strict=True)
        )
        losses = peer(*last.values(), masks, classes, others)
        total: Any = sum(
            weight * loss for key, weight in weights.items() for name, loss in losses.items() if key in name
        )
        total.backward()
        forget_gradients()

    return {"ours": ours, "theirs": theirs}


def _training(config: ModelConfig, backbone: Any, images: int, optimize: bool, bfloat16: bool = False) -> Sides:
    """Return steps of our model and of theirs with that backbone; without `optimize`, only forward and backward."""
    pixels = torch.randn(images, 3, SIDE, SIDE)
    targets, masks, classes = _targets(images, SEGMENTS, (SIDE, SIDE))
    settings = OptimizerConfig()
    model = build_model(config).train()
    peer_config = PEER.MaskFormerConfig(
        backbone_config=backbone,
        decoder_config={"model_type": "detr", "num_queries": QUERIES, "decoder_layers": LAYERS, "dropout": 0.1},
        use_auxiliary_loss=True,
        num_labels=CLASSES,
    )
    peer = PEER.MaskFormerForInstanceSegmentation(peer_config).train()
    optimizers = {
        model: build_optimizer(model, settings),
        peer: torch.optim.AdamW(
            peer.parameters(), settings.lr, settings.betas, settings.eps, weight_decay=settings.weight_decay
        ),
    }

    def finish(network: nn.Module, loss: Tensor) -> None:
        loss.backward()
        if optimize:
            torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            optimizers[network].step()
        network.zero_grad(set_to_none=True)  # at the end, so that the measured memory includes the gradients

    def ours(autocast: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(pixels)
        finish(model, compute_losses(output, targets, LossConfig()).total)

    def theirs() -> None:
        # Without output_hidden_states, transformers 5.23 has no auxiliary losses and fails.
        output = peer(pixel_values=pixels, mask_labels=masks, class_labels=classes, output_hidden_states=True)
        finish(peer, output.loss)

    return {"ours": ours, **({"ours, bfloat16": lambda: ours(True)} if bfloat16 else {}), "theirs": theirs}


def _step(encoder_layers: int, bfloat16: bool) -> Sides:
    """A training step of R50 with two images; theirs never has the transformer encoder."""
    config = replace(R50, encoder_layers=encoder_layers)
    return _training(config, PEER.ResNetConfig(out_features=STAGES), images=2, optimize=True, bfloat16=bfloat16)


def _swin() -> Sides:
    """Forward and backward pass of Swin-L with one image, without stochastic depth."""
    backbone = PEER.SwinConfig(
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        drop_path_rate=0.0,
        out_features=STAGES,
    )
    return _training(replace(SWIN_L, drop_path=0.0), backbone, images=1, optimize=False)


def _fusion() -> Sides:
    """Fusion of the queries of an image to panoptic segments at its original size."""
    class_logits = torch.randn(QUERIES, CLASSES + 1)
    class_logits[torch.arange(KEPT), torch.randint(CLASSES, (KEPT,))] += 20
    class_logits[KEPT:, -1] += 20
    regions = _index_map(KEPT, 25, 38)
    coarse = torch.randn(QUERIES, 25, 38) - 4
    coarse[:KEPT] += 8 * (regions == torch.arange(1, KEPT + 1)[:, None, None])
    mask_logits = torch.nn.functional.interpolate(coarse[None], COARSE, mode="bilinear")[0]
    config = PanopticConfig()
    processor = PEER.MaskFormerImageProcessor()
    stuff = {index for index in range(CLASSES) if not COCO.is_thing(index)}

    def ours() -> None:
        panoptic(class_logits, mask_logits, (PADDED, PADDED, ORIGINAL), config, COCO)

    @torch.no_grad()
    def theirs() -> None:
        processor.post_process_panoptic_segmentation(
            SimpleNamespace(class_queries_logits=class_logits[None], masks_queries_logits=mask_logits[None]),
            threshold=config.score_threshold,
            overlap_mask_area_threshold=config.overlap_threshold,
            label_ids_to_fuse=stuff,
            target_sizes=[ORIGINAL],
        )

    return {"ours": ours, "theirs": theirs}
