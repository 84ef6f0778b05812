"""Quick PQ: the PQ of a fixed subset of the validation images, computed by the training workers between two steps."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist
from ray.exceptions import RayError

from maskformer import MaskFormer, PanopticQuality, Segmenter
from pipelines.config.train import TrainConfig
from pipelines.data.execution import original_errors
from pipelines.data.manifest import PackedSet
from pipelines.data.schema import RESIZED, require
from pipelines.data.stream import resized_images
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.evaluation.score import score_row

logger = logging.getLogger(__name__)


def quick_pq(
    network: MaskFormer, config: TrainConfig, samples: PackedSet, rank: int, workers: int
) -> dict[str, float] | None:
    """Return the PQ of all classes, of things and of stuff, in fractions 0..1, the same on all ranks.

    It draws no random numbers and returns the network in training mode, so training continues as if it had not been
    called. All ranks must call it.

    Args:
        network: the network without DDP.
        samples: the validation images; `config.evaluation.images` of them are evaluated.
        rank: rank of this worker.
        workers: number of workers.

    Returns:
        The metrics, or None if any rank could not read its images; rank 0 logs a warning that says why.
    """
    size = config.evaluation
    samples = samples.subset(size.images)
    mine = samples.take(np.arange(rank, len(samples), workers))
    segment = Segmenter(
        network, samples.taxonomy, config.panoptic, short_side=size.short_side, long_side=size.long_side
    )
    part: PanopticQuality | str
    quality = part = PanopticQuality(samples.taxonomy)
    try:
        for table in _tables(mine, config, rank, workers):
            for row in table.to_pylist():
                quality.merge(score_row(segment, row))
    except (UserError, StorageUnavailableError, RayError) as error:
        part = f"worker {rank}: {' '.join(str(error).split())[:500]}"  # the others wait for this rank
    finally:
        network.train()
    parts: list[Any] = [None] * workers
    dist.all_gather_object(parts, part)
    failures = [other for other in parts if isinstance(other, str)]
    if failures:
        if rank == 0:
            logger.warning("The quick PQ is left out, training goes on. %s", failures[0])
        return None
    total = PanopticQuality(samples.taxonomy)
    for other in parts:
        total.merge(other)
    result = total.result()
    return {
        "quick_pq/all": result.pq,
        # PQ is nan if the subset has no such class, and tracking servers reject nan.
        "quick_pq/things": float(np.nan_to_num(result.things.pq)),
        "quick_pq/stuff": float(np.nan_to_num(result.stuff.pq)),
    }


def _tables(samples: PackedSet, config: TrainConfig, rank: int, workers: int) -> Iterator[pa.Table]:
    if not len(samples):
        return
    size, cpus = config.evaluation, config.scaling.data_cpus / workers
    images = resized_images(
        samples,
        short_side=size.short_side,
        long_side=size.long_side,
        samples_per_task=config.data.samples_per_task,
        cpus=cpus,
        object_store=int(config.data.object_store_gb * 1e9),
        patience=config.scaling.storage_patience,
        name=f"quick-pq-{rank}",
    )
    with original_errors():
        for table in images.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            require(table, RESIZED, "A batch of the quick evaluation")
            yield table
