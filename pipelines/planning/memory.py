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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from maskformer import build_model
from maskformer.config import LossConfig, ModelConfig

# The part of the criterion after the matching. Only the matching needs values.
from maskformer.criterion import mask_losses_of_image
from maskformer.model import MaskFormerOutput


@dataclass(frozen=True)
class StateMemory:
    """Memory that stays allocated throughout a run."""

    parameters: int
    """Parameters, trainable or not."""
    gradients: int
    """Gradients of the trainable parameters."""
    optimizer: int
    """The two moments of AdamW."""
    buckets: int
    """The copies of the gradients that DDP communicates."""
    averaged: int
    """The averaged weights (EMA), 0 without them."""
    checkpoint: int
    """Parameters, buffers, moments and averaged weights on disk."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer + self.buckets + self.averaged


@dataclass(frozen=True)
class Activations:
    """Memory that one micro-batch needs in addition, until the end of its backward pass."""

    network: int
    """Tensors that the network saves for the backward pass."""
    saved: tuple[int, ...]
    """Tensors that network and criterion save for the backward pass, for each number of masks."""
    peak: tuple[int, ...]
    """Peak of the forward pass including temporaries, for each number of masks. According to a measurement on meta
    tensors at 800x1333, the backward pass needs less: it frees faster than it allocates."""


def state_memory(config: ModelConfig, averaged: bool = False) -> StateMemory:
    """Count the memory of parameters, gradients, optimizer, DDP and `averaged` weights, all in float32.

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
        buckets=trained,
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
    """Run a forward pass of `batch` images of `size` (H, W) on fake tensors, and count its allocations.

    Matching is left out: its temporaries, about six times the mask logits, are freed before the mask losses allocate
    more than that. The class loss is left out because it is small: one number per query and class.

    Args:
        masks: numbers of matched segments per image; each gives a separate figure.
        device: whose kernels to assume. Attention matrices count as stored, as on a CPU. The fused kernels of a GPU do
            not store them, but a PyTorch build without CUDA cannot tell: for R50 at 800x1333 about 0.5 GB too much.
        bfloat16: run the network under autocast, as on a GPU. Losses are always float32.
    """
    with torch.device("meta"):
        network = build_model(config).train()
    with FakeTensorMode():
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)
            for name, tensor in (*network.named_parameters(), *network.named_buffers())
        }
        with _Allocations(tensors.values()) as allocated, allocated.saving():
            images = torch.empty(batch, 3, *size, device=device)
            with _autocast(device, bfloat16):
                output: MaskFormerOutput = functional_call(network, tensors, (images,))
            network_saved, network_peak = allocated.saved, allocated.peak
            saved, peak = [], []
            for count in masks:
                allocated.peak = allocated.live
                losses = _without_matching(output, count, size)
                saved.append(allocated.saved)
                peak.append(max(network_peak, allocated.peak))
                del losses  # frees the tensors saved for their backward pass
    return Activations(network=network_saved, saved=tuple(saved), peak=tuple(peak))


def published_layout(config: ModelConfig, size: tuple[int, int], masks: int) -> int:
    """Model the peak of the published implementation, mmdetection 2.25, for one image of `size` (H, W).

    The network has the same operators as ours, in float32 and with stored attention matrices. The losses differ. Per
    pixel of every matched mask, at full resolution, each decoder layer saves for the backward pass
      - the upsampled logits, float32, for the focal loss: 4 bytes
      - their inverted targets, int64, since its kernel expects class indices: 8 bytes
      - the sigmoid and the targets as float32 for the dice loss: 4 + 4 bytes
    In addition, the last layer holds all targets of the image as int64 and two copies of those that it matched,
    gathered and concatenated: 3 x 8 bytes. cuDNN workspaces and fragmentation are not included.
    """
    per_pixel = config.decoder_layers * (4 + 8 + 4 + 4) + 3 * 8
    network = activations(config, 1, size, (), "cpu").network
    return state_memory(config).total + network + per_pixel * masks * size[0] * size[1]


def multiply_adds(config: ModelConfig, size: tuple[int, int]) -> int:
    """Count the multiply-adds of the forward pass of one image of `size` (H, W)."""
    with torch.device("meta"):
        network = build_model(config)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, *size))
    return counter.get_total_flops() // 2


def _without_matching(output: MaskFormerOutput, masks: int, size: tuple[int, int]) -> list[Tensor]:
    """Return the mask losses of each image, assuming that queries 0..masks-1 are matched in every layer."""
    layers, batch, num_queries = output.mask_logits.shape[:3]
    masks, device = min(masks, num_queries), output.mask_logits.device
    queries = torch.zeros(layers, masks, dtype=torch.int64, device=device)
    # The criterion makes the masks from the index map in this call, so they count towards the peak.
    return [
        mask_losses_of_image(
            output.mask_logits[:, image],
            queries,
            torch.empty(layers * masks, *size, dtype=torch.bool, device=device),
            LossConfig(),
        )
        for image in range(batch)
    ]


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
    """Counts the bytes of all live storages, and of those saved for the backward pass."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        """Start at zero; `ignored` tensors never count."""
        super().__init__()
        self.live = self.peak = self.saved = 0
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._alive: dict[int, int] = {}
        self._saved: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what autograd saves inside the block."""

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            key = self._count(storage)
            if key in self._alive and key not in self._saved:
                self._saved.add(key)
                self.saved += storage.nbytes()
            return tensor.detach()  # a node that saved its own output itself would never be freed

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _count(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._alive and key not in self._ignored:
            self._alive[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, key).atexit = False
        return key

    def _free(self, key: int) -> None:
        size = self._alive.pop(key)
        self.live -= size
        if key in self._saved:
            self._saved.remove(key)
            self.saved -= size
