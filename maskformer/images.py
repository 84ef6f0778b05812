"""Read pictures of people: any common format, upright, as 8-bit RGB.

The pictures of a data set are read without their EXIF orientation (`pipelines.data.pixels`), since its annotations were
drawn on the stored pixels. Letters: H W image.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from maskformer.image_files import (
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    OtherFormatError,
    TooLargeError,
    load_image,
    open_image,
    reason_of,
    require_size,
    rgb_pixels,
)
from maskformer.untrusted import NotRegularError, escaped, read_regular

ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""A path, the bytes of a file, a Pillow image, or RGB pixels: uint8 [H, W, 3]."""

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
        max_pixels: refuse a file that declares more, before it is decoded; half of them for WebP and CMYK, which take
            twice the memory.

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
            require_size(source, max_pixels)
            return _pixels(source, name)
    content = source if isinstance(source, bytes) else _content(Path(source), name or str(source))
    name = name or ("The image" if isinstance(source, bytes) else str(Path(source)))
    with _explained(name), open_image(content, max_pixels=max_pixels) as image:
        return _pixels(image, name)


def _content(path: Path, name: str) -> bytes:
    """Return the bytes of a regular file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise UnreadableImageError(f"{escaped(name)} {what}. Give the path of a picture.")
    try:
        return read_regular(path, MAX_BYTES)
    except NotRegularError as error:
        raise UnreadableImageError(
            f"{escaped(name)} cannot be read: {error.strerror}. Give the path of a picture."
        ) from error
    except PermissionError as error:
        raise UnreadableImageError(f"{escaped(name)} may not be read by this user. Change its permissions.") from error
    except OSError as error:
        raise UnreadableImageError(f"{escaped(name)} cannot be read: {error.strerror}. Read it again.") from error
    except ValueError as error:
        raise UnreadableImageError(f"{escaped(name)} is too large: {error}. Make it smaller.") from error


@contextmanager
def _explained(name: str) -> Generator[None]:
    """Turn what is raised for a file that cannot be read into one kind of error, which names the file."""
    try:
        yield
    except UnreadableImageError:
        raise
    except OtherFormatError as error:
        what = f"has the format {error.kind}, so it is" if error.kind else "is"
        known = ", ".join(FORMATS)
        raise UnreadableImageError(
            f"{escaped(name)} {what} no picture of a known format ({known}). Convert it to JPEG or PNG."
        ) from None
    except TooLargeError as error:
        raise UnreadableImageError(f"{escaped(name)} {error}. Make it smaller.") from None
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        raise UnreadableImageError(
            f"{escaped(name)} cannot be decoded ({reason_of(error)}). Replace it by an undamaged copy."
        ) from error


def _pixels(image: Image.Image, name: str) -> UInt8[np.ndarray, "H W 3"]:
    load_image(image)
    orientation = _orientation(image)  # after loading, since Pillow turns a TIFF upright itself
    return rgb_pixels(image, _to_rgb(image, name), _UPRIGHT.get(orientation))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not make the pixels worse
        return 1


def _to_rgb(image: Image.Image, name: str) -> Callable[[Image.Image], Image.Image] | None:
    """Return the conversion of a part of the image to RGB; None for Pillow's own."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
        return _scaled
    if mode in ("I", "F", "LAB"):
        raise UnreadableImageError(
            f"{escaped(name)} has pixels of mode {mode}, whose values have no known range. Convert it to 8 or 16 bits."
        )
    return _on_white if image.has_transparency_data else None


def _scaled(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits."""
    gray = np.asarray(image).astype(np.float32) / 257
    return Image.fromarray(np.clip(gray + 0.5, 0, 255).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over).convert("RGB")
