"""The order of samples: a pure function of (seed, position), independent of the number of workers and of timing.

Seeds are integers from 0 to 2**64 - 1.

The training sequence is infinite: one epoch after another, each a permutation of all N samples. Global step s
uses its positions [s*G, (s+1)*G), so a batch may span two epochs and no sample is dropped or repeated. The
positions of a step are split into micro-batches of fixed size, which are assigned to the workers in turn. The
number of workers changes which worker computes a micro-batch, never its content.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from pipelines.errors import UserError


def samples_at(positions: np.ndarray, num_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the epoch and the sample index, in 0..num_samples-1, of each position (int64 arrays)."""
    epochs, indices = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    samples = np.empty_like(indices)
    for epoch in np.unique(epochs):
        of_epoch = epochs == epoch
        samples[of_epoch] = permutation(num_samples, seed, int(epoch))[indices[of_epoch]]
    return epochs, samples


@lru_cache(maxsize=2)
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the samples in an epoch.

    The samples are sorted by a hash (splitmix64's finalizer). NumPy's generator is not used because its streams may
    change between releases, and a run must be able to resume after an upgrade.
    """
    of_run = _mix(np.array([seed], np.uint64))
    of_epoch = _mix(np.array([epoch], np.uint64) ^ of_run)
    keys = _mix(np.arange(num_samples, dtype=np.uint64) ^ of_epoch)
    return np.argsort(keys, kind="stable")


def dropout_seed(seed: int, position: int, device_type: str = "cpu") -> int:
    """Return the seed of PyTorch's generator for the micro-batch whose first sample has this position.

    It is a hash of both, 64 bits for a GPU. PyTorch's CPU generator ignores all but the low 32 bits of a seed, so a CPU
    gets 32 bits that depend on all of `seed` and `position`.
    """
    of_run = _mix(np.array([seed], np.uint64))
    mixed = int(_mix(np.array([position], np.uint64) ^ of_run)[0])
    return mixed >> 32 if device_type == "cpu" else mixed


def _mix(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers bijectively."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """How the global batch of every step is split: workers x micro-batch x accumulation."""

    global_batch: int
    micro_batch: int
    workers: int

    def __post_init__(self) -> None:
        if self.global_batch % self.micro_batch:
            raise UserError(
                f"The global batch of {self.global_batch} is not a multiple of the micro-batch of {self.micro_batch} "
                f"images. Use a global batch of {self.micro_batch * ceil(self.global_batch / self.micro_batch)}."
            )
        micro_batches = self.global_batch // self.micro_batch
        if micro_batches % self.workers:
            possible = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
            nearest = min(possible, key=lambda n: (abs(n - self.workers), n))
            raise UserError(
                f"{self.workers} workers cannot give the global batch of {self.global_batch} with {self.micro_batch} "
                f"image(s) per micro-batch: {micro_batches} micro-batches do not divide evenly among them. "
                f"Use --scaling.workers {nearest} (possible: {', '.join(map(str, possible))})."
            )

    @property
    def accumulation(self) -> int:
        """Number of micro-batches that each worker computes per step."""
        return self.global_batch // (self.micro_batch * self.workers)

    def positions(self, rank: int, first_step: int, last_step: int) -> np.ndarray:
        """Return the positions of worker `rank` in the steps [first_step, last_step), in the order it uses them.

        Its a-th micro-batch of a step is the step's micro-batch number a * workers + rank.
        """
        steps = np.arange(first_step, last_step, dtype=np.int64)[:, None, None]
        turns = np.arange(self.accumulation, dtype=np.int64)[None, :, None]
        within = np.arange(self.micro_batch, dtype=np.int64)[None, None, :]
        return (steps * self.global_batch + (turns * self.workers + rank) * self.micro_batch + within).ravel()

    def __str__(self) -> str:
        return f"{self.global_batch} = {self.workers} workers x {self.micro_batch} images x {self.accumulation}"


def deal(costs: np.ndarray, workers: int) -> np.ndarray:
    """Deal the micro-batches of each step to the workers, so that their sums of costs are about equal.

    The W largest go to one worker each; of the next W, the largest goes to the worker with the smallest sum so far, and
    so on. Ties are broken by the number of the micro-batch, then by the rank.

    Args:
        costs: [S, M] of the M micro-batches of S steps.

    Returns:
        [S, A, W] the numbers of the micro-batches, A for each worker, its largest last: in that turn all workers have
        large ones, behind whose backward passes most of the exchange of gradients fits.
    """
    turns = np.argsort(-costs, axis=1, kind="stable").reshape(len(costs), -1, workers)
    sums = np.zeros((len(costs), workers), costs.dtype)
    dealt = np.empty_like(turns)
    for turn in range(turns.shape[1]):
        ranks = np.argsort(sums, axis=1, kind="stable")
        np.put_along_axis(dealt[:, turn], ranks, turns[:, turn], axis=1)
        sums += np.take_along_axis(costs, dealt[:, turn], axis=1)
    return dealt[:, ::-1]


def group(areas: np.ndarray, slots: np.ndarray, key: int) -> list[np.ndarray]:
    """Divide samples among the steps of a window, so that those of a step have about the same area.

    Samples in ascending order of their areas (ties in the order given) are cut into the steps, which take their part in
    an order that is shuffled by a hash.

    Args:
        areas: [n].
        slots: [S] number of samples of each step; n in total.
        key: of the hash.

    Returns:
        For each step the indices of its samples, in ascending order of area.
    """
    keys = _mix(np.arange(len(slots), dtype=np.uint64) ^ _mix(np.array([key], np.uint64)))
    shuffled = np.argsort(keys, kind="stable")
    parts = np.split(np.argsort(areas, kind="stable"), np.cumsum(slots[shuffled])[:-1])
    return [parts[place] for place in np.argsort(shuffled)]


def total_steps(epochs: float, num_samples: int, global_batch: int) -> int:
    """Return the number of steps that use each sample `epochs` times; the last step may extend into the next epoch."""
    return ceil(epochs * num_samples / global_batch)
