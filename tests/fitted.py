"""A segmenter that was fitted to a few synthetic images in seconds, so that its predictions mean something."""

import numpy as np
import torch

from maskformer import (
    ModelConfig,
    PanopticConfig,
    Segmenter,
    Targets,
    Taxonomy,
    build_model,
    compute_losses,
)
from maskformer.config import LossConfig
from maskformer.preprocess import normalize
from pipelines.data.synthetic import CATEGORIES, Scene, SyntheticConfig, draw_scene

TAXONOMY = Taxonomy.from_coco(CATEGORIES)
SIDE = 64


def scenes(count: int, seed: int = 0) -> list[Scene]:
    config = SyntheticConfig(min_side=SIDE, max_side=SIDE, max_things=2)
    return [draw_scene(np.random.default_rng((seed, number)), config) for number in range(count)]


def fit(config: ModelConfig, images: list[Scene], steps: int) -> Segmenter:
    """Fit everything but the backbone, whose random features are computed once."""
    torch.manual_seed(0)
    model = build_model(config)
    inputs = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in images])
    with torch.no_grad():
        features = model.backbone(normalize(inputs, config.pixel_mean, config.pixel_std))
    backbone, model._modules["backbone"] = model.backbone, _Constant(features)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    targets = [_targets(scene) for scene in images]
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        compute_losses(model(inputs.float()), targets, LossConfig()).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    model.backbone = backbone
    return Segmenter(model, TAXONOMY, PanopticConfig(score_threshold=0.5), short_side=SIDE, long_side=2 * SIDE)


class _Constant(torch.nn.Module):
    def __init__(self, features: list[torch.Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.features


def _targets(scene: Scene) -> Targets:
    kept = [segment for segment in scene.segments if not segment["iscrowd"]]
    classes = [TAXONOMY.class_index(segment["category_id"]) for segment in kept]
    masks = np.stack([scene.ids == segment["id"] for segment in kept])
    return Targets(torch.tensor(classes), torch.from_numpy(masks))
