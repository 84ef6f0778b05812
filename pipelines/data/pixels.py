"""The pixels of one annotated image: decode its two files, number the segments that are targets, store the numbers.

A panoptic PNG holds segment ids, R + 256 G + 65536 B, where 0 is void (cocodataset.org/#format-data, 4).
H W image, N numbered segments, R runs of equal ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
from PIL import Image
from PIL.ImageFile import ImageFile

from maskformer.image_files import (
    MAX_PIXELS,
    TooLargeError,
    load_image,
    open_image,
    require_few_scans,
    rgb_pixels,
)
from maskformer.taxonomy import Taxonomy
from pipelines.data.coco import Segment

_ZSTD = pa.Codec("zstd")
_BAND = 2**22  # pixels that are converted at a time, so that a large map needs no further copy
FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats of the images of a data set, by Pillow's names."""

MAX_SEGMENTS = 2**16 - 1
"""Segments that an index map can number."""

MAX_RUNS = 2**22
"""Runs of equal ids in a panoptic map, each of which takes 60 bytes while they are counted. The maps of COCO have
runs of 20 pixels or more on average; a map of fewer pixels than this may have any."""


def decode_image(content: bytes | memoryview) -> npt.NDArray[np.uint8]:
    """Decode an image file to uint8 [H, W, 3] RGB; gray and CMYK become RGB.

    An EXIF orientation is not applied: COCO's annotations were drawn on the stored pixels.

    Raises:
        ValueError: the bytes are not a complete image of one of `FORMATS`, declare too many pixels, or have more than 8
            bits per channel and no color.
    """
    pixels = _decode_jpeg(content)
    if pixels is None:
        image = _opened(content, FORMATS)
        if image.mode.startswith(("I", "F")):  # Pillow's conversion would saturate; `checks` reports such an image
            raise ValueError("it is gray with more than 8 bits per channel; convert it to 8 bits")
        pixels = rgb_pixels(_loaded(image))
    return pixels


def image_size(content: bytes | memoryview, formats: tuple[str, ...] = FORMATS) -> tuple[int, int]:
    """Return height and width of an image file from its header.

    Raises:
        ValueError: it is no image of these formats, or too large.
    """
    image = _opened(content, formats)
    return image.height, image.width


def decode_panoptic(content: bytes | memoryview, size: tuple[int, int] | None = None) -> npt.NDArray[np.int32]:
    """Decode a panoptic PNG to segment ids, int32 [H, W]; 0 is void.

    Args:
        size: height and width that it must have, if they are known; compared before anything is decoded.

    Raises:
        ValueError: the bytes are not a complete PNG of this size with three 8-bit channels, or declare too many pixels.
    """
    image = _opened(content, ("PNG",))
    depth = png_depth(image)
    if image.mode != "RGB" or depth != 8:
        raise ValueError(f"it is a PNG of mode {image.mode} with {depth} bits, not a PNG of mode RGB with 8 bits")
    if size is not None and (image.height, image.width) != size:
        raise ValueError(f"the PNG is {image.width} x {image.height}, but its image {size[1]} x {size[0]}")
    return panoptic_ids(_loaded(image))


def png_depth(image: Image.Image) -> int:
    """Return the bits per channel of an opened PNG, which is not yet decoded. Of 16, Pillow would read the upper 8."""
    # Pillow's own name of what it will decode, such as "RGB", "RGB;16B" or "P;4". The bytes of the file could tell of
    # another header than the one that Pillow uses.
    tiles = image.tile if isinstance(image, ImageFile) else []
    mode, _, bits = str(tiles[0].args if tiles else "").partition(";")
    return int(bits.rstrip("B")) if bits else 1 if mode == "1" else 8


def panoptic_ids(image: Image.Image) -> npt.NDArray[np.int32]:
    """Return the segment ids of a decoded PNG of mode RGB, int32 [H, W]."""
    ids = np.empty((image.height, image.width), np.int32)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        part = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        # Pillow keeps RGB in four bytes a pixel. As a number of 32 bits, they are the id, as `decode_ids` computes it.
        packed = np.frombuffer(part.tobytes("raw", "RGBX"), "<u4").reshape(part.height, part.width)
        np.bitwise_and(packed, 0xFFFFFF, out=ids[top : top + rows].view(np.uint32))
    return ids


def index_map(
    ids: npt.NDArray[np.int32], segments: Sequence[Segment], taxonomy: Taxonomy
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int16]]:
    """Return the index map of one image: k on the pixels of the k-th segment, 0 on void and crowds.

    Things come first, in the order of `segments`; then stuff in ascending class index, with all segments of a class
    merged into one. Segments without pixels are not numbered.

    Args:
        ids: [H, W] segment ids.

    Returns:
        The index map, uint16 [H, W], and the class index of each number, int16 [N].

    Raises:
        ValueError: there are more segments to number than MAX_SEGMENTS.
    """
    values, run_of_value, runs = pixel_runs(ids)
    present = set(values.tolist())
    things: list[tuple[int, int]] = []
    stuff: dict[int, list[int]] = {}
    for segment in segments:
        if segment["iscrowd"] or segment["id"] not in present:
            continue
        class_index = taxonomy.class_index(segment["category_id"])
        if taxonomy.is_thing(class_index):
            things.append((class_index, segment["id"]))
        else:
            stuff.setdefault(class_index, []).append(segment["id"])
    targets = [(class_index, [identifier]) for class_index, identifier in things] + sorted(stuff.items())
    if len(targets) > MAX_SEGMENTS:
        raise ValueError(f"it has {len(targets)} segments, but an index map can number {MAX_SEGMENTS}")

    number_of = {identifier: number for number, (_, members) in enumerate(targets, 1) for identifier in members}
    numbers = np.array([number_of.get(value, 0) for value in values.tolist()], np.uint16)
    classes = np.array([class_index for class_index, _ in targets], np.int16)
    return np.repeat(numbers[run_of_value], runs.length).reshape(ids.shape), classes


def compress_index_map(plane: npt.NDArray[np.uint16], num_segments: int) -> bytes:
    """Return the bytes of an index map in a pack: in the smallest type, compressed."""
    return _ZSTD.compress(plane.astype(index_map_type(num_segments)).tobytes(), asbytes=True)


def decompress_index_map(
    content: bytes | memoryview, size: tuple[int, int], num_segments: int
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Return the index map [H, W] that `compress_index_map` compressed, read-only.

    Raises:
        ValueError: the bytes are not an index map of this height and width.
    """
    dtype = index_map_type(num_segments)
    try:
        plain = _ZSTD.decompress(content, decompressed_size=size[0] * size[1] * dtype.itemsize)
        return np.frombuffer(plain, dtype).reshape(size)
    except (OSError, ValueError) as error:
        raise ValueError(f"its index map is not one of {size[1]} x {size[0]} pixels ({error})") from error


def index_map_type(num_segments: int) -> np.dtype[Any]:
    """Return the smallest type of an index map's numbers that a pack and a batch use."""
    return np.dtype(np.uint8 if num_segments <= 255 else "<u2")


@dataclass(frozen=True)
class Runs:
    """Runs of equal ids within rows of the image, in raster order: start and length as int arrays [R]."""

    y: npt.NDArray[np.intp]
    x: npt.NDArray[np.intp]
    length: npt.NDArray[np.intp]


def pixel_runs(
    ids: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp], Runs]:
    """Return the run-length encoding of an id map. Runs number a few percent of the pixels, so using them is cheap.

    Args:
        ids: [H, W] segment ids.

    Returns:
        The ids that occur, ascending; for each run the index of its id among them; the runs.

    Raises:
        ValueError: there are more than MAX_RUNS.
    """
    width = ids.shape[1]
    starts = np.ones(ids.shape, bool)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=starts[:, 1:])
    if ids.size > MAX_RUNS and (count := np.count_nonzero(starts)) > MAX_RUNS:
        raise ValueError(f"it has {count:,} runs of equal ids, more than {MAX_RUNS:,}, so it is no map of segments")
    start = np.flatnonzero(starts)
    values, run_of_value = np.unique(ids.ravel()[start], return_inverse=True)
    y, x = np.divmod(start, width)
    return values, run_of_value, Runs(y, x, np.diff(start, append=ids.size))


def _decode_jpeg(content: bytes | memoryview) -> npt.NDArray[np.uint8] | None:
    """Decode a flawless JPEG of a common kind to the pixels that Pillow gives, faster; None for any other content."""
    if bytes(content[:3]) != b"\xff\xd8\xff":
        return None
    try:
        require_few_scans(content)
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors in ("YCbCr", "Gray") and int(height) * int(width) <= MAX_PIXELS:
            return simplejpeg.decode_jpeg(content)
    # Also for what the decoder could recover from; what to do about it is up to Pillow.
    except (ValueError, MemoryError):
        pass
    return None


def _opened(content: bytes | memoryview, formats: tuple[str, ...]) -> Image.Image:
    try:
        return open_image(content, formats)
    except TooLargeError as error:
        raise ValueError(f"it cannot be decoded (it {error})") from error
    except ValueError as error:
        raise ValueError(f"it cannot be decoded ({error})") from error


def _loaded(image: Image.Image) -> Image.Image:
    try:
        load_image(image)
    except ValueError as error:
        raise ValueError(f"it cannot be decoded ({error})") from error
    return image
