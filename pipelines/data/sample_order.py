"""The order of a run's samples where it depends on their sizes after the augmentation.

A step lasts as long as its slowest worker. Two remedies, both functions of the data set and the seed alone:

- With gradient accumulation, the micro-batches of a step are dealt to the workers by size. What a step and its
  micro-batches hold stays the same.
- Inside each window of some steps, samples are exchanged between the steps so that those of a step are of about the
  same size. A window that contains the end of an epoch is handled as two, so each sample is still used once per epoch.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from pipelines.data.augment_config import AugmentConfig
from pipelines.data.order import BatchSplit, deal, group, samples_at
from pipelines.data.sizes import augmented_sizes

_CHUNK = 1 << 14
"""Images whose sizes are computed together."""


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Which samples a run uses at each position of its order, and which positions each worker computes.

    It can be sent to tasks, 24 bytes an image. A process computes the sizes of an epoch once, in about 0.5 us an image,
    and keeps those of two epochs.
    """

    image_ids: np.ndarray = field(repr=False, compare=False)
    """[N], of the images that the run uses."""
    heights: np.ndarray = field(repr=False, compare=False)
    """[N], before the augmentation."""
    widths: np.ndarray = field(repr=False, compare=False)
    """[N], before the augmentation."""
    seed: int
    """Seed of the order and of the augmentation."""
    augmentation: AugmentConfig
    split: BatchSplit
    dealt: bool = True
    """Whether the micro-batches of a step are dealt to the workers by size. Without gradient accumulation, or with a
    single worker, it makes no difference."""
    window: int = 0
    """Number of steps in which samples are grouped by area; 0: they are not."""
    _images: bytes = field(init=False, repr=False)
    """Hash of the arrays, by which orders are compared."""

    def __post_init__(self) -> None:
        arrays = (self.image_ids, self.heights, self.widths)
        content = b"".join(np.ascontiguousarray(array, np.int64).tobytes() for array in arrays)
        object.__setattr__(self, "_images", hashlib.sha256(content).digest())

    @property
    def deals(self) -> bool:
        """Whether dealing makes a difference."""
        return self.dealt and self.split.workers > 1 and self.split.accumulation > 1

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch and the index of the sample at each position, [n] int64 each."""
        if not self.window:
            return samples_at(positions, len(self.image_ids), self.seed)
        positions = np.asarray(positions, np.int64)
        count, length = len(self.image_ids), self.window * self.split.global_batch
        epochs, indices = positions // count, np.empty_like(positions)
        starts = np.maximum(epochs * count, positions // length * length)
        for start in np.unique(starts):
            here = starts == start
            end = min((start // count + 1) * count, (start // length + 1) * length)
            indices[here] = _grouped(self, int(start), int(end))[positions[here] - start]
        return epochs, indices

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """Return the heights and widths of the augmented samples at the positions, [n, 2] int64."""
        epochs, indices = self.samples(positions)
        sizes = np.empty((len(indices), 2), np.int64)
        for epoch in np.unique(epochs):
            sizes[epochs == epoch] = _sizes(self, int(epoch))[indices[epochs == epoch]]
        return sizes

    def positions(self, rank: int, first_step: int, last_step: int) -> np.ndarray:
        """Return the positions of worker `rank` in the steps [first_step, last_step), in the order it uses them."""
        split = self.split
        if not self.deals:
            return split.positions(rank, first_step, last_step)
        numbers = deal(self.costs(first_step, last_step), split.workers)[:, :, rank, None]
        steps = np.arange(first_step, last_step, dtype=np.int64)[:, None, None]
        within = np.arange(split.micro_batch, dtype=np.int64)
        return (steps * split.global_batch + numbers * split.micro_batch + within).ravel()

    def costs(self, first_step: int, last_step: int) -> np.ndarray:
        """Return the pixels of each micro-batch with its padding, [steps, micro-batches] int64."""
        split = self.split
        positions = np.arange(first_step * split.global_batch, last_step * split.global_batch, dtype=np.int64)
        sizes = self.sizes(positions).reshape(last_step - first_step, -1, split.micro_batch, 2)
        return sizes.max(axis=2).prod(axis=2) * split.micro_batch


@lru_cache(maxsize=2)
def _sizes(order: SampleOrder, epoch: int) -> np.ndarray:
    """Return the heights and widths of all samples as augmented in an epoch, [N, 2] int32."""
    sizes = np.empty((len(order.image_ids), 2), np.int32)
    for start in range(0, len(sizes), _CHUNK):
        part = slice(start, start + _CHUNK)
        image_ids, heights, widths = order.image_ids[part], order.heights[part], order.widths[part]
        sizes[part] = augmented_sizes(image_ids, heights, widths, order.seed, epoch, order.augmentation)
    return sizes


@lru_cache(maxsize=64)
def _grouped(order: SampleOrder, start: int, end: int) -> np.ndarray:
    """Return the indices of the samples at the positions [start, end), which lie in one epoch and window."""
    batch = order.split.global_batch
    epochs, indices = samples_at(np.arange(start, end), len(order.image_ids), order.seed)
    sizes = _sizes(order, int(epochs[0]))[indices].astype(np.int64)
    # The steps, the first and the last of which may lie in this epoch or window in part.
    cuts = np.unique(np.clip(np.arange(start // batch, -(-end // batch) + 1) * batch, start, end))
    parts = group(sizes.prod(axis=1), np.diff(cuts), order.seed ^ start)
    # Images of the same shape next to each other need less padding in a micro-batch.
    aspects = sizes[:, 0] / sizes[:, 1]
    return indices[np.concatenate([part[np.argsort(aspects[part], kind="stable")] for part in parts])]
