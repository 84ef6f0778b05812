"""The sum of gradients against the tree written out, and whole trainings on other numbers of workers by their bits.

The parts with several workers run in real processes with gloo. They are started once, and the first W of them form a
process group of their own for each scenario.
"""

import hashlib
import math
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from pipelines.data.order import BatchSplit, dropout_seed
from pipelines.training.reduction import (
    ExactReduction,
    FastReduction,
    broadcast_module,
    broadcast_state,
    gather_losses,
)

pytestmark = pytest.mark.timeout(180)

CPU = torch.device("cpu")
STEPS = 10
MOST_WORKERS = 8


class Output(NamedTuple):
    class_logits: Tensor
    mask_logits: Tensor


class Network(nn.Module):
    """A small network with dropout and frozen weights, with the inputs and outputs that DDP's preparation needs."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.skips = skips
        self.convolution = nn.Conv2d(3, 5, 3)
        self.frozen = nn.Linear(5, 16).requires_grad_(False)
        self.dropout = nn.Dropout(0.2)
        self.classes = nn.Linear(16, 7)
        self.masks = nn.Linear(16, 11)
        self.rare = nn.Linear(16, 7, bias=False)

    def forward(self, images: Tensor, padding: Tensor | None) -> Output:
        assert padding is None
        features = self.dropout(torch.tanh(self.frozen(self.convolution(images).mean((2, 3)))))
        classes = self.classes(features)
        if not self.skips or images[0, 0, 0, 0] > 0:
            classes = classes + self.rare(features)
        return Output(classes, self.masks(features))


def split_of(micro_batches: int, workers: int) -> BatchSplit:
    return BatchSplit(global_batch=2 * micro_batches, micro_batch=2, workers=workers)


def train(
    rank: int,
    split: BatchSplit,
    exact: bool,
    last_step: int = STEPS,
    state: dict[str, Any] | None = None,
    skips: bool = True,
) -> dict[str, Any]:
    """Train with AdamW, clipping, dropout and accumulation; return the state, losses and gradient norms."""
    torch.manual_seed(rank)  # rank 0's weights count
    network = Network(skips)
    if state is None:
        broadcast_module(network)
        state = {"step": 0, "losses": []}
    else:
        network.load_state_dict(state["model"])
    reduction = (ExactReduction if exact else FastReduction)(network, split, CPU)
    optimizer = torch.optim.AdamW(reduction.parameters, lr=1e-2)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    losses = [*state["losses"]]
    for step in range(state["step"], last_step):
        positions = split.positions(rank, step, step + 1).reshape(-1, 2).tolist()
        rows = torch.zeros(len(positions), 2, dtype=torch.float64)
        for turn, index in enumerate(reduction.turns):
            images = torch.stack([image(position) for position in positions[index]])
            torch.manual_seed(dropout_seed(7, positions[index][0]))
            with reduction.micro_batch(last=turn == len(positions) - 1):
                output = reduction.model(images, None)
                parts = torch.stack([output.class_logits.square().mean(), output.mask_logits.sin().sum()])
                (parts.sum() * reduction.scale).backward()
            rows[index] = parts.detach()
        reduction.finish()
        norm = nn.utils.clip_grad_norm_(reduction.parameters, 0.1)
        optimizer.step()
        losses.append(torch.cat([gather_losses(rows, rank, split), norm[None]]))
    return {
        "step": last_step,
        "losses": losses,
        "model": dict(network.state_dict()),
        "optimizer": optimizer.state_dict(),
    }


def image(position: int) -> Tensor:
    return torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(position))


def fingerprint(value: Any) -> str:
    """Hash a nested structure with the bits of its tensors."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(str((value.dtype, value.shape)).encode() + value.numpy().tobytes())
        elif isinstance(value, dict):
            add([part for item in value.items() for part in item])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def random_gradients(micro_batches: int) -> list[Tensor]:
    """Draw gradients of such different sizes that each other order of adding them gives other bits."""
    generator = torch.Generator().manual_seed(micro_batches)
    size = torch.logspace(-3, 3, 301)
    return [torch.randn(301, generator=generator) * size.roll(37 * place) for place in range(micro_batches)]


def reduced(rank: int, split: BatchSplit, gradients: list[Tensor], steps: int = 2) -> Tensor:
    """Return what ExactReduction makes of one gradient per micro-batch, in the last of some equal steps."""
    network = nn.ParameterList([torch.zeros(200), torch.zeros(101)])
    reduction = ExactReduction(network, split, CPU)
    assert reduction.scale == 1 / len(gradients)
    for _ in range(steps):
        for parameter in network:
            parameter.grad = None
        for turn, index in enumerate(reduction.turns):
            gradient = gradients[index * split.workers + rank]
            with reduction.micro_batch(last=turn == split.accumulation - 1):
                (torch.cat([*network]) * gradient).sum().backward()
        reduction.finish()
    return torch.cat([parameter.grad for parameter in network if parameter.grad is not None])


def tree_sum(gradients: list[Tensor]) -> Tensor:
    """The definition: even and odd places apart, as long as there is an even count; the rest one after the other."""
    if len(gradients) % 2 == 0:
        return tree_sum(gradients[::2]) + tree_sum(gradients[1::2])
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total + gradient
    return total


def every_kind_of_value() -> dict[str, Any]:
    return {
        "step": 3,
        "name": "a run",
        "nothing": None,
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}, {}],
        "state": {0: {"step": torch.tensor(5.0), "moment": torch.randn(4, 5)[:, ::2]}},
        "tensors": (
            torch.arange(6).reshape(2, 3).t(),
            torch.tensor([True, False]),
            torch.randn(3).bfloat16(),
            torch.zeros(0, 4),
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.tensor([math.nan, -0.0, math.inf], dtype=torch.float64),
            nn.Parameter(torch.randn(2)),
        ),
    }


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return (
            found.shape == expected.shape
            and found.dtype == expected.dtype
            and found.device == CPU
            and torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (found, expected)))
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(map(same, found, expected)) and len(found) == len(expected)
    return found == expected


# ---- what each process computes


def broadcasts(rank: int) -> dict[str, bool]:
    torch.manual_seed(0)
    expected = every_kind_of_value()
    sent = expected if rank == 0 else None
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm1d(4))
    module[1].running_mean = torch.full((4,), float(rank))
    torch.manual_seed(0)
    of_rank0 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)).state_dict()
    broadcast_module(module)
    return {
        "state": same(broadcast_state(sent, CPU), expected),
        "no state": broadcast_state(None, CPU) is None,
        "module": all(torch.equal(tensor, of_rank0[name]) for name, tensor in module.state_dict().items()),
    }


def with_nan(rank: int, split: BatchSplit) -> list[float]:
    """Return three sums of gradients, of which one of all workers' micro-batches has a NaN and an infinity."""
    gradients = random_gradients(8)
    gradients[6][0], gradients[6][300] = math.nan, math.inf
    return reduced(rank, split, gradients)[[0, 1, 300]].tolist()


def sums(rank: int, workers: int) -> dict[int, Tensor]:
    counts = [count for count in (1, 2, 4, 8, 12, 24) if count % workers == 0]
    return {count: reduced(rank, split_of(count, workers), random_gradients(count)) for count in counts}


def stopped(rank: int, split: BatchSplit, file: Path) -> dict[str, Any]:
    state = train(rank, split, exact=True, last_step=5)
    if rank == 0:
        torch.save(state, file)
    return state


def resumed(rank: int, split: BatchSplit, file: Path) -> dict[str, Any]:
    saved = torch.load(file, weights_only=True) if rank == 0 else None
    return train(rank, split, exact=True, state=broadcast_state(saved, CPU))


def scenarios(folder: Path) -> list[tuple[str, int, Callable[[int], Any]]]:
    """Return name, number of workers and what each rank computes, in the order in which they run."""
    found: list[tuple[str, int, Callable[[int], Any]]] = [
        (f"exact {count} on {workers}", workers, partial(train, split=split_of(count, workers), exact=True))
        for count, some in ((8, (1, 2, 4, 8)), (12, (1, 2, 4, 3)))
        for workers in some
    ]
    found += [(f"sums on {workers}", workers, partial(sums, workers=workers)) for workers in (1, 2, 3, 4, 8)]
    for workers in (1, 2, 3):
        found.append(
            (f"fast on {workers}", workers, partial(train, split=split_of(12, workers), exact=False, skips=False))
        )
    file = folder / "state.pt"
    found += [
        ("exact 12 on 3 again", 3, partial(train, split=split_of(12, 3), exact=True)),
        ("exact without skips", 2, partial(train, split=split_of(12, 2), exact=True, skips=False)),
        ("stopped", 4, partial(stopped, split=split_of(8, 4), file=file)),
    ]
    found += [(f"resumed on {n}", n, partial(resumed, split=split_of(8, n), file=file)) for n in (1, 2, 8)]
    found += [("nan", 4, partial(with_nan, split=split_of(8, 4))), ("broadcasts", 3, broadcasts)]
    return found


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for number, (name, workers, compute) in enumerate(scenarios(folder)):
        if rank < workers:
            store = f"file://{folder}/store{number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
            results[name] = compute(rank)
            dist.destroy_process_group()
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Run all scenarios; return the results of each one's ranks."""
    folder = tmp_path_factory.mktemp("reduction")
    start_processes(_process, (folder,), nprocs=MOST_WORKERS, start_method="forkserver")
    of_ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(MOST_WORKERS)]
    return {name: [of_ranks[rank][name] for rank in range(workers)] for name, workers, _ in scenarios(folder)}


# ---- checks


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 6, 8, 12, 16, 20, 40])
def test_one_worker_adds_in_the_order_of_the_tree(micro_batches: int) -> None:
    gradients = random_gradients(micro_batches)
    assert torch.equal(reduced(0, split_of(micro_batches, 1), gradients), tree_sum(gradients))
    if micro_batches > 3:
        assert not torch.equal(reduce(torch.add, gradients), tree_sum(gradients)), "the order would not matter"


def test_the_tree_of_eight_written_out() -> None:
    g = random_gradients(8)
    expected = ((g[0] + g[4]) + (g[2] + g[6])) + ((g[1] + g[5]) + (g[3] + g[7]))
    assert torch.equal(reduced(0, split_of(8, 1), g), expected)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_powers_of_two_workers_add_in_the_order_of_the_tree(results: dict[str, list[Any]], workers: int) -> None:
    for of_rank in results[f"sums on {workers}"]:
        assert len(of_rank) >= 2
        for count, found in of_rank.items():
            assert torch.equal(found, tree_sum(random_gradients(count))), count


def test_three_workers_add_their_own_sums(results: dict[str, list[Any]]) -> None:
    for of_rank in results["sums on 3"]:
        for count, found in of_rank.items():
            gradients = random_gradients(count)
            first, second, third = (tree_sum(gradients[rank::3]) for rank in range(3))
            assert torch.equal(found, first + second + third), count


@pytest.mark.parametrize(("micro_batches", "workers"), [(8, 1), (8, 2), (8, 4), (8, 8), (12, 1), (12, 2), (12, 4)])
def test_training_has_the_same_bits_on_any_power_of_two_workers(
    results: dict[str, list[Any]], micro_batches: int, workers: int
) -> None:
    reference = results[f"exact {micro_batches} on 1"][0]
    found = results[f"exact {micro_batches} on {workers}"]
    assert len(reference["losses"]) == STEPS
    assert len(reference["optimizer"]["state"]) == 7, "a parameter was not trained"
    assert len(found) == workers
    assert {fingerprint(of_rank) for of_rank in found} == {fingerprint(reference)}


def test_three_workers_repeat_their_bits_and_are_close(results: dict[str, list[Any]]) -> None:
    reference, found = results["exact 12 on 1"][0], results["exact 12 on 3"]
    again = results["exact 12 on 3 again"]
    assert len({fingerprint(of_rank) for of_rank in found + again}) == 1
    assert_close(found[0], reference)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_fast_is_close_to_exact(results: dict[str, list[Any]], workers: int) -> None:
    found = results[f"fast on {workers}"]
    assert len({fingerprint(of_rank) for of_rank in found}) == 1
    assert_close(found[0], results["exact without skips"][0])


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(torch.stack(found["losses"]), torch.stack(expected["losses"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_resuming_on_another_number_of_workers_keeps_the_bits(results: dict[str, list[Any]], workers: int) -> None:
    assert results["stopped"][0]["step"] == 5
    found = {fingerprint(of_rank) for of_rank in results[f"resumed on {workers}"]}
    assert found == {fingerprint(results["exact 8 on 1"][0])}


def test_non_finite_gradients_reach_all_ranks(results: dict[str, list[Any]]) -> None:
    for first, second, last in results["nan"]:
        assert math.isnan(first)
        assert math.isfinite(second)
        assert last == math.inf


def test_state_and_module_of_rank_0_reach_all_ranks(results: dict[str, list[Any]]) -> None:
    assert results["broadcasts"] == [{"state": True, "no state": True, "module": True}] * 3


def test_gradients_are_views_of_one_buffer_and_zeros_where_there_are_none() -> None:
    network = nn.ModuleDict({"used": nn.Linear(2, 3), "unused": nn.Linear(4, 5)})
    reduction = ExactReduction(network, split_of(2, 1), CPU)
    for turn in range(2):
        with reduction.micro_batch(last=turn == 1):
            network["used"](torch.ones(2)).sum().backward()
    reduction.finish()
    gradients = [p.grad for p in reduction.parameters if p.grad is not None]
    assert len(gradients) == 4
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 1
    assert [gradient.sum().item() for gradient in gradients] == [2 * 6, 2 * 3, 0, 0]


def test_losses_are_added_in_the_order_of_micro_batches() -> None:
    rows = torch.tensor([[1e16, 1.0], [1.0, 2.0], [-1e16, 3.0], [1.0, 4.0]], dtype=torch.float64)
    assert gather_losses(rows, 0, split_of(4, 1)).tolist() == [0.25, 2.5]
