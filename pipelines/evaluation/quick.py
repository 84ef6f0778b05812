"""The quick PQ: a fixed subset of the validation images, scored by the training workers between two steps."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import torch.distributed as dist

from maskformer import MaskFormer, PanopticQuality, Segmenter
from pipelines.config import TrainConfig
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.schema import RESIZED, require
from pipelines.data.stream import blocks, resized_images
from pipelines.evaluation.predict import score_row


def quick_pq(model: MaskFormer, config: TrainConfig, rank: int, workers: int, device: torch.device) -> dict[str, float]:
    """Return PQ over all, things and stuff as fractions, the same on all ranks; the model trains on afterwards.

    Draws nothing at random, so training continues as if it had not been called.
    """
    shown = config.evaluation
    samples = open_pack(config.data.val).subset(shown.images)
    mine = samples.take(np.arange(rank, len(samples), workers))
    segment = Segmenter(
        model, samples.taxonomy, config.panoptic, short_side=shown.short_side, long_side=shown.long_side
    )
    quality = PanopticQuality(samples.taxonomy)
    try:
        for table in _tables(mine, config):
            for row in table.to_pylist():
                quality.merge(score_row(segment, row)[2])
    finally:
        model.train()
    parts: list[Any] = [None] * workers
    dist.all_gather_object(parts, quality)
    whole = PanopticQuality(samples.taxonomy)
    for part in parts:
        whole.merge(part)
    result = whole.result()
    return {
        "quick_pq/all": result.pq,
        # nan, for no such class in the subset, is not a number that a tracking server takes.
        "quick_pq/things": float(np.nan_to_num(result.things.pq)),
        "quick_pq/stuff": float(np.nan_to_num(result.stuff.pq)),
    }


def _tables(samples: PackedSet, config: TrainConfig) -> Iterator[pa.Table]:
    if not len(samples):
        return
    shown, scaling = config.evaluation, config.scaling
    images = resized_images(
        samples,
        short_side=shown.short_side,
        long_side=shown.long_side,
        samples_per_task=config.data.samples_per_task,
        cpus=scaling.data_cpus / scaling.workers,
    )
    for block in blocks(images, scaling.data_cpus / scaling.workers):
        table = ray.get(block)
        require(table, RESIZED, "A batch of the quick evaluation")
        yield table
