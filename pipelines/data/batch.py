"""Arrow batch -> padded PanopticBatch -> what the model and the criterion take.

B images, H W padded size, N segments. Images stay uint8 and masks stay one index plane until they are on the
training device.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from maskformer import Targets
from maskformer.inference import normalise
from pipelines.data.schema import AUGMENTED, require


@dataclass(frozen=True)
class PanopticBatch:
    """A micro-batch, padded at the right and the bottom to its largest image."""

    images: Tensor
    """[B, 3, H, W] uint8, RGB, 0 in the padding."""
    index_maps: Tensor
    """[B, H, W] int32: 0 is void, crowd or padding, k the image's k-th segment."""
    sizes: tuple[tuple[int, int], ...]
    """Valid height and width of each image."""
    classes: tuple[Tensor, ...]
    """[N] int64 for each image."""
    positions: tuple[int, ...]
    epochs: tuple[int, ...]
    image_ids: tuple[int, ...]

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "PanopticBatch":
        """Pad and stack a table of the AUGMENTED schema.

        Raises:
            ValueError: the table has another schema or version.
        """
        require(table, AUGMENTED, "A batch from the data stream")
        rows = table.to_pylist()
        height, width = max(row["height"] for row in rows), max(row["width"] for row in rows)
        images = np.zeros((len(rows), height, width, 3), np.uint8)
        index_maps = np.zeros((len(rows), height, width), np.int32)
        for place, row in enumerate(rows):
            h, w = row["height"], row["width"]
            images[place, :h, :w] = np.frombuffer(row["image"], np.uint8).reshape(h, w, 3)
            index_maps[place, :h, :w] = np.frombuffer(row["index_map"], "<u2").reshape(h, w)
        return cls(
            images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            index_maps=torch.from_numpy(index_maps),
            sizes=tuple((row["height"], row["width"]) for row in rows),
            classes=tuple(torch.tensor(row["classes"], dtype=torch.int64) for row in rows),
            positions=tuple(row["position"] for row in rows),
            epochs=tuple(row["epoch"] for row in rows),
            image_ids=tuple(row["image_id"] for row in rows),
        )

    def to(self, device: torch.device) -> "PanopticBatch":
        """Copy the tensors to `device`."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            index_maps=self.index_maps.to(device, non_blocking=True),
            classes=tuple(classes.to(device, non_blocking=True) for classes in self.classes),
        )

    def num_masks(self, num_queries: int) -> int:
        """Count the masks that will be matched: an image has at most `num_queries`."""
        return sum(min(len(classes), num_queries) for classes in self.classes)

    def inputs(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> tuple[Tensor, Tensor | None]:
        """Return the model's inputs: normalised images with 0 in the padding, and the padding or None.

        Shapes: [B, 3, H, W] float32 and [B, H, W] bool, True outside the image.
        """
        height, width = self.images.shape[-2:]
        padding = padding_mask(self.sizes, (height, width), self.images.device)
        images = normalise(self.images, mean, std)
        return (images if padding is None else images.masked_fill_(padding[:, None], 0.0)), padding

    def targets(self) -> list[Targets]:
        """Return each image's segments for the matcher and the criterion."""
        return [Targets(classes, masks) for classes, masks in zip(self.classes, self.index_maps, strict=True)]


def padding_mask(sizes: tuple[tuple[int, int], ...], padded: tuple[int, int], device: torch.device) -> Tensor | None:
    """Return [B, H, W] bool, True outside each image; None if no image is padded."""
    if all(size == padded for size in sizes):
        return None
    mask = torch.ones(len(sizes), *padded, dtype=torch.bool, device=device)
    for place, (height, width) in enumerate(sizes):
        mask[place, :height, :width] = False
    return mask
