"""Quick PQ: the PQ of a fixed subset of the validation images, computed by the training workers between two steps."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch.distributed as dist

from maskformer import MaskFormer, PanopticQuality, Segmenter
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import PackedSet
from pipelines.data.schema import RESIZED, require
from pipelines.data.stream import blocks, resized_images
from pipelines.evaluation.predict import score_row


def quick_pq(model: MaskFormer, config: TrainConfig, samples: PackedSet, rank: int, workers: int) -> dict[str, float]:
    """Return the PQ of all classes, of things and of stuff, in fractions 0..1, the same on all ranks.

    It draws no random numbers and returns the model in training mode, so training continues as if it had not been
    called. All ranks must call it.

    Args:
        samples: the validation images; `config.evaluation.images` of them are evaluated.
        rank: rank of this worker.
        workers: number of workers.
    """
    size = config.evaluation
    samples = samples.subset(size.images)
    mine = samples.take(np.arange(rank, len(samples), workers))
    segment = Segmenter(model, samples.taxonomy, config.panoptic, short_side=size.short_side, long_side=size.long_side)
    quality = PanopticQuality(samples.taxonomy)
    try:
        for table in _tables(mine, config):
            for row in table.to_pylist():
                quality.merge(score_row(segment, row)[2])
    finally:
        model.train()
    parts: list[Any] = [None] * workers
    dist.all_gather_object(parts, quality)
    total = PanopticQuality(samples.taxonomy)
    for part in parts:
        total.merge(part)
    result = total.result()
    return {
        "quick_pq/all": result.pq,
        # PQ is nan if the subset has no such class, and tracking servers reject nan.
        "quick_pq/things": float(np.nan_to_num(result.things.pq)),
        "quick_pq/stuff": float(np.nan_to_num(result.stuff.pq)),
    }


def _tables(samples: PackedSet, config: TrainConfig) -> Iterator[pa.Table]:
    if not len(samples):
        return
    size, scaling = config.evaluation, config.scaling
    images = resized_images(
        samples,
        short_side=size.short_side,
        long_side=size.long_side,
        samples_per_task=config.data.samples_per_task,
        cpus=scaling.data_cpus / scaling.workers,
    )
    for block in blocks(images, scaling.data_cpus / scaling.workers):
        table = ray.get(block)
        require(table, RESIZED, "A batch of the quick evaluation")
        yield table
