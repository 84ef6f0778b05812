"""Checkpoints of untrained models that find several segments in any image."""

from dataclasses import replace
from pathlib import Path

import torch

from maskformer import MaskFormer, PanopticConfig, Segmenter, Taxonomy, build_model
from pipelines.checkpoints.state import TrainingState, save, step_folder
from pipelines.config.train import TrainConfig
from pipelines.storage import locate


def untrained(config: TrainConfig, seed: int = 0) -> tuple[TrainConfig, MaskFormer]:
    """Return a configuration with low thresholds, and a model whose queries differ in class and in mask."""
    torch.manual_seed(seed)
    config = replace(config, panoptic=PanopticConfig(score_threshold=0.0, overlap_threshold=0.001))
    model = build_model(config.model)
    with torch.no_grad():
        model.query_embedding.weight *= 10
        model.class_head.weight *= 20
        for parameter in model.mask_head.parameters():
            parameter *= 3
    return config, model.eval()


def saved(config: TrainConfig, taxonomy: Taxonomy, run: Path, step: int = 5, seed: int = 0) -> Segmenter:
    """Write a checkpoint to a run's folder; return the segmenter that it is to become."""
    config, model = untrained(config, seed)
    save(step_folder(locate(run), step), TrainingState(step, model.state_dict(), {}), config, taxonomy)
    size = config.evaluation
    return Segmenter(model, taxonomy, config.panoptic, short_side=size.short_side, long_side=size.long_side)
