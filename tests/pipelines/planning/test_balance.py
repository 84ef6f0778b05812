"""The pixels of a step against a slow definition, and the figures that the order is meant to reach."""

import numpy as np
import pytest

from pipelines.data.augment_config import AugmentConfig
from pipelines.data.order import BatchSplit
from pipelines.planning.balance import SIZES, coco_order, coco_sizes, step_pixels

CONFIG = AugmentConfig()


def split_of(workers: int, accumulation: int, micro_batch: int = 1) -> BatchSplit:
    return BatchSplit(global_batch=workers * accumulation * micro_batch, micro_batch=micro_batch, workers=workers)


@pytest.mark.parametrize("dealt", [False, True])
@pytest.mark.parametrize("window", [0, 8])
def test_pixels_are_those_of_the_slowest_worker(dealt: bool, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.planning.balance.STEPS", 24)
    split = split_of(4, 2, 2)
    order = coco_order(split, CONFIG, dealt=dealt, window=window)
    most: list[float] = []
    areas: list[int] = []
    for step in range(24):
        of_workers: list[int] = []
        for rank in range(4):
            sizes = order.sizes(order.positions(rank, step, step + 1)).tolist()
            padded = [max(one[0], other[0]) * max(one[1], other[1]) for one, other in (sizes[:2], sizes[2:])]
            of_workers.append(2 * sum(padded))
            areas += [height * width for height, width in sizes]
        most.append(max(of_workers) / 4)
    found = step_pixels.__wrapped__(split, CONFIG, dealt=dealt, window=window)
    assert found == pytest.approx((np.mean(areas), np.mean(most)))


@pytest.mark.parametrize("workers", [16, 64])
@pytest.mark.parametrize(("accumulation", "window", "limit"), [(1, 8, 1.1), (1, 16, 1.05), (4, 0, 1.03), (2, 0, 1.15)])
def test_workers_wait_less_for_the_slowest(workers: int, accumulation: int, window: int, limit: float) -> None:
    split = split_of(workers, accumulation)
    now, after = (
        step_pixels(split, CONFIG, dealt=dealt, window=steps) for dealt, steps in ((False, 0), (True, window))
    )
    assert now.largest / now.mean > 1.3
    assert after.largest / after.mean < limit
    assert after.mean == pytest.approx(now.mean)


def test_sizes_have_the_stated_shares() -> None:
    heights, widths = coco_sizes(20_000)
    for (height, width), share in SIZES:
        found = ((heights == height) & (widths == width)).mean()
        assert found == pytest.approx(share, abs=0.02)
    assert heights.min() >= 300
    assert widths.min() >= 300
    assert np.maximum(heights, widths).max() == 640
