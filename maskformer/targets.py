"""Training targets of one image: the classes and masks of its segments.

Letters: N segments, M selected segments, H W padded image.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Targets:
    """The segments of one image, on any device.

    Masks may be an index map, in which 0 is no segment and k is segment k, counted from 1. It takes one plane for any
    N, but its masks cannot overlap. Void, crowd and padding belong to no mask. Values are checked here; on a GPU this
    waits for the device, so training makes the targets on the host and moves them with `to`.

    Raises:
        ValueError: shapes, data types or the values of the index map do not fit the number of classes.
    """

    classes: Tensor
    """[N] int64, class indices 0..K-1."""
    masks: Tensor
    """[N, H, W] bool, or [H, W] integer: an index map."""
    max_class: int = field(init=False, repr=False)
    """The highest class index, 0 if there are no segments."""

    def __post_init__(self) -> None:
        classes, masks = self.classes, self.masks
        if classes.ndim != 1 or classes.dtype != torch.int64:
            raise ValueError(f"Target classes are int64 [N], got {classes.dtype} {list(classes.shape)}; convert them.")
        is_index_map = masks.ndim == 2 and masks.dtype != torch.bool and not masks.is_floating_point()
        if not is_index_map and not (masks.ndim == 3 and masks.dtype == torch.bool):
            raise ValueError(
                f"Target masks are bool [N,H,W] or an integer index map [H,W], got {masks.dtype} {list(masks.shape)}; "
                f"convert them."
            )
        if not is_index_map and len(masks) != len(classes):
            raise ValueError(f"Each target class needs one mask, got {len(classes)} classes and {len(masks)} masks.")
        min_class, max_class = _limits(classes)
        if min_class < 0:
            raise ValueError(f"Target classes are class indices from 0, got {min_class}; remove such segments.")
        min_index, max_index = _limits(masks) if is_index_map else (0, 0)
        if min_index < 0 or max_index > len(classes):
            raise ValueError(
                f"An index map with {len(classes)} classes holds 0 (no segment) to {len(classes)}, got values from "
                f"{min_index} to {max_index}; number the segments in the order of the classes, from 1."
            )
        object.__setattr__(self, "max_class", max_class)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the padded image."""
        height, width = self.masks.shape[-2:]
        return height, width

    @classmethod
    def unchecked(cls, classes: Tensor, masks: Tensor, max_class: int) -> "Targets":
        """Return targets without reading their values, which the caller must have checked before."""
        targets = object.__new__(cls)
        for name, value in {"classes": classes, "masks": masks, "max_class": max_class}.items():
            object.__setattr__(targets, name, value)  # the dataclass is frozen
        return targets

    def to(self, device: torch.device) -> "Targets":
        """Copy the tensors to `device`, without another check and without waiting for the device."""
        return self.unchecked(to_device(self.classes, device), to_device(self.masks, device), self.max_class)

    def resized(self, height: int, width: int) -> Tensor:
        """Return `masks`, resized by nearest neighbor to `height` x `width`, the size of the mask logits.

        Returns:
            [N, height, width] bool, or the index map [height, width] in float32, which is exact up to 2^24.
        """
        if self.masks.ndim == 3:
            return F.interpolate(self.masks[:, None].view(torch.uint8), (height, width), mode="nearest")[:, 0].bool()
        return F.interpolate(self.masks.float()[None, None], (height, width), mode="nearest")[0, 0]

    def selected(self, indices: Int64[Tensor, " M"], rows: slice = slice(None)) -> Bool[Tensor, "M rows W"]:
        """Return the `rows` of the masks at the target indices `indices` (0..N-1) at full size."""
        masks = self.masks[..., rows, :]
        if masks.ndim == 3:
            return masks[indices]
        numbers = indices + 1
        if len(self) <= torch.iinfo(masks.dtype).max:  # comparing values of one type is faster
            numbers = numbers.to(masks.dtype)
        return masks == numbers[:, None, None]


def _limits(values: Tensor) -> tuple[int, int]:
    """Return the lowest and highest of the values and 0."""
    if not values.numel():
        return 0, 0
    lowest, highest = torch.stack(values.aminmax()).numpy(force=True)
    return min(0, int(lowest)), max(0, int(highest))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`. A copy from host to GPU does not wait for the work that the GPU still has to do."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # from a GPU, values may be read as soon as they are here
