"""Checkpoints of untrained models that find several segments in any image."""

from dataclasses import replace
from pathlib import Path

import torch

from maskformer import MaskFormer, PanopticConfig, Segmenter, Taxonomy, build_model
from pipelines.checkpoints.state import TrainingState, save, step_folder
from pipelines.config.train import TrainConfig
from pipelines.storage import locate


def untrained(config: TrainConfig, seed: int = 0) -> tuple[TrainConfig, MaskFormer]:
    """Return a configuration with low thresholds, and a model whose masks are confident."""
    torch.manual_seed(seed)
    config = replace(config, panoptic=PanopticConfig(score_threshold=0.0, overlap_threshold=0.25))
    model = build_model(config.model)
    with torch.no_grad():
        model.state_dict()["mask_head.4.weight"].mul_(10)
    return config, model.eval()


def saved(config: TrainConfig, taxonomy: Taxonomy, run: Path, step: int = 5, seed: int = 0) -> Segmenter:
    """Write a checkpoint to a run's folder; return the segmenter that it is to become."""
    config, model = untrained(config, seed)
    save(step_folder(locate(run), step), TrainingState(step, model.state_dict(), {}), config, taxonomy)
    size = config.evaluation
    return Segmenter(model, taxonomy, config.panoptic, short_side=size.short_side, long_side=size.long_side)
