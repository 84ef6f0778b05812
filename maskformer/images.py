"""Read pictures of people: any common format, upright, as 8-bit RGB.

The pictures of a data set are read without their EXIF orientation (`pipelines.data.pixels`), since its annotations were
drawn on the stored pixels. Letters: H W image.
"""

import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from maskformer.untrusted import escaped

ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""A path, the bytes of a file, a Pillow image, or RGB pixels: uint8 [H, W, 3]."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are read, by Pillow's names. Others would give more code access to files that nobody has checked. Of
several pictures in a file the first is read; JPEG includes MPO, which has several."""

MAX_PIXELS = 100_000_000
"""Pixels that a file may declare, which take 300 MB."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""


class UnreadableImageError(ValueError):
    """A picture that cannot be read; the message names it and says what to do."""


def read_image(source: ImageSource, *, name: str = "", max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Return the pixels of a picture as RGB, upright by its EXIF orientation.

    Gray becomes three equal channels; 16-bit gray is scaled to 8 bits. Transparent parts become white. CMYK is
    converted without a color profile. Arrays are returned as they are.

    Args:
        name: of the picture, for messages; by default its path.
        max_pixels: refuse a file that declares more, before it is decoded.

    Raises:
        UnreadableImageError: it does not exist, is damaged, too large or of another format, or its values have no known
            range.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise UnreadableImageError(
                f"An array of pixels is uint8 [H, W, 3] in RGB, got {source.dtype} {list(source.shape)}. Convert it."
            )
        return source
    if isinstance(source, Image.Image):
        name = name or str(getattr(source, "filename", "")) or "The image"
        with _explained(name):
            return _pixels(source, name, max_pixels)
    if not isinstance(source, bytes):
        path = Path(source)
        name = name or str(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UnreadableImageError(f"{escaped(name)} {what}. Give the path of a picture.")
    name = name or "The image"
    with _explained(name), _opened(source) as image:
        return _pixels(image, name, max_pixels)


@contextmanager
def _opened(source: str | Path | bytes) -> Generator[Image.Image]:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is `max_pixels`
        opened = Image.open(file, formats=FORMATS)
    with opened:
        yield opened


@contextmanager
def _explained(name: str) -> Generator[None]:
    """Turn what Pillow raises for a file that it cannot read into one kind of error, which names the file."""
    try:
        yield
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise UnreadableImageError(
            f"{escaped(name)} is no picture of a known format ({known}). Convert it to JPEG or PNG."
        ) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{escaped(name)} declares too many pixels. Make it smaller.") from error
    except PermissionError as error:
        raise UnreadableImageError(f"{escaped(name)} may not be read by this user. Change its permissions.") from error
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        reason = escaped(" ".join(str(error).split())[:200]) or type(error).__name__
        raise UnreadableImageError(
            f"{escaped(name)} cannot be decoded ({reason}). Replace it by an undamaged copy."
        ) from error


def _pixels(image: Image.Image, name: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"{escaped(name)} has {width} x {height} pixels, more than {max_pixels:,}. Make it smaller, or "
            f"raise max_pixels."
        )
    if 0 in image.size:
        raise UnreadableImageError(f"{escaped(name)} has no pixels. Give a picture.")
    image.load()
    orientation = _orientation(image)  # after loading, since Pillow turns a TIFF upright itself
    upright = _rgb(image, name)
    if orientation in _UPRIGHT:
        upright = upright.transpose(_UPRIGHT[orientation])
    return np.array(upright)  # a copy, since Pillow's own buffer is read-only


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not make the pixels worse
        return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
        gray = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(np.clip(gray + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F", "LAB"):
        raise UnreadableImageError(
            f"{escaped(name)} has pixels of mode {mode}, whose values have no known range. Convert it to 8 or 16 bits."
        )
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")
