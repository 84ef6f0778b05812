"""How evenly the workers share the pixels of a step, with images of sizes like COCO's.

A step lasts as long as the worker with the most pixels takes.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipelines.config.recipes import COCO_TRAIN_IMAGES
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.order import BatchSplit, deal
from pipelines.data.sample_order import SampleOrder

SIZES = (
    ((480, 640), 0.28),
    ((427, 640), 0.22),
    ((640, 480), 0.10),
    ((426, 640), 0.08),
    ((640, 427), 0.06),
    ((375, 500), 0.05),
    ((640, 640), 0.03),
    ((360, 640), 0.02),
    ((500, 375), 0.02),
    ((333, 500), 0.02),
)
"""Heights, widths and shares of common images: an assumption in round numbers. The others have a long side of 640 and a
short side of 300 to 640."""


STEPS = 1024
"""Steps to average over, less in a shorter epoch: a multiple of the usual windows."""


class Pixels(NamedTuple):
    """Pixels per image in training."""

    mean: float
    """Mean over all images, without padding."""
    largest: float
    """Those of the worker that has the most in a step, with padding; mean over the steps."""


def coco_sizes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw heights and widths like those of COCO's images, [N] each."""
    rng = np.random.default_rng(seed)
    shares = [share for _, share in SIZES]
    kinds = rng.choice(len(SIZES) + 1, count, p=[*shares, 1 - sum(shares)])
    others = np.stack([rng.integers(300, 640, count, endpoint=True), np.full(count, 640)], axis=1)
    others = np.where(rng.random((count, 1)) < 0.25, others[:, ::-1], others)
    common = np.array([*(size for size, _ in SIZES), (0, 0)])[kinds]
    sizes = np.where(kinds[:, None] < len(SIZES), common, others)
    return sizes[:, 0], sizes[:, 1]


def coco_order(split: BatchSplit, augmentation: AugmentConfig, *, dealt: bool, window: int) -> SampleOrder:
    """Return the order of a data set of the size of COCO, with images of similar sizes."""
    heights, widths = coco_sizes(COCO_TRAIN_IMAGES)
    return SampleOrder(
        image_ids=np.arange(COCO_TRAIN_IMAGES),
        heights=heights,
        widths=widths,
        seed=0,
        augmentation=augmentation,
        split=split,
        dealt=dealt,
        window=window,
    )


@lru_cache
def step_pixels(split: BatchSplit, augmentation: AugmentConfig, *, dealt: bool, window: int) -> Pixels:
    """Return the pixels of an image and of a step in the first steps of a training on a data set like COCO.

    Args:
        dealt: whether micro-batches are dealt to the workers by size.
        window: steps in which samples are grouped by area; 0: they are not.
    """
    order = coco_order(split, augmentation, dealt=dealt, window=window)
    steps = min(STEPS, COCO_TRAIN_IMAGES // split.global_batch)
    costs = order.costs(0, steps)
    if order.deals:
        costs = np.take_along_axis(costs, deal(costs, split.workers).reshape(steps, -1), axis=1)
    most = costs.reshape(steps, split.accumulation, split.workers).sum(axis=1).max(axis=1)
    mean = order.sizes(np.arange(steps * split.global_batch)).prod(axis=1).mean()
    return Pixels(float(mean), float(most.mean() / (split.accumulation * split.micro_batch)))
