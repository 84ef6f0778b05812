"""Memory of one worker in training, counted by running the model itself on fake tensors.

Fake tensors have a shape, dtype and device but no storage, so network and mask losses can run for any GPU on any
machine while each allocation is counted. There are no formulas of layers that could become outdated. For comparison,
`published_layout` models the published implementation, which differs in its losses.

B images, H W padded image, L decoder layers, N segments. All figures are bytes.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from maskformer import MaskFormer, build_model
from maskformer.config import LossConfig, ModelConfig

# The part of the criterion after the matching. Only the matching needs values.
from maskformer.mask_losses import mask_losses
from maskformer.model import MaskFormerOutput
from maskformer.pieces import piece_size
from maskformer.targets import Targets


@dataclass(frozen=True)
class StateMemory:
    """Memory that stays allocated throughout a run."""

    parameters: int
    """Parameters, trainable or not."""
    gradients: int
    """Gradients of the trainable parameters."""
    optimizer: int
    """The two moments of AdamW."""
    averaged: int
    """The averaged weights (EMA), 0 without them."""
    checkpoint: int
    """Parameters, buffers, moments and averaged weights on disk."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer + self.averaged


@dataclass(frozen=True)
class Activations:
    """Memory that one micro-batch needs in addition, until the end of its backward pass."""

    network: int
    """Tensors that the network saves for the backward pass."""
    saved: tuple[int, ...]
    """Tensors that network and criterion save for the backward pass, for each number of masks."""
    peak: tuple[int, ...]
    """Peak of the forward and backward pass including temporaries, for each number of masks."""


def state_memory(config: ModelConfig, averaged: bool = False) -> StateMemory:
    """Count the memory of parameters, gradients, optimizer and `averaged` weights, all in float32.

    DDP's buckets are the gradients. Exact reduction, the default on CPUs, has further copies of the gradients, which
    are not counted: one if there are several workers, or one for each time that the micro-batches of a worker can be
    halved, whichever is more.

    While a quick PQ uses averaged weights, the trained ones are kept beside them: that copy is not counted, since
    there are no gradients of activations at that time.
    """
    with torch.device("meta"):
        model = build_model(config)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    return StateMemory(
        parameters=parameters,
        gradients=trained,
        optimizer=2 * trained,
        averaged=stored if averaged else 0,
        checkpoint=stored + 2 * trained + (stored if averaged else 0),
    )


def activations(
    config: ModelConfig,
    batch: int,
    size: tuple[int, int],
    masks: Sequence[int],
    device: Literal["cpu", "cuda"],
    bfloat16: bool = False,
) -> Activations:
    """Run a forward and a backward pass of `batch` images of `size` (H, W) on fake tensors, and count allocations.

    Matching is left out: its temporaries are as small as those of the mask losses. The class loss is left out because
    it is small: one number per query and class.

    Args:
        masks: numbers of matched segments per image; each gives a separate figure.
        device: whose kernels to assume. Attention matrices count as stored, as on a CPU. The fused kernels of a GPU do
            not store them, but a PyTorch build without CUDA cannot tell: for R50 at 800x1333 about 0.5 GB too much.
        bfloat16: run the network under autocast. Losses are always float32.
    """
    with torch.device("meta"):  # initialization reads values, which fake tensors do not have
        network = build_model(config).train()
    saved: list[int] = []
    peak: list[int] = []
    with FakeTensorMode():
        # Without a GPU, PyTorch cannot run a backward pass on a fake one. So this is what it takes on a CPU in
        # addition to what is there when it starts.
        rise = 0
        if masks:
            output, allocated = _forward(network, batch, size, "cpu", bfloat16)
            with allocated:
                losses = _without_matching(output, max(masks), size)
                start = allocated.peak = allocated.live
                torch.autograd.backward([losses.sum(), output.class_logits.sum()])
            rise = allocated.peak - start
            del output, allocated, losses

        output, allocated = _forward(network, batch, size, device, bfloat16)
        network_saved, network_peak = allocated.live - _bytes(output), allocated.peak
        for count in masks:
            with allocated:
                allocated.peak = allocated.live
                losses = _without_matching(output, count, size)
            saved.append(allocated.live - _bytes(output))
            peak.append(max(network_peak, allocated.peak, allocated.live + rise))
            del losses  # frees the tensors saved for their backward pass
    return Activations(network=network_saved, saved=tuple(saved), peak=tuple(peak))


def _forward(
    network: MaskFormer, batch: int, size: tuple[int, int], device: str, bfloat16: bool
) -> tuple[MaskFormerOutput, "_Allocations"]:
    """Give the network fake tensors and run it; return the output, and the counter, which can go on counting."""
    for module in network.modules():
        for name, old in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            new = torch.empty(old.shape, dtype=old.dtype, device=device)
            setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None  # part of the state
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    with _Allocations([*network.parameters(), *network.buffers(), *gradients]) as allocated:
        images = torch.empty(batch, 3, *size, device=device)
        with _autocast(device, bfloat16):
            output = network(images)
    return output, allocated


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def published_layout(config: ModelConfig, size: tuple[int, int], masks: int) -> int:
    """Model the peak of the published implementation, mmdetection 2.25, for one image of `size` (H, W).

    The network has the same operators as ours, in float32 and with stored attention matrices. What a ResNet's norms
    save there, and ours do not since they are part of the convolutions, is not included: 0.9 GB for R50 at 800x1333.
    Besides the gradients, DDP has a copy of them. The losses differ more. Per pixel of every matched mask, at full
    resolution, each decoder layer saves for the backward pass
      - the upsampled logits, float32, for the focal loss: 4 bytes
      - their inverted targets, int64, since its kernel expects class indices: 8 bytes
      - the sigmoid and the targets as float32 for the dice loss: 4 + 4 bytes
    In addition, the last layer holds all targets of the image as int64 and two copies of those that it matched,
    gathered and concatenated: 3 x 8 bytes. cuDNN workspaces and fragmentation are not included.
    """
    per_pixel = config.decoder_layers * (4 + 8 + 4 + 4) + 3 * 8
    state = state_memory(config)
    network = activations(config, 1, size, (), "cpu").network
    return state.total + state.gradients + network + per_pixel * masks * size[0] * size[1]


def multiply_adds(config: ModelConfig, size: tuple[int, int]) -> int:
    """Count the multiply-adds of the forward pass of one image of `size` (H, W)."""
    with torch.device("meta"):
        network = build_model(config)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, *size))
    return counter.get_total_flops() // 2


def _without_matching(output: MaskFormerOutput, masks: int, size: tuple[int, int]) -> Tensor:
    """Return the mask losses, assuming that queries 0..masks-1 are matched in every layer."""
    layers, batch, num_queries = output.mask_logits.shape[:3]
    masks, device = min(masks, num_queries), output.mask_logits.device
    matched = torch.zeros(layers, masks, dtype=torch.int64, device=device)
    target = Targets.unchecked(
        torch.zeros(masks, dtype=torch.int64, device=device), torch.zeros(size, dtype=torch.int32, device=device), 0
    )
    # On a CPU, pieces are far smaller than one map of full resolution. Larger ones make this faster, and the difference
    # of a few megabytes does not matter.
    piece = piece_size(device) if device.type == "cuda" else size[0] * size[1]
    with _one_thread():  # fake tensors belong to this thread
        return mask_losses(
            output.mask_logits, [(matched, matched)] * batch, [target] * batch, LossConfig(), piece=piece
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _autocast(device: str, bfloat16: bool) -> Iterator[None]:
    """Set autocast for `device` even if this machine has no such device, which torch.autocast refuses."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, bfloat16)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all live storages."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        """Start at zero; `ignored` tensors never count."""
        super().__init__()
        self.live = self.peak = 0
        # The tensors are kept, so that no other storage gets the address of one of them.
        self._ignored = {tensor.untyped_storage()._cdata: tensor for tensor in ignored}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and key not in self._ignored:
            self._alive[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.live -= self._alive.pop(key)
