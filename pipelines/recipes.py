"""Recipes: complete configurations, each with the numbers it should reproduce.

A recipe is the truth about a published training; the command line says where and overrides what one wants to try.
"""

from maskformer.config import DEMO as DEMO_MODEL
from maskformer.config import R50, LossConfig, PanopticConfig
from maskformer.optim import OptimizerConfig, ScheduleConfig
from pipelines.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    RunConfig,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
)
from pipelines.data.augment import AugmentConfig

R50_MMDET = TrainConfig(
    recipe="r50_mmdet",
    model=R50,
    loss=LossConfig(),
    panoptic=PanopticConfig(),
    data=DataConfig(require_thing=True, augment=AugmentConfig()),
    optimizer=OptimizerConfig(lr=1e-4, backbone_lr_multiplier=0.1, weight_decay=1e-4, clip_norm=0.01),
    schedule=ScheduleConfig(kind="step", milestone_epochs=(50.0,)),
    run=RunConfig(epochs=75, global_batch=16, micro_batch=1),
    scaling=ScalingConfig(workers=16, device="cuda", cpus_per_worker=2, data_cpus=64),
)
"""MaskFormer R50 as mmdetection 2.25 trained it: COCO panoptic, 16 GPUs x 1 image, 75 epochs.

Published: PQ 46.9 (things 51.1, stuff 40.5). Not yet reproduced here: it needs GPUs.
"""

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
    optimizer=OptimizerConfig(lr=2e-3, backbone_lr_multiplier=1.0, weight_decay=0.01, clip_norm=1.0),
    schedule=ScheduleConfig(kind="cosine", warmup_steps=100, warmup_start_factor=0.01),
    run=RunConfig(name="demo", steps=1500, global_batch=8, micro_batch=4),
    scaling=ScalingConfig(workers=2, device="cpu", cpus_per_worker=0.5, data_cpus=1),
    checkpoint=CheckpointConfig(every=250),
    evaluation=EvaluationConfig(short_side=56, long_side=96, every=250, images=48),
    tracking=TrackingConfig(experiment="maskformer-demo"),
)
"""1.4 million parameters on drawn pictures: the whole way in minutes on two CPU cores."""
