"""One optimizer step. The oracle differentiates the definition of the loss as a whole and updates by hand."""

import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from maskformer import MaskFormer, build_model, compute_losses
from maskformer.optim import build_optimizer, parameter_groups
from pipelines.config.recipes import DEMO
from pipelines.config.train import TrainConfig
from pipelines.data.batch import PanopticBatch
from pipelines.data.order import BatchSplit, dropout_seed
from pipelines.training.reduction import ExactReduction, FastReduction, Reduction, gather_losses
from pipelines.training.worker import NonFiniteError, _agree, train_step

CPU = torch.device("cpu")
TINY = replace(
    DEMO,
    model=replace(
        DEMO.model, num_classes=4, num_queries=5, hidden_dim=16, feedforward_dim=32, decoder_layers=2, dropout=0.1
    ),
    optimizer=replace(DEMO.optimizer, lr=1e-3),
    run=replace(DEMO.run, seed=3),
)
BROKEN = replace(TINY, model=replace(TINY.model))
"""0 in the input becomes infinite: a deviation of 0, which a configuration refuses."""
object.__setattr__(BROKEN.model, "pixel_std", (0.0, 57.12, 57.375))
NUM_SEGMENTS = (2, 0, 7, 1, 3, 2, 0, 0)
"""Of the images of a global batch: more than queries, none, and a micro-batch without any, among others."""


@pytest.fixture(autouse=True)
def single_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute as the ranks do: the number of threads affects rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def micro_batch(first: int, config: TrainConfig = TINY) -> PanopticBatch:
    """Draw the two samples at positions `first` and `first + 1`, of unequal sizes."""
    rng = np.random.default_rng(first)
    sizes = ((40, 48), (33, 64))
    images = torch.zeros(2, 3, 40, 64, dtype=torch.uint8)
    maps = torch.zeros(2, 40, 64, dtype=torch.int32)
    classes = []
    for place, (h, w) in enumerate(sizes):
        count = NUM_SEGMENTS[(first + place) % len(NUM_SEGMENTS)]
        images[place, :, :h, :w] = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
        blocks = rng.integers(0, count + 1, (h // 8 + 1, w // 8 + 1), dtype=np.int32)
        maps[place, :h, :w] = torch.from_numpy(np.kron(blocks, np.ones((8, 8), np.int32))[:h, :w])
        classes.append(torch.from_numpy(rng.integers(0, config.model.num_classes, count)))
    positions = (first, first + 1)
    return PanopticBatch(images, maps, sizes, tuple(classes), positions, (0, 0), tuple(100 + p for p in positions))


def global_batch(step: int) -> list[PanopticBatch]:
    return [micro_batch(8 * step + 2 * place) for place in range(4)]


def mean_masks(batches: list[PanopticBatch]) -> float:
    """Count the matched masks by definition: each image its segments, but at most the queries."""
    matched = [min(len(classes), TINY.model.num_queries) for batch in batches for classes in batch.classes]
    return sum(matched) / len(batches)


def new_network(config: TrainConfig = TINY) -> MaskFormer:
    torch.manual_seed(config.run.seed)
    return build_model(config.model).train()


def reduced(network: MaskFormer, micro_batches: int = 4, exact: bool = True) -> Reduction:
    """Prepare a network for steps of so many micro-batches over all ranks."""
    split = BatchSplit(global_batch=2 * micro_batches, micro_batch=2, workers=dist.get_world_size())
    return (ExactReduction if exact else FastReduction)(network, split, CPU)


def do_steps(network: MaskFormer, num_steps: int, config: TrainConfig = TINY, exact: bool = True) -> list[torch.Tensor]:
    """Run `train_step`s of whole global batches; a rank of several takes its share of the micro-batches."""
    reduction = reduced(network, exact=exact)
    optimizer = build_optimizer(network, config.optimizer)
    split = BatchSplit(global_batch=8, micro_batch=2, workers=dist.get_world_size())
    logged = []
    for step in range(num_steps):
        batches = global_batch(step)
        mine = batches[dist.get_rank() :: dist.get_world_size()]
        losses, _ = train_step(reduction, optimizer, mine, mean_masks(batches), factor(step), config, CPU)
        logged.append(gather_losses(losses, dist.get_rank(), split))
    return logged


def factor(step: int) -> float:
    return 1.0 - 0.2 * step


def reference_loss(network: MaskFormer, batches: list[PanopticBatch], config: TrainConfig = TINY) -> torch.Tensor:
    """Return the mean over micro-batches of class loss + mask losses / num_masks, as one graph."""
    whole = torch.zeros(())
    for batch in batches:
        torch.manual_seed(dropout_seed(config.run.seed, batch.positions[0]))
        output = network(*batch.inputs(config.model.pixel_mean, config.model.pixel_std))
        sums = compute_losses(output, batch.targets(), config.loss, num_masks=1.0)
        masks = sum(min(len(c), config.model.num_queries) for b in batches for c in b.classes) / len(batches)
        whole = whole + (sums.classification + (sums.focal + sums.dice) / masks) / len(batches)
    return whole


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_accumulated_gradient_is_that_of_the_whole(exact: bool) -> None:
    model, network = new_network(), new_network()
    batches = global_batch(0)
    loss = reference_loss(network, batches)
    expected = torch.autograd.grad(loss, list(network.parameters()))
    unclipped = replace(TINY, optimizer=replace(TINY.optimizer, clip_norm=0.0))
    optimizer = build_optimizer(model, unclipped.optimizer)
    reduction = reduced(model, exact=exact)
    rows, norm = train_step(reduction, optimizer, batches, mean_masks(batches), 1.0, unclipped, CPU)
    losses = rows.mean(dim=0)
    assert losses[3].item() == pytest.approx(loss.item(), rel=1e-6)
    assert losses[:3].sum().item() == pytest.approx(loss.item(), rel=1e-6)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_steps_equal_a_handwritten_adamw() -> None:
    """Clipping, decoupled decay and bias correction written out (arXiv:1711.05101, algorithm 2)."""
    config = replace(TINY, optimizer=replace(TINY.optimizer, clip_norm=0.5, backbone_lr_multiplier=0.1, eps=1e-3))
    model, network = new_network(config), new_network(config)
    do_steps(model, 3, config)

    beta1, beta2 = config.optimizer.betas
    groups = parameter_groups(network, config.optimizer)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in network.parameters()}
    for step in range(3):
        gradients = torch.autograd.grad(reference_loss(network, global_batch(step), config), list(moments))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > config.optimizer.clip_norm, "nothing would be clipped"
        clipped = dict(zip(moments, (g * config.optimizer.clip_norm / norm for g in gradients), strict=True))
        for group in groups:
            lr = group["initial_lr"] * factor(step)
            for p in group["params"]:
                first, second = moments[p]
                first = beta1 * first + (1 - beta1) * clipped[p]
                second = beta2 * second + (1 - beta2) * clipped[p] ** 2
                moments[p] = (first, second)
                mean, square = first / (1 - beta1 ** (step + 1)), second / (1 - beta2 ** (step + 1))
                with torch.no_grad():
                    p.sub_(lr * (mean / (square.sqrt() + config.optimizer.eps) + group["weight_decay"] * p))
    for (name, found), expected in zip(model.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = new_network()
    losses = do_steps(model, 2)
    saved = {"losses": losses, "model": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    # Rank 1 alone has an input that is not finite; rank 0 must not wait for it, and must not do the step.
    config = TINY if rank == 0 else BROKEN
    optimizer = build_optimizer(model, config.optimizer)
    try:
        train_step(reduced(model), optimizer, global_batch(3)[rank::2], 2.0, 0.5, config, CPU)
    except NonFiniteError as error:
        saved["error"] = str(error)
    saved["after"] = model.state_dict()
    torch.save(saved, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_equal_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    """Images without targets stand on either rank; no rank may wait for gradients that never come."""
    assert all(any(len(classes) == 0 for b in global_batch(0)[rank::2] for classes in b.classes) for rank in range(2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_rank, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    model = new_network()
    losses = do_steps(model, 2)
    two = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(two[0]["model"][name], two[1]["model"][name]), name
        assert torch.equal(two[0]["model"][name], tensor), name
        assert torch.equal(two[0]["after"][name], tensor), name
    assert torch.equal(torch.stack(two[0]["losses"]), torch.stack(losses))
    assert two[0]["error"] == two[1]["error"]
    assert re.match(r"worker 1: .*not finite.* Images 126, 127, learning rate", two[0]["error"])


def test_a_batch_without_any_target_reaches_every_parameter() -> None:
    empty = replace(
        micro_batch(0), index_maps=torch.zeros(2, 40, 64, dtype=torch.int32), classes=(torch.zeros(0).long(),) * 2
    )
    model = new_network()
    optimizer = build_optimizer(model, TINY.optimizer)
    losses, norm = train_step(reduced(model, 1), optimizer, [empty], 1.0, 1.0, TINY, CPU)
    assert losses.isfinite().all()
    assert losses[0, 1] == losses[0, 2] == 0
    assert norm > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_more_segments_than_queries_and_images_of_one_pixel() -> None:
    many = torch.arange(40 * 64, dtype=torch.int32).view(40, 64) % 501
    one_pixel = torch.ones(1, 1, 1, dtype=torch.int32)
    batches = [
        replace(micro_batch(0), index_maps=many.expand(2, -1, -1).contiguous(), classes=(torch.arange(500) % 4,) * 2),
        replace(
            micro_batch(2),
            images=torch.full((2, 3, 1, 1), 200, dtype=torch.uint8),
            index_maps=torch.cat([one_pixel, 0 * one_pixel]),
            sizes=((1, 1), (1, 1)),
            classes=(torch.tensor([1]), torch.tensor([], dtype=torch.int64)),
        ),
    ]
    model = new_network()
    optimizer = build_optimizer(model, TINY.optimizer)
    losses, norm = train_step(reduced(model, 2), optimizer, batches, mean_masks(batches), 1.0, TINY, CPU)
    assert losses.isfinite().all()
    assert norm > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_step_in_bfloat16_is_close_to_one_in_float32() -> None:
    """The bound is some roundings of 2^-9 per layer; losses and weights themselves are not rounded."""
    config = replace(TINY, model=replace(TINY.model, dropout=0.0))
    batches, found = global_batch(0), {}
    for precision in ("float32", "bfloat16", "auto"):
        model = new_network(config)
        optimizer = build_optimizer(model, config.optimizer)
        given = replace(config, precision=precision)
        rows, norm = train_step(reduced(model), optimizer, batches, mean_masks(batches), 1.0, given, CPU)
        found[precision] = torch.cat([rows.flatten(), torch.tensor([norm], dtype=rows.dtype)])
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(found["auto"], found["float32"])
    assert not torch.equal(found["bfloat16"], found["float32"])
    torch.testing.assert_close(found["bfloat16"], found["float32"], rtol=0.05, atol=0)
    losses = found["bfloat16"][:-1]
    assert not torch.equal(losses.bfloat16().double(), losses), "the losses were rounded to bfloat16"


def gradients(batches: list[PanopticBatch], config: TrainConfig = TINY) -> list[torch.Tensor]:
    model = new_network(config)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # the history of the process
    optimizer = build_optimizer(model, config.optimizer)
    train_step(reduced(model, len(batches)), optimizer, batches, 2.0, 1.0, config, CPU)
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_dropout_depends_on_the_position_alone() -> None:
    one, other = micro_batch(0), replace(micro_batch(0), positions=(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(gradients([one]), gradients([one]), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(gradients([one]), gradients([other]), strict=True))
    without = replace(TINY, model=replace(TINY.model, dropout=0.0))
    assert all(torch.equal(a, b) for a, b in zip(gradients([one], without), gradients([other], without), strict=True))


def test_nan_in_the_logits_names_images_and_learning_rate() -> None:
    model = new_network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, BROKEN.optimizer)
    with pytest.raises(NonFiniteError, match=r"not finite.* Images 100, 101, learning rate 0\.0005"):
        train_step(reduced(model, 1), optimizer, [micro_batch(0)], 2.0, 0.5, BROKEN, CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_infinite_gradient_names_images_and_changes_nothing() -> None:
    model = new_network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameter = model.class_head.weight
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    optimizer = build_optimizer(model, TINY.optimizer)
    with pytest.raises(NonFiniteError, match=r"norm is nan.* Images 100, 101, 102, 103"):
        train_step(reduced(model, 2), optimizer, [micro_batch(0), micro_batch(2)], 2.0, 1.0, TINY, CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_ddp_keeps_no_gradients_beside_its_buckets() -> None:
    network = new_network()
    reduction = reduced(network, exact=False)
    optimizer = build_optimizer(network, TINY.optimizer)

    def storages() -> set[int]:
        return {p.grad.untyped_storage().data_ptr() for p in reduction.parameters if p.grad is not None}

    train_step(reduction, optimizer, global_batch(0), 2.0, 1.0, TINY, CPU)  # DDP groups its buckets anew at its start
    buckets = storages()
    assert len(buckets) < 5 < len(reduction.parameters)
    for step in (1, 2):
        train_step(reduction, optimizer, global_batch(step), 2.0, 1.0, TINY, CPU)
        assert storages() == buckets
    with reduction.micro_batch(last=False):  # which DDP does not communicate
        output = reduction.model(*micro_batch(0).inputs(TINY.model.pixel_mean, TINY.model.pixel_std))
        output.mask_logits.sum().backward()
    assert storages() == buckets


def prepared_step(device: torch.device, accumulation: int, exact: bool = True) -> Callable[[], None]:
    """Return what the trainer does for a step: agree with the other ranks, and compute."""
    batches = [micro_batch(2 * place) for place in range(accumulation)]
    config = replace(TINY, run=replace(TINY.run, global_batch=2 * accumulation, micro_batch=2))
    network = new_network().to(device)
    split = BatchSplit(global_batch=2 * accumulation, micro_batch=2, workers=1)
    reduction = (ExactReduction if exact else FastReduction)(network, split, device)
    optimizer = build_optimizer(network, config.optimizer)

    def step() -> None:
        masks, _, _ = _agree(batches, config, 0, 0, device)
        train_step(reduction, optimizer, batches, masks, 1.0, config, device)

    return step


def most_waits(accumulation: int) -> int:
    """Once for the number of masks and once for the norm of the gradient, and for the costs of each micro-batch."""
    return 2 + accumulation


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_reads_values_of_the_device_three_times(accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def counted(name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return method(tensor, *args, **kwargs)

        return call

    step = prepared_step(CPU, accumulation)
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    step()
    assert 1 <= len(reads) <= most_waits(accumulation), reads


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_waits_for_the_gpu_three_times(accumulation: int, tmp_path: Path) -> None:
    dist.destroy_process_group()
    dist.init_process_group("cuda:nccl,cpu:gloo", init_method=f"file://{tmp_path}/nccl", rank=0, world_size=1)
    step = prepared_step(torch.device("cuda", 0), accumulation, exact=False)
    step()  # allocates and chooses kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert 1 <= len(waits) <= most_waits(accumulation), waits
