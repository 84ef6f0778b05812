"""Open image files that may be hostile: no decoder starts but those of listed formats, and none before the size that
the header declares was checked. Whatever a decoder raises becomes a ValueError.

`maskformer.images` reads the pictures of users with it, `pipelines.data.pixels` those of data sets. Letters: H W image.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from maskformer.untrusted import escaped

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are read, by Pillow's names. The decoders of others would be more code that hostile files reach. Of
several pictures in a file the first is read; JPEG includes MPO, which has several."""

MAX_PIXELS = 52_000_000
"""Pixels that a file may declare. The decoders take up to 10 bytes for each, 500 MB, and this module 3 more."""

MAX_BYTES = 2**27
"""Bytes that a file may have."""

_MAX_SCANS, _ALWAYS_SCANS, _MAX_SCANNED = 100, 20, 10**9
"""Scans of a progressive JPEG, how many of them any picture may have, and pixels of all scans together. Each scan
passes over all pixels, and one of ten bytes is possible; encoders write 10."""

_MAX_PARTS = 200_000
"""Parts of a file, such as chunks of a PNG or segments of a JPEG. Decoders keep some of each; pictures have 300."""

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What ends the data of a scan, or stands before a part of a JPEG."""

_BAND = 2**22
"""Pixels that are converted at a time, so that no second copy of a large image is needed."""

_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"%!PS": "EPS",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"%PDF": "PDF",
    b"8BPS": "PSD",
    b"DDS ": "DDS",
    b"BLP1": "BLP",
    b"BLP2": "BLP",
    b"FTEX": "FTEX",
    b"qoif": "QOI",
    b"icns": "ICNS",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"SIMPLE": "FITS",
    b"\x89HDF": "HDF5",
}
"""How files of image formats begin."""


class OtherFormatError(ValueError):
    """A file of another format than those that are read; `kind` names it, or is empty."""

    def __init__(self, kind: str, formats: Sequence[str]) -> None:
        self.kind = kind
        expected = ", ".join(formats)
        super().__init__(f"it is {kind}, not {expected}" if kind else f"no image format that is read: {expected}")


class TooLargeError(ValueError):
    """A file that has or declares too much. The message is a sentence without its subject and its full stop."""


class _Content(io.BytesIO):
    """The content of a file, which is read a limited number of times: a decoder reads each part by itself."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_PARTS:
            raise TooLargeError(f"has more than {_MAX_PARTS:,} parts")
        return super().read(size)


def format_of(content: bytes | memoryview) -> str:
    """Return the name of an image file's format by its first bytes, without a decoder; empty if it is not known."""
    start = bytes(content[:32])
    if start[4:8] == b"ftyp":
        return "AVIF" if start[8:12] in (b"avif", b"avis") else "HEIF"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for begin, kind in _STARTS.items() if start.startswith(begin)), "")


def open_image(
    content: bytes | memoryview, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read the header of an image file, whose pixels are not yet decoded.

    Args:
        formats: that are read, by Pillow's names. No code of another format is started.
        max_pixels: that the header may declare; half of them for WebP and CMYK, which take twice the memory.

    Raises:
        OtherFormatError: it is of another format.
        TooLargeError: it declares too many pixels or scans, or has too many parts.
        ValueError: the header is damaged.
    """
    if len(content) > MAX_BYTES:
        raise TooLargeError(f"has {len(content):,} bytes, more than {MAX_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is `max_pixels`
            image = Image.open(_Content(content), formats=list(formats))
        extra = _extra_pixels(image)
    except TooLargeError:
        raise
    except UnidentifiedImageError:  # its own message has a memory address
        if (kind := format_of(content)) in formats:
            raise ValueError(f"the header of the {kind} is damaged") from None
        raise OtherFormatError(kind, formats) from None
    except Image.DecompressionBombError:
        raise TooLargeError("declares too many pixels") from None
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        raise ValueError(reason_of(error)) from error
    require_size(image, max_pixels)
    if extra > max_pixels:
        raise TooLargeError(f"declares parts of {extra:,} pixels, more than {max_pixels:,}")
    require_few_scans(content)
    return image


def load_image(image: Image.Image) -> None:
    """Decode the pixels of an opened image.

    Raises:
        ValueError: they cannot be decoded, or they are too many for the memory.
    """
    try:
        image.load()
    except TooLargeError as error:
        raise ValueError(f"it {error}") from error
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        raise ValueError(reason_of(error)) from error


def require_few_scans(content: bytes | memoryview) -> None:
    """Raise TooLargeError if the content is a JPEG with more scans or markers than a picture has."""
    if bytes(content[:2]) != b"\xff\xd8":
        return
    markers, scans, pixels, place, progressive, components = 0, 0, 1, 2, False, b""
    while marker := _MARKER.search(content, place):
        kind, place = marker[0][-1], marker.end()
        markers += 1
        if markers > _MAX_PARTS:
            raise TooLargeError(f"has more than {_MAX_PARTS:,} parts")
        if kind == 0xD9:  # the end of the picture
            return
        if kind in range(0xC0, 0xD0) and kind not in (0xC4, 0xC8, 0xCC):  # a frame
            progressive, components = kind & 3 == 2, bytes(content[place + 7 : place + 8])
            sides = (int.from_bytes(content[start : start + 2], "big") for start in (place + 3, place + 5))
            pixels = max(pixels, math.prod(sides))
        elif kind == 0xDA:
            scans += 1
            if not progressive and bytes(content[place + 2 : place + 3]) == components:
                return  # all components are in one scan, after which decoders stop
            allowed = max(_ALWAYS_SCANS, min(_MAX_SCANS, _MAX_SCANNED // pixels))
            if scans > allowed:
                raise TooLargeError(f"is a JPEG of more than {allowed} scans")
        if kind not in (0x01, 0xD8):  # those have no length
            place += int.from_bytes(content[place : place + 2], "big")


def rgb_pixels(
    image: Image.Image,
    convert: Callable[[Image.Image], Image.Image] | None = None,
    transposed: Image.Transpose | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the pixels of a decoded image as RGB, in a new array.

    Args:
        convert: maps a part of the image to the mode RGB. By default Pillow's own conversion.
        transposed: how to turn or mirror the image.
    """
    width, height = image.size
    turned = transposed in _SIDES_EXCHANGED
    pixels = np.empty((width, height, 3) if turned else (height, width, 3), np.uint8)
    stored = pixels if transposed is None else _stored(pixels, transposed)
    rows = max(1, _BAND // max(1, width))
    for top in range(0, height, rows):
        part = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        if part.mode != "RGB":
            part = convert(part) if convert is not None else part.convert("RGB")
        stored[top : top + rows] = np.asarray(part)
    return pixels


_SIDES_EXCHANGED = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def _stored(pixels: np.ndarray, transposed: Image.Transpose) -> np.ndarray:
    """Return the view of an upright image in which its pixels lie as they are stored."""
    match transposed:
        case Image.Transpose.FLIP_LEFT_RIGHT:
            return pixels[:, ::-1]
        case Image.Transpose.ROTATE_180:
            return pixels[::-1, ::-1]
        case Image.Transpose.FLIP_TOP_BOTTOM:
            return pixels[::-1]
        case Image.Transpose.TRANSPOSE:
            return pixels.swapaxes(0, 1)
        case Image.Transpose.ROTATE_270:  # clockwise by 90 degrees
            return pixels[:, ::-1].swapaxes(0, 1)
        case Image.Transpose.TRANSVERSE:
            return pixels[::-1, ::-1].swapaxes(0, 1)
        case Image.Transpose.ROTATE_90:
            return pixels[::-1].swapaxes(0, 1)


def reason_of(error: Exception) -> str:
    """Return why a file cannot be decoded, as a part of a sentence."""
    return escaped(" ".join(str(error).split()), 200).rstrip(".") or type(error).__name__


def require_size(image: Image.Image, max_pixels: int) -> None:
    """Raise TooLargeError if an image has too many pixels, and ValueError if it has none."""
    width, height = image.size
    allowed = max_pixels // 2 if image.format == "WEBP" or image.mode == "CMYK" else max_pixels
    if width * height > allowed:
        raise TooLargeError(f"has {width} x {height} pixels, more than {allowed:,}")
    if width < 1 or height < 1:
        raise ValueError("it has no pixels")


def _extra_pixels(image: Image.Image) -> int:
    """Return for how many pixels a decoder may take memory in addition to the image's, however small it is."""
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        return int(tags.get(322, 0)) * int(tags.get(323, 0))  # a tile
    if image.format == "BMP" and image.info.get("compression") in (1, 2):  # run lengths
        return 255 * image.width  # they can skip so many rows, beyond the end of the image
    return 0
