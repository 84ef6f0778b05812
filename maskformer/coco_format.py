"""COCO's encodings of a segmentation: segment ids as the colors of a PNG, and a mask as run lengths.

Source: cocodataset.org/#format-data and #format-results. Letters: H W image.
"""

import numpy as np
from jaxtyping import Bool, Int32, Integer, UInt8


def encode_ids(ids: Integer[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Encode an index map as the RGB image of a COCO panoptic PNG: id = R + 256 G + 65536 B.

    Raises:
        ValueError: an id is negative or needs more than 24 bits.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(
            f"A panoptic PNG holds ids in 0..{(1 << 24) - 1}, got {ids.min()}..{ids.max()}; renumber the segments."
        )
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


def decode_ids(rgb: UInt8[np.ndarray, "H W 3"]) -> Int32[np.ndarray, "H W"]:
    """Decode the RGB image of a COCO panoptic PNG to its index map."""
    red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
    return red + (green << 8) + (blue << 16)


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> dict[str, list[int]]:
    """Encode a mask as COCO's uncompressed RLE: `size` [H, W] and `counts`.

    The counts are the lengths of the runs of equal pixels in column-major order. The first run is outside the mask; its
    length is 0 if the first pixel is inside.
    """
    pixels = np.ravel(mask, order="F")
    starts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(starts, prepend=0, append=pixels.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}
