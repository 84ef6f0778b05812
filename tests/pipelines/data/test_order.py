"""The order of samples against its definition: epoch after epoch, each a permutation, cut into equal steps."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.order import BatchSplit, dropout_seed, permutation, samples_at, total_steps
from pipelines.errors import UserError


@given(st.integers(1, 50), st.integers(0, 5), st.integers(1, 4))
def test_each_sample_once_per_epoch(num_samples: int, seed: int, epochs: int) -> None:
    found_epochs, samples = samples_at(np.arange(num_samples * epochs), num_samples, seed)
    for epoch in range(epochs):
        assert sorted(samples[found_epochs == epoch]) == list(range(num_samples))


def test_each_position_is_independent_of_the_others() -> None:
    _, expected = samples_at(np.arange(100), 13, seed=3)
    for position in (0, 12, 13, 57, 99):
        epoch, sample = samples_at(np.array([position]), 13, seed=3)
        assert (epoch[0], sample[0]) == (position // 13, expected[position])


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [permutation(1000, seed, epoch) for seed in (0, 1, 2**32, 2**64 - 1) for epoch in range(3)]
    for first in range(len(orders)):
        for second in range(first):
            # Two random permutations agree in about one position.
            assert (orders[first] == orders[second]).sum() < 10


def test_order_is_not_biased() -> None:
    positions = np.stack([np.argsort(permutation(20, 0, epoch)) for epoch in range(2000)])
    # The mean position of a sample over many epochs is the middle, 9.5, within five standard errors.
    assert np.abs(positions.mean(0) - 9.5).max() < 5 * np.sqrt((20**2 - 1) / 12 / 2000)


def test_dropout_seeds_depend_on_every_bit_of_seed_and_position() -> None:
    def differing(other: int, device: str) -> int:
        return (dropout_seed(3, 1000, device) ^ other).bit_count()

    for device, bits in (("cpu", 32), ("cuda", 64)):
        of_seed = [differing(dropout_seed(3 ^ 1 << bit, 1000, device), device) for bit in range(64)]
        of_position = [differing(dropout_seed(3, 1000 ^ 1 << bit, device), device) for bit in range(63)]
        for counts in (of_seed, of_position):
            assert min(counts) > 0
            # About half of the bits change, within five standard errors.
            assert abs(np.mean(counts) - bits / 2) < 5 * np.sqrt(bits / 4 / len(counts))
        assert 0 <= dropout_seed(2**64 - 1, 2**63 - 1, device) < 2**bits


def test_dropout_differs_between_seeds_and_between_positions_on_a_cpu() -> None:
    """PyTorch's CPU generator takes the low 32 bits of a seed, which is why `dropout_seed` has no more for it."""

    def drawn(seed: int) -> bytes:
        return torch.rand(8, generator=torch.Generator().manual_seed(seed)).numpy().tobytes()

    assert drawn(5) == drawn(5 + 2**40)
    masks = {drawn(dropout_seed(seed, position)) for seed in (0, 1, 2**24, 2**40) for position in (0, 4, 2**35)}
    assert len(masks) == 12


@pytest.mark.parametrize(("workers", "accumulation"), [(1, 12), (2, 6), (3, 4), (6, 2), (12, 1)])
def test_workers_share_every_step_without_overlap(workers: int, accumulation: int) -> None:
    split = BatchSplit(global_batch=24, micro_batch=2, workers=workers)
    assert split.accumulation == accumulation
    per_rank = [split.positions(rank, 5, 8).reshape(3, -1) for rank in range(workers)]
    for step in range(3):
        taken = np.concatenate([positions[step] for positions in per_rank])
        assert sorted(taken) == list(range((5 + step) * 24, (6 + step) * 24))


def test_micro_batches_are_the_same_for_any_number_of_workers() -> None:
    def micro_batches(workers: int) -> set[tuple[int, ...]]:
        split = BatchSplit(global_batch=24, micro_batch=2, workers=workers)
        rows = np.concatenate([split.positions(rank, 0, 4).reshape(-1, 2) for rank in range(workers)])
        return set(map(tuple, rows.tolist()))

    for first, second in pairwise([1, 2, 3, 4, 6, 12]):
        assert micro_batches(first) == micro_batches(second)


def test_impossible_world_size_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"5 workers cannot give .*--scaling\.workers 4 \(possible: 1, 2, 4, 8, 16\)"):
        BatchSplit(global_batch=16, micro_batch=1, workers=5)
    with pytest.raises(UserError, match="Use a global batch of 18"):
        BatchSplit(global_batch=16, micro_batch=3, workers=1)


def test_total_steps_rounds_the_whole_run_up_once() -> None:
    assert total_steps(75, 118_287, 16) == 554_471
    assert total_steps(3, 10, 4) == 8
