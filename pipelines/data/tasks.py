"""What a Ray Data task of a stream does: read packed rows, decode them, augment or resize them, return an Arrow table.

The operators are plain callables, which need no Ray.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from maskformer.preprocess import resize_image, resized_shape
from pipelines.data.augment import Sample, augment, sample_rng
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_image, decompress_index_map, index_map_type
from pipelines.data.reading import PACK_AGAIN, UnusableRowError, read_files, unusable
from pipelines.data.schema import AUGMENTED, RESIZED
from pipelines.errors import UserError
from pipelines.storage import patience

_REPLACEMENTS, _REPLACEMENTS_PER_SHARD = 12, 4
"""Images to try in place of one that cannot be read. A whole shard may be missing, hence the limit per shard."""


@dataclass(frozen=True)
class LoadAndAugment:
    """Maps positions to AUGMENTED rows in the same order."""

    samples: PackedSet
    seed: int
    config: AugmentConfig
    patience: float
    """Seconds to wait for a storage that does not answer."""
    skip: bool
    """Whether the next usable image takes the place of one that cannot be used; otherwise it is an error."""

    def __call__(self, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> pa.Table:
        """Return the AUGMENTED rows of samples.

        Args:
            positions: [N] in the order of samples.
            epochs: [N] the epoch of each.
            indices: [N] the index of each in `samples`.
        """
        entries = self.samples.index.take(indices).drop_columns(["file_name", "segments"]).to_pylist()
        with patience(self.patience):
            rows = [
                self._augmented(entry, int(position), int(epoch), int(index))
                for entry, position, epoch, index in zip(entries, positions, epochs, indices, strict=True)
            ]
        return augmented_table(rows)

    def _augmented(self, entry: dict[str, Any], position: int, epoch: int, index: int) -> dict[str, Any]:
        image_id, skipped = entry["image_id"], None
        try:
            sample = self._load(entry)
        except UnusableRowError as error:
            if not self.skip:
                hint = f"{PACK_AGAIN}, or use --data.damaged skip to train on other images in its place."
                raise UserError(f"{error}. {hint}") from error
            image_id, sample = self._replacement(index, error)
            skipped = f"{error}. Image {image_id} took its place."
        sample = augment(sample, sample_rng(self.seed, epoch, image_id), self.config)
        return augmented_row(sample, position, epoch, image_id, skipped)

    def _load(self, entry: Mapping[str, Any]) -> Sample:
        shard = self.samples.shards[entry["shard"]]
        image, index_map = read_files(shard, entry, "image", "index_map")
        try:
            return decoded_sample(image, index_map, entry)
        except ValueError as error:
            raise unusable(shard, entry, error) from error

    def _replacement(self, index: int, error: UnusableRowError) -> tuple[int, Sample]:
        """Return the next image that can be used, with its id."""
        tried = following(self.samples.shard, index)
        for entry in self.samples.index.take(tried).to_pylist():
            try:
                return entry["image_id"], self._load(entry)
            except UnusableRowError:
                continue
        raise UserError(f"{error}. Nor can {len(tried)} images after it be used in its place. {PACK_AGAIN}.") from error


def decoded_sample(image: bytes | memoryview, index_map: bytes | memoryview, entry: Mapping[str, Any]) -> Sample:
    """Decode the files of a packed row for training.

    Args:
        entry: its `height`, `width` and `classes`.

    Raises:
        ValueError: they cannot be decoded, or differ in size.
    """
    pixels = decode_image(image)
    plane = decompress_index_map(index_map, (entry["height"], entry["width"]), len(entry["classes"]))
    if pixels.shape[:2] != plane.shape:
        raise ValueError(f"its image has the size {pixels.shape[:2]}, and its index map {plane.shape}")
    if (largest := int(plane.max())) > len(entry["classes"]):
        raise ValueError(f"its index map has the number {largest}, but the image has {len(entry['classes'])} segments")
    return Sample(pixels, plane, np.array(entry["classes"], np.int16))


def augmented_row(
    sample: Sample, position: int, epoch: int, image_id: int, skipped: str | None = None
) -> dict[str, Any]:
    """Return the AUGMENTED row of a sample, with arrays as its files."""
    return {
        "position": position,
        "epoch": epoch,
        "image_id": image_id,
        "height": sample.image.shape[0],
        "width": sample.image.shape[1],
        "image": np.ascontiguousarray(sample.image),
        "index_map": np.ascontiguousarray(sample.index_map, index_map_type(len(sample.classes))),
        "classes": sample.classes,
        "skipped": skipped,
    }


def augmented_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return the table of rows of `augmented_row`, which takes over the memory of their arrays.

    So pixels are copied once, into Ray's object store.
    """
    columns = [
        _taken_over([row[field.name] for row in rows])
        if field.type == pa.large_binary()
        else pa.chunked_array([pa.array([row[field.name] for row in rows], field.type)])
        for field in AUGMENTED
    ]
    return pa.table(columns, schema=AUGMENTED)


def _taken_over(arrays: list[np.ndarray]) -> pa.ChunkedArray:
    """Return a binary column with the memory of each array as a chunk."""
    chunks: list[pa.Array] = []
    for array in arrays:
        offsets = pa.py_buffer(np.array([0, array.nbytes], np.int64))
        chunks.append(pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(array)]))
    return pa.chunked_array(chunks, pa.large_binary())


def following(shard: np.ndarray, index: int) -> list[int]:
    """Return the indices, after `index` and then from 0 on, of the images to try in its place.

    Args:
        shard: [N] the shard of each image.
    """
    found: list[int] = []
    of_shard: Counter[int] = Counter()
    for other in itertools.chain(range(index + 1, len(shard)), range(index)):
        of_shard[shard[other]] += 1
        if of_shard[shard[other]] <= _REPLACEMENTS_PER_SHARD:
            found.append(other)
        if len(found) == _REPLACEMENTS:
            break
    return found


@dataclass(frozen=True)
class LoadAndResize:
    """Maps indices of images to RESIZED rows in the same order."""

    samples: PackedSet
    short_side: int
    long_side: int
    patience: float
    """Seconds to wait for a storage that does not answer."""

    def __call__(self, indices: np.ndarray) -> pa.Table:
        """Return the RESIZED rows of the images at `indices` [N] of `samples`."""
        with patience(self.patience):
            rows = [self._resized(entry) for entry in self.samples.index.take(indices).to_pylist()]
        return pa.Table.from_pylist(rows, schema=RESIZED)

    def _resized(self, entry: dict[str, Any]) -> dict[str, Any]:
        shard = self.samples.shards[entry["shard"]]
        try:
            panoptic, image = read_files(shard, entry, "panoptic", "image")
            pixels = decode_image(image)
            if pixels.shape[:2] != (entry["height"], entry["width"]):
                found = f"{pixels.shape[1]} x {pixels.shape[0]}"
                raise ValueError(f"its image is {found}, and the index says {entry['width']} x {entry['height']}")
        except UnusableRowError as error:
            raise UserError(f"{error}. {PACK_AGAIN}.") from error
        except ValueError as error:
            raise UserError(f"{unusable(shard, entry, error)}. {PACK_AGAIN}.") from error
        shape = resized_shape(entry["height"], entry["width"], self.short_side, self.long_side)
        return {
            "image_id": entry["image_id"],
            "file_name": entry["file_name"],
            "height": shape[0],
            "width": shape[1],
            "image": resize_image(pixels, shape).data.cast("B"),
            "original_height": entry["height"],
            "original_width": entry["width"],
            "panoptic": panoptic,
            "segments": entry["segments"],
        }
