"""Simulate how long the workers wait for the one with the most pixels, with images of sizes like COCO's.

python jobs/bench/order.py

A figure is the pixels of the worker with the most in a step, mean over the steps, divided by the mean of all workers.
Training takes that much longer than with equal images, if time is proportional to the number of pixels.
"""

import time
from dataclasses import dataclass, field

from jobs.shared.cli import parse, run
from pipelines.data.augment_config import AugmentConfig


@dataclass(frozen=True, kw_only=True)
class Order:
    """Simulate how long the workers wait for the one with the most pixels."""

    workers: tuple[int, ...] = (16, 64)
    """Numbers of workers."""
    accumulation: tuple[int, ...] = (1, 2, 4)
    """Micro-batches of each worker in a step."""
    windows: tuple[int, ...] = (0, 8, 16, 32, 64)
    """Steps in which samples are grouped by area; 0: they are not."""
    micro_batch: int = 1
    """Images of a micro-batch. Its pixels include the padding."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    task: int = 64
    """Images of a Ray Data task, to time how long it takes to find them."""


def main() -> None:
    flags = parse(Order, Order(), __doc__)

    import numpy as np

    from pipelines.config.recipes import COCO_TRAIN_IMAGES
    from pipelines.data.order import BatchSplit
    from pipelines.planning.balance import coco_order, step_pixels  # imports torch, which --help should not

    titles = [f"window {window}" if window else "no window" for window in flags.windows]
    print(f"{'workers':>7}{'accumulation':>14}  {'micro-batches':<14}" + "".join(f"{title:>12}" for title in titles))
    for workers in flags.workers:
        for accumulation in flags.accumulation:
            batch = workers * accumulation * flags.micro_batch
            split = BatchSplit(global_batch=batch, micro_batch=flags.micro_batch, workers=workers)
            for dealt in (False, True)[: 1 if accumulation == 1 else 2]:
                found = [step_pixels(split, flags.augment, dealt=dealt, window=window) for window in flags.windows]
                cells = "".join(f"{pixels.largest / pixels.mean:>12.3f}" for pixels in found)
                print(f"{workers:>7}{accumulation:>14}  {'dealt by size' if dealt else 'in turn':<14}{cells}")

    print(f"\nCPU us per image to find the {flags.task} images of a task, whose windows no other task has used")
    for workers in flags.workers:
        for accumulation in flags.accumulation:
            batch = workers * accumulation * flags.micro_batch
            split = BatchSplit(global_batch=batch, micro_batch=flags.micro_batch, workers=workers)
            steps = max(1, flags.task // (accumulation * flags.micro_batch))
            row = f"{workers:>7}{accumulation:>14}  {'dealt by size' if accumulation > 1 else '':<14}"
            for window in flags.windows:
                order = coco_order(split, flags.augment, dealt=True, window=window)
                order.sizes(np.arange(1))  # of the whole epoch
                count, start = 0, time.process_time()
                for task in range(1, max(2, min(6, COCO_TRAIN_IMAGES // batch // steps))):
                    _, indices = order.samples(order.positions(0, task * steps, (task + 1) * steps))
                    count += len(indices)
                row += f"{1e6 * (time.process_time() - start) / count:>12.1f}"
            print(row)
    order = coco_order(BatchSplit(global_batch=1, micro_batch=1, workers=1), flags.augment, dealt=True, window=0)
    start = time.process_time()
    order.sizes(np.arange(1) + COCO_TRAIN_IMAGES)
    seconds = time.process_time() - start
    print(f"and {1e3 * seconds:.0f} ms per process and epoch for its order and the sizes of its images")


if __name__ == "__main__":
    run(main)
