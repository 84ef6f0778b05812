"""Orders by size against their definitions: nothing lost or repeated, the same from any start, sizes as augmented."""

import pickle
from itertools import chain, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.augment import augmented_size, sample_rng
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.order import BatchSplit, deal, group, samples_at
from pipelines.data.sample_order import SampleOrder

CONFIG = AugmentConfig()


def order_of(num_samples: int, split: BatchSplit, seed: int = 0, window: int = 0, dealt: bool = True) -> SampleOrder:
    rng = np.random.default_rng(num_samples)
    heights, widths = rng.integers(300, 640, (2, num_samples))
    return SampleOrder(
        image_ids=rng.permutation(1000 * num_samples)[:num_samples],
        heights=heights,
        widths=widths,
        seed=seed,
        augmentation=CONFIG,
        split=split,
        window=window,
        dealt=dealt,
    )


def split_of(global_batch: int, workers: int = 1, micro_batch: int = 1) -> BatchSplit:
    return BatchSplit(global_batch=global_batch, micro_batch=micro_batch, workers=workers)


ORDERS = st.builds(
    lambda num_samples, batch, seed, window: order_of(num_samples, split_of(batch), seed, window),
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(0, 2**64 - 1),
    st.integers(0, 7),
)


@settings(deadline=None, max_examples=40)
@given(ORDERS)
def test_each_sample_once_per_epoch(order: SampleOrder) -> None:
    count = len(order.image_ids)
    epochs, samples = order.samples(np.arange(3 * count))
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(count)]
    for epoch in range(3):
        assert sorted(samples[epochs == epoch]) == list(range(count))


@settings(deadline=None, max_examples=40)
@given(ORDERS, st.data())
def test_starting_anywhere_continues_the_same_order(order: SampleOrder, data: st.DataObject) -> None:
    total = 4 * len(order.image_ids) + 3
    expected = order.samples(np.arange(total))
    start = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(start + 1, total))
    for found, whole in zip(order.samples(np.arange(start, end)), expected, strict=True):
        np.testing.assert_array_equal(found, whole[start:end])


@settings(deadline=None, max_examples=40)
@given(ORDERS)
def test_samples_stay_in_their_window_and_epoch(order: SampleOrder) -> None:
    """Within each, the steps' parts are an order of consecutive pieces of the samples sorted by area."""
    count, batch = len(order.image_ids), order.split.global_batch
    positions = np.arange(3 * count)
    epochs, plain = samples_at(positions, count, order.seed)
    _, samples = order.samples(positions)
    if not order.window:
        np.testing.assert_array_equal(samples, plain)
        return
    areas = order.sizes(positions).prod(axis=1)
    windows = positions // (order.window * batch)
    for place in set(zip(epochs.tolist(), windows.tolist(), strict=True)):
        here = (epochs == place[0]) & (windows == place[1])
        assert sorted(samples[here]) == sorted(plain[here])
        steps = [areas[here & (positions // batch == step)] for step in set((positions[here] // batch).tolist())]
        steps.sort(key=lambda step: (step.min(), step.max()))
        for one, other in pairwise(steps):
            assert one.max() <= other.min()


def test_grouped_steps_come_in_no_order_of_size() -> None:
    order = order_of(5000, split_of(10), window=50)
    areas = order.sizes(np.arange(5000)).prod(axis=1).reshape(10, 50, 10).mean(axis=2)
    ranks = areas.argsort(axis=1).argsort(axis=1)
    assert len({tuple(window) for window in ranks.tolist()}) == 10
    # The mean of 10 random ranks of 50 is 24.5, within five standard errors.
    assert np.abs(ranks.mean(axis=0) - 24.5).max() < 5 * np.sqrt((50**2 - 1) / 12 / 10)


@pytest.mark.parametrize("window", [0, 3])
def test_sizes_are_those_of_the_augmentation(window: int) -> None:
    order = order_of(40, split_of(6), seed=9, window=window)
    positions = np.array([0, 1, 38, 39, 40, 100, 79, 80])
    epochs, samples = order.samples(positions)
    expected = [
        augmented_size(
            int(order.heights[sample]),
            int(order.widths[sample]),
            sample_rng(9, int(epoch), int(order.image_ids[sample])),
            CONFIG,
        )
        for epoch, sample in zip(epochs, samples, strict=True)
    ]
    assert order.sizes(positions).tolist() == [list(size) for size in expected]


@pytest.mark.parametrize(("workers", "micro_batch", "window"), [*product([1, 2, 3, 6, 12], [1, 2], [0, 2])])
def test_every_worker_computes_its_share_of_the_same_micro_batches(workers: int, micro_batch: int, window: int) -> None:
    split = split_of(12 * micro_batch, workers, micro_batch)
    order = order_of(50, split, window=window)
    per_rank = np.stack([order.positions(rank, 4, 9).reshape(5, -1, micro_batch) for rank in range(workers)])
    assert per_rank.shape == (workers, 5, split.accumulation, micro_batch)
    for step in range(5):
        taken = sorted(per_rank[:, step].reshape(-1, micro_batch).tolist())
        start = (4 + step) * split.global_batch
        assert np.concatenate(taken).tolist() == list(range(start, start + split.global_batch))
        assert [row[0] % micro_batch for row in taken] == [start % micro_batch] * 12
        for rank in range(workers):
            np.testing.assert_array_equal(
                order.positions(rank, 4 + step, 5 + step), per_rank[rank, step].ravel(), "one step alone"
            )


@pytest.mark.parametrize(("workers", "dealt"), [(1, True), (12, True), (3, False)])
def test_without_a_choice_the_workers_take_turns(workers: int, dealt: bool) -> None:
    split = split_of(12, workers)
    order = order_of(50, split, dealt=dealt)
    for rank in range(workers):
        np.testing.assert_array_equal(order.positions(rank, 2, 9), split.positions(rank, 2, 9))


def test_the_cost_of_a_micro_batch_includes_its_padding() -> None:
    order = order_of(50, split_of(12, micro_batch=3))
    sizes = order.sizes(np.arange(24)).reshape(2, 4, 3, 2).tolist()
    for step, number in product(range(2), range(4)):
        heights, widths = zip(*sizes[step][number], strict=True)
        assert order.costs(0, 2)[step, number] == 3 * max(heights) * max(widths)


def test_micro_batches_of_alike_shapes() -> None:
    """Grouping reduces padding, not only the differences between workers."""
    split = split_of(16, micro_batch=2)
    plain, grouped = (order_of(1600, split, window=window) for window in (0, 20))
    assert grouped.costs(0, 100).sum() < 0.9 * plain.costs(0, 100).sum()


def test_an_order_can_be_sent_to_another_process() -> None:
    order = order_of(50, split_of(6, workers=2), window=3)
    other = pickle.loads(pickle.dumps(order))
    assert other == order
    assert hash(other) == hash(order)
    assert order_of(51, split_of(6, workers=2), window=3) != order
    np.testing.assert_array_equal(other.positions(1, 0, 9), order.positions(1, 0, 9))


COSTS = st.integers(1, 6).flatmap(
    lambda workers: st.tuples(
        st.just(workers),
        st.integers(1, 4).flatmap(
            lambda turns: st.lists(
                st.lists(st.integers(1, 30), min_size=turns * workers, max_size=turns * workers), min_size=1, max_size=3
            )
        ),
    )
)


@given(COSTS)
def test_dealing_by_its_definition(drawn: tuple[int, list[list[int]]]) -> None:
    workers, costs = drawn
    dealt = deal(np.array(costs), workers)
    for step, of_step in enumerate(costs):
        sorted_numbers = sorted(range(len(of_step)), key=lambda number: (-of_step[number], number))
        hands: list[list[int]] = [[] for _ in range(workers)]
        for start in range(0, len(of_step), workers):
            waiting = sorted(range(workers), key=lambda rank: (sum(of_step[n] for n in hands[rank]), rank))
            for rank, number in zip(waiting, sorted_numbers[start : start + workers], strict=True):
                hands[rank].insert(0, number)
        assert dealt[step].T.tolist() == hands


@pytest.mark.parametrize("accumulation", [2, 3, 4, 8])
def test_dealing_shortens_the_step(accumulation: int) -> None:
    costs = np.random.default_rng(0).integers(1, 4, (200, 8 * accumulation)) * 100_000
    now = costs.reshape(200, accumulation, 8).sum(axis=1).max(axis=1)
    dealt = np.take_along_axis(costs, deal(costs, 8).reshape(200, -1), axis=1)
    after = dealt.reshape(200, accumulation, 8).sum(axis=1).max(axis=1)
    assert (after <= now).mean() > 0.99
    assert after.mean() < 0.9 * now.mean()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**64 - 1), st.data())
def test_groups_are_pieces_of_the_sorted_samples(slots: list[int], key: int, data: st.DataObject) -> None:
    areas = data.draw(st.lists(st.integers(1, 20), min_size=sum(slots), max_size=sum(slots)))
    parts: list[list[int]] = [part.tolist() for part in group(np.array(areas), np.array(slots), key)]
    assert [len(part) for part in parts] == slots
    ordered = sorted(range(len(areas)), key=lambda sample: (areas[sample], sample))
    parts.sort(key=lambda part: ordered.index(part[0]))
    assert list(chain.from_iterable(parts)) == ordered
