"""How the gradients and losses of a step's micro-batches are added, and how rank 0 sends its state to all ranks.

A step has M micro-batches over all workers; worker r of W computes the numbers r, r + W, r + 2W, ... (`BatchSplit`).
Adding floating-point numbers in another order gives other bits. `ExactReduction` adds in an order that depends on M
alone, a binary tree over the numbers:

    M = 8    ((g0 + g4) + (g2 + g6)) + ((g1 + g5) + (g3 + g7))
    M = 12   ((g0+g4+g8) + (g2+g6+g10)) + ((g1+g5+g9) + (g3+g7+g11))

Numbers are split into even and odd places as long as there is an even count of them; the rest is added in ascending
order. After log2(W) splits each part is what one of W workers computes, so any power of two that divides M gives the
same bits. Other numbers of workers give their own bits, the same in every run.

`FastReduction` is DistributedDataParallel. It adds in the order of its all-reduce, which overlaps the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.data.order import BatchSplit


class Reduction(Protocol):
    """What a training step needs to sum gradients over all micro-batches of all workers.

    For each of `turns`, the step computes that micro-batch's loss with `model` and differentiates `scale` times the
    loss, all within `micro_batch`. After `finish`, `.grad` of `parameters` is the gradient of the mean loss over the
    M micro-batches of the step, the same bits on all ranks. Gradients keep their memory from step to step; the first
    micro-batch of a step sets them to zero.
    """

    model: nn.Module
    """Computes the output in the training step."""
    parameters: list[nn.Parameter]
    """The trainable parameters."""
    turns: list[int]
    """The worker's micro-batches 0..A-1 in the order in which they must be computed."""
    scale: float
    """Factor on the loss of each micro-batch."""

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Enclose forward pass, loss and backward pass of one micro-batch; `last` of this worker's step."""
        ...

    def finish(self) -> None:
        """Finish the sum over all workers. All ranks must call it, after all micro-batches of the step."""
        ...


class ExactReduction:
    """Sums the gradients in the order of the tree, so that numbers of workers do not change the bits.

    Shards are exchanged after the last backward pass: all-to-all, a sum in the tree's order, all-gather. A worker sends
    and receives as many bytes as in a ring all-reduce, but they do not overlap the backward pass.

    It replaces the gradients that PyTorch would allocate by flat buffers of their size: one, another one for each
    halving of the A micro-batches (partial sums, log2(A) if that is an integer), and at least two if there is more
    than one worker (received shards). A parameter without a gradient counts as zeros; NaN reaches all ranks.
    """

    def __init__(self, network: nn.Module, split: BatchSplit, device: torch.device) -> None:
        """Allocate the buffers.

        Args:
            network: on `device`, with the same weights on all ranks.
        """
        self.model: nn.Module = network
        self.parameters: list[nn.Parameter] = [p for p in network.parameters() if p.requires_grad]
        self.turns: list[int] = _tree_order(list(range(split.accumulation)))
        self.scale: float = split.micro_batch / split.global_batch
        self._workers = split.workers
        leaves = split.accumulation & -split.accumulation  # the largest power of two that divides it
        self._per_leaf = split.accumulation // leaves
        self._done = 0
        count = max(leaves.bit_length(), 1 if split.workers == 1 else 2)
        size = sum(p.numel() for p in self.parameters)
        padded = -(-size // split.workers) * split.workers
        self._buffers = [torch.zeros(padded, device=device) for _ in range(count)]
        sizes = [*(p.numel() for p in self.parameters), padded - size]
        self._views = [
            [part.view_as(p) for p, part in zip(self.parameters, buffer.split(sizes), strict=False)]
            for buffer in self._buffers
        ]

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Enclose one micro-batch. The backward pass adds to the buffer of its leaf; a complete leaf is folded."""
        # Complete leaves are held like a binary counter: after k of them, one partial sum for each 1 in k.
        leaf, place = divmod(self._done, self._per_leaf)
        held = leaf.bit_count()
        if place == 0:
            self._buffers[held].zero_()
            self._use(held)
        yield
        self._done += 1
        if place == self._per_leaf - 1:
            for top in range(held, (leaf + 1).bit_count() - 1, -1):
                self._buffers[top - 1] += self._buffers[top]

    def finish(self) -> None:
        """Sum over the workers; `.grad` of each parameter becomes a view of the flat sum."""
        assert self._done == len(self.turns), f"{self._done} of {len(self.turns)} micro-batches were computed"
        self._done = 0
        if self._workers > 1:
            mine, received = self._buffers[:2]
            dist.all_to_all_single(received, mine)
            dist.all_gather_single(mine, _tree_sum(received.chunk(self._workers)))
        self._use(0)

    def _use(self, index: int) -> None:
        for parameter, view in zip(self.parameters, self._views[index], strict=True):
            parameter.grad = view


class FastReduction:
    """Sums the gradients with DistributedDataParallel; other numbers of workers give slightly other numbers."""

    def __init__(self, network: nn.Module, split: BatchSplit, device: torch.device) -> None:
        """Wrap the network.

        Args:
            network: on `device`, called with images [B, 3, H, W] and padding or None, with weights of rank 0.
        """
        self._ddp = DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,  # what is communicated is the gradients themselves, not copies of them
        )
        self.model: nn.Module = self._ddp
        self.parameters: list[nn.Parameter] = [p for p in network.parameters() if p.requires_grad]
        self.turns: list[int] = list(range(split.accumulation))
        self.scale: float = 1 / split.accumulation  # DDP averages over the workers
        self._first = True
        # Of the layout of the parameters; DDP makes them views of its buckets.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._settle_buckets(device)

    def _settle_buckets(self, device: torch.device) -> None:
        """Let DDP arrange its gradient buckets before the first real step.

        After its first backward pass DDP regroups the buckets, and with more than two ranks another grouping adds
        the gradients in another order. A run that resumes would meet that at another step than one that never
        stopped; a backward pass of zeros makes it the same for both.
        """
        output = self.model(torch.zeros(1, 3, 64, 64, device=device), None)
        (0.0 * (output.class_logits.sum() + output.mask_logits.sum())).backward()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Enclose one micro-batch. The backward pass of the last one includes the all-reduce."""
        if self._first:
            # Without gradients (None), each backward pass would allocate some beside the buckets.
            self.model.zero_grad(set_to_none=False)
        self._first = last
        with nullcontext() if last else self._ddp.no_sync():
            yield

    def finish(self) -> None:
        """Do nothing: the last backward pass has summed."""


def _tree_order(numbers: list[int]) -> list[int]:
    """Return the leaves of the tree from left to right."""
    if len(numbers) % 2:
        return numbers
    return _tree_order(numbers[::2]) + _tree_order(numbers[1::2])


def _tree_sum(tensors: tuple[Tensor, ...]) -> Tensor:
    """Sum the tensors in the order of the tree. The result is the first of them, the others are overwritten."""
    if len(tensors) % 2:
        for tensor in tensors[1:]:
            tensors[0].add_(tensor)
        return tensors[0]
    return _tree_sum(tensors[::2]).add_(_tree_sum(tensors[1::2]))


def gather_losses(rows: Tensor, rank: int, split: BatchSplit) -> Tensor:
    """Return the mean losses over all micro-batches of a step.

    They have the same bits for any number of workers, unless micro-batches are dealt by size.

    All ranks must call it.

    Args:
        rows: [A, L] float64, the losses of this rank's micro-batches in the order of their numbers.

    Returns:
        [L] float64.
    """
    every = rows.new_zeros(split.accumulation * split.workers, rows.shape[1])
    every[rank :: split.workers] = rows
    if split.workers > 1:
        dist.all_reduce(every)  # exact: all ranks but one add 0
    # One after the other: a library's sum may choose its order.
    total = torch.zeros_like(every[0])
    for row in every:
        total += row
    return total / len(every)


def broadcast_state(state: Any, device: torch.device) -> Any:
    """Send a nested structure of rank 0 to all ranks, so that only one of them reads a checkpoint.

    All ranks must call it. Memory beyond the structure itself: one tensor on `device`.

    Args:
        state: on rank 0, dicts, lists and tuples of tensors and plain values, or None; ignored on other ranks.
        device: of the process group's tensors: the GPU for NCCL, the CPU for Gloo.

    Returns:
        On rank 0 the `state` itself, on others a copy with all tensors on the CPU.
    """
    skeleton: list[Any] = [None]
    if dist.get_rank() == 0:
        skeleton = [_map_tensors(state, lambda tensor: torch.empty_like(tensor, device="meta"))]
    dist.broadcast_object_list(skeleton, src=0, device=device)

    def send(tensor: Tensor) -> None:
        _broadcast(tensor.to(device))

    def receive(empty: Tensor) -> Tensor:
        return _broadcast(torch.empty(empty.shape, dtype=empty.dtype, device=device)).cpu()

    if dist.get_rank() == 0:
        _map_tensors(state, send)
        return state
    return _map_tensors(skeleton[0], receive)


def broadcast_module(module: nn.Module) -> None:
    """Give the parameters and buffers of rank 0's module to the modules of all ranks. All ranks must call it."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(_broadcast(tensor))


def _broadcast(tensor: Tensor) -> Tensor:
    """Return rank 0's tensor; written to `tensor` itself if it is contiguous."""
    tensor = tensor.detach().contiguous()
    if tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)  # bytes: every dtype, whatever the backend
    return tensor


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a nested structure with every tensor changed, in the order in which they appear."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    return value
