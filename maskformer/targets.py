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
    N, but its masks cannot overlap. Void, crowd and padding belong to no mask.

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
        # Reading values synchronizes with the device. One check here prevents unexplained indexing errors there later.
        zero = classes.new_zeros(1)
        indices = masks.flatten().long() if is_index_map else zero
        limits = [limit for values in (classes, indices) for limit in torch.cat([values, zero]).aminmax()]
        min_class, max_class, min_index, max_index = (int(limit) for limit in torch.stack(limits).cpu())
        if min_class < 0:
            raise ValueError(f"Target classes are class indices from 0, got {min_class}; remove such segments.")
        if min_index < 0 or max_index > len(classes):
            raise ValueError(
                f"An index map with {len(classes)} classes holds 0 (no segment) to {len(classes)}, got values from "
                f"{min_index} to {max_index}; number the segments in the order of the classes, from 1."
            )
        object.__setattr__(self, "max_class", max_class)

    def __len__(self) -> int:
        return len(self.classes)

    def resized(self, height: int, width: int) -> Bool[Tensor, "N height width"]:
        """Return all masks, resized by nearest neighbor to `height` x `width`, the size of the mask logits."""
        if self.masks.ndim == 3:
            return F.interpolate(self.masks[:, None].view(torch.uint8), (height, width), mode="nearest")[:, 0].bool()
        # The plane is resized before it becomes N masks. float32 represents its integers exactly up to 2^24.
        plane = F.interpolate(self.masks.float()[None, None], (height, width), mode="nearest")[0, 0]
        return plane == torch.arange(1, len(self) + 1, device=plane.device)[:, None, None]

    def selected(self, indices: Int64[Tensor, " M"]) -> Bool[Tensor, "M H W"]:
        """Return the masks at the target indices `indices` (0..N-1) at full size."""
        if self.masks.ndim == 3:
            return self.masks[indices]
        return self.masks == (indices + 1).to(self.masks.dtype)[:, None, None]
