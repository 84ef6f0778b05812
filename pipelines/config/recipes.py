"""Recipes: complete configurations of published trainings, each with the PQ that it should reproduce.

The command line adds data and storage, and may override any setting.
"""

from dataclasses import replace

from maskformer.config import DEMO as DEMO_MODEL
from maskformer.config import (
    R50,
    R101,
    SWIN_B,
    SWIN_L,
    SWIN_S,
    SWIN_T,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PanopticConfig,
    ScheduleConfig,
)  # fmt: skip
from pipelines.config.train import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    RunConfig,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
)
from pipelines.data.augment_config import AugmentConfig

__all__ = [
    "COCO_TRAIN_IMAGES",
    "DEMO",
    "PUBLISHED",
    "R50_MMDET",
    "R50_ORIGINAL",
    "R101_ORIGINAL",
    "RECIPES",
    "SWIN_B_ORIGINAL",
    "SWIN_L_MMDET",
    "SWIN_L_ORIGINAL",
    "SWIN_S_ORIGINAL",
    "SWIN_T_ORIGINAL",
]

COCO_TRAIN_IMAGES = 118_287
"""Images of COCO train2017."""

# ---- mmdetection 2.25

R50_MMDET = TrainConfig(
    recipe="r50_mmdet",
    precision="float32",  # as published; bfloat16 is faster: --precision bfloat16
    model=R50,
    loss=LossConfig(),
    panoptic=PanopticConfig(),
    data=DataConfig(require_thing=True, augment=AugmentConfig()),
    optimizer=OptimizerConfig(lr=1e-4, backbone_lr_multiplier=0.1, weight_decay=1e-4, clip_norm=0.01),
    schedule=ScheduleConfig(kind="step", milestone_epochs=(50.0,)),
    run=RunConfig(epochs=75, global_batch=16, micro_batch=1),
    scaling=ScalingConfig(workers=16, device="cuda", cpus_per_worker=2, data_cpus=64),
)
"""MaskFormer R50, 16 GPUs x 1 image."""

SWIN_L_MMDET = replace(
    R50_MMDET,
    recipe="swin_l_mmdet",
    model=SWIN_L,
    # The Swin configuration merges its optimizer rules into those of the R50: the backbone keeps a tenth of the
    # learning rate, and since its rule is tried before the one for norms, the backbone's norms have weight decay.
    optimizer=OptimizerConfig(
        lr=6e-5, backbone_lr_multiplier=0.1, weight_decay=0.01, backbone_norm_weight_decay=0.01, clip_norm=0.01
    ),
    schedule=ScheduleConfig(kind="step", milestone_epochs=(250.0,), warmup_steps=1500, warmup_start_factor=1e-6),
    run=RunConfig(epochs=300, global_batch=64, micro_batch=1),
    scaling=ScalingConfig(workers=64, device="cuda", cpus_per_worker=2, data_cpus=256),
)
"""MaskFormer Swin-L, 64 GPUs x 1 image."""

# ---- the original code, on detectron2: 64 images per step, length in steps


def _original(model: ModelConfig) -> ModelConfig:
    return replace(model, decoder_feedforward_dropout=0.1, initialization="original")


R50_ORIGINAL = replace(
    R50_MMDET,
    recipe="r50_original",
    model=_original(R50),
    data=DataConfig(
        require_thing=False,
        augment=AugmentConfig(crop_long_side=None, interpolation="bilinear-antialias", keep_empty=True),
    ),
    schedule=ScheduleConfig(kind="step", milestone_epochs=(369_600 * 64 / COCO_TRAIN_IMAGES,)),
    run=RunConfig(steps=554_400, global_batch=64, micro_batch=1),
    scaling=SWIN_L_MMDET.scaling,
)
"""MaskFormer R50. The learning rate drops at step 369,600."""

R101_ORIGINAL = replace(R50_ORIGINAL, recipe="r101_original", model=_original(R101))

SWIN_T_ORIGINAL = replace(
    R50_ORIGINAL,
    recipe="swin_t_original",
    model=_original(SWIN_T),
    optimizer=OptimizerConfig(lr=6e-5, backbone_lr_multiplier=1.0, weight_decay=0.01, clip_norm=0.01),
    schedule=replace(R50_ORIGINAL.schedule, warmup_steps=1500, warmup_start_factor=1e-6),
)

SWIN_S_ORIGINAL = replace(SWIN_T_ORIGINAL, recipe="swin_s_original", model=_original(SWIN_S))

SWIN_B_ORIGINAL = replace(SWIN_T_ORIGINAL, recipe="swin_b_original", model=_original(SWIN_B))

SWIN_L_ORIGINAL = replace(
    SWIN_T_ORIGINAL,
    recipe="swin_l_original",
    model=_original(SWIN_L),
    data=replace(R50_ORIGINAL.data, augment=replace(R50_ORIGINAL.data.augment, long_side=1000)),
)
"""MaskFormer Swin-L. The long side of training images is at most 1000 pixels."""

PUBLISHED = {
    "r50_mmdet": "PQ 46.9 (46.854; things 51.1, stuff 40.5), mmdetection 2.25, maskformer_r50_mstrain_16x1_75e_coco",
    "swin_l_mmdet": (
        "PQ 53.2 (53.249; things 58.8, stuff 44.9), mmdetection 2.25, maskformer_swin-l-p4-w12_mstrain_64x1_300e_coco"
    ),
    "r50_original": "PQ 46.5, arXiv:2107.06278, Table 3, R50 + 6 Enc",
    "r101_original": "PQ 47.6, arXiv:2107.06278, Table 3, R101 + 6 Enc",
    "swin_t_original": "PQ 47.7, arXiv:2107.06278, Table 3",
    "swin_s_original": "PQ 49.7, arXiv:2107.06278, Table 3",
    "swin_b_original": "PQ 51.8, arXiv:2107.06278, Table 3, pretrained on ImageNet-22k",
    "swin_l_original": "PQ 52.7, arXiv:2107.06278, Table 3, pretrained on ImageNet-22k",
}
"""PQ on COCO val2017 that each recipe should reproduce, with its source. No recipe has been trained here, for lack of
GPUs."""

# ---- demo

DEMO = TrainConfig(
    recipe="demo",
    weights="none",
    model=DEMO_MODEL,
    loss=LossConfig(classification_weight=4.0, focal_weight=10.0, dice_weight=2.0),
    panoptic=PanopticConfig(score_threshold=0.5),
    data=DataConfig(
        require_thing=False,
        augment=AugmentConfig(short_sides=(52, 56, 60), long_side=96, crop_probability=0.0),
        samples_per_task=64,
    ),
    # At 2e-3, one of two runs collapsed half-way.
    optimizer=OptimizerConfig(lr=1.5e-3, backbone_lr_multiplier=1.0, weight_decay=0.01, clip_norm=1.0),
    schedule=ScheduleConfig(kind="cosine", warmup_steps=100, warmup_start_factor=0.01),
    run=RunConfig(name="demo", steps=1700, global_batch=8, micro_batch=4),
    scaling=ScalingConfig(workers=2, device="cpu", cpus_per_worker=0.5, data_cpus=1),
    checkpoint=CheckpointConfig(every=250),
    evaluation=EvaluationConfig(short_side=56, long_side=96, every=250, images=48),
    tracking=TrackingConfig(experiment="maskformer-demo"),
)
"""1.4 million parameters, trained on synthetic images in minutes on two CPU cores."""

RECIPES = {
    recipe.recipe: recipe
    for recipe in (
        R50_MMDET, SWIN_L_MMDET, R50_ORIGINAL, R101_ORIGINAL, SWIN_T_ORIGINAL, SWIN_S_ORIGINAL, SWIN_B_ORIGINAL,
        SWIN_L_ORIGINAL, DEMO,
    )
}  # fmt: skip
"""All recipes by name."""
