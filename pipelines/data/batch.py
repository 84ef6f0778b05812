"""From an Arrow table of samples to a padded PanopticBatch, and from it to the inputs of model and criterion.

B images, H W padded size, N segments. A batch stays on the host. Images stay uint8, and masks stay one index map per
image, until they are on the training device.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from maskformer import Targets
from maskformer.preprocess import normalize
from maskformer.targets import to_device
from pipelines.data.pixels import index_map_type
from pipelines.data.schema import AUGMENTED, require

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PanopticBatch:
    """A micro-batch, padded on the right and at the bottom to its largest height and width."""

    images: Tensor
    """[B, 3, H, W] uint8, RGB, 0 in the padding."""
    index_maps: Tensor
    """[B, H, W] int32: 0 is void, crowd or padding, k is the image's k-th segment."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each image without the padding."""
    classes: tuple[Tensor, ...]
    """[N] int64 for each image: class index of each segment."""
    positions: tuple[int, ...]
    epochs: tuple[int, ...]
    image_ids: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    """One sentence or two for each image that could not be used: which one and why, and which took its place."""

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "PanopticBatch":
        """Pad and stack a table of the AUGMENTED schema.

        Raises:
            ValueError: the table has another schema or version, or an index map does not fit its classes.
        """
        require(table, AUGMENTED, "A batch from the data stream")
        pixels, maps = table["image"], table["index_map"]  # read in place, not copied as Python's bytes
        rows = table.drop_columns(["image", "index_map"]).to_pylist()
        height, width = max(row["height"] for row in rows), max(row["width"] for row in rows)
        images = np.zeros((len(rows), height, width, 3), np.uint8)
        index_maps = np.zeros((len(rows), height, width), np.int32)
        for index, row in enumerate(rows):
            h, w = row["height"], row["width"]
            images[index, :h, :w] = np.frombuffer(pixels[index].as_buffer(), np.uint8).reshape(h, w, 3)
            dtype = index_map_type(len(row["classes"]))
            index_maps[index, :h, :w] = np.frombuffer(maps[index].as_buffer(), dtype).reshape(h, w)
        batch = cls(
            images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            index_maps=torch.from_numpy(index_maps),
            sizes=tuple((row["height"], row["width"]) for row in rows),
            classes=tuple(torch.tensor(row["classes"], dtype=torch.int64) for row in rows),
            positions=tuple(row["position"] for row in rows),
            epochs=tuple(row["epoch"] for row in rows),
            image_ids=tuple(row["image_id"] for row in rows),
            skipped=tuple(row["skipped"] for row in rows if row["skipped"] is not None),
        )
        batch.targets()  # checks them before the workers agree on a step, of which all or none must take part
        return batch

    def num_masks(self, num_queries: int) -> int:
        """Count the masks that can be matched: at most `num_queries` per image."""
        return sum(min(len(classes), num_queries) for classes in self.classes)

    def inputs(
        self, mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device = _CPU
    ) -> tuple[Tensor, Tensor | None]:
        """Return the model's inputs on `device`: normalized images with 0 in the padding, and the padding mask.

        Returns:
            [B, 3, H, W] float32, and [B, H, W] bool, True in the padding, or None if no image is padded.
        """
        height, width = self.images.shape[-2:]
        padding = padding_mask(self.sizes, (height, width), device)
        images = normalize(to_device(self.images, device), mean, std)
        return (images if padding is None else images.masked_fill_(padding[:, None], 0.0)), padding

    def targets(self, device: torch.device = _CPU) -> list[Targets]:
        """Return each image's segments for the matcher and the criterion, checked on the host, on `device`.

        Raises:
            ValueError: an index map does not fit its classes; the message names the image.
        """
        targets: list[Targets] = []
        for image_id, classes, index_map in zip(self.image_ids, self.classes, self.index_maps, strict=True):
            try:
                targets.append(Targets(classes, index_map).to(device))
            except ValueError as error:
                raise ValueError(f"Image {image_id}: {error}") from None
        return targets


def padding_mask(sizes: tuple[tuple[int, int], ...], padded: tuple[int, int], device: torch.device) -> Tensor | None:
    """Return the padding mask of images of the given sizes: [B, H, W] bool, True in the padding.

    None if no image is padded.
    """
    if all(size == padded for size in sizes):
        return None
    mask = torch.ones(len(sizes), *padded, dtype=torch.bool, device=device)
    for index, (height, width) in enumerate(sizes):
        mask[index, :height, :width] = False
    return mask
