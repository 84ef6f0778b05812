"""Pictures of every kind, against the pixels that they were made from."""

import contextlib
import io
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from maskformer.images import UnreadableImageError, read_image

RAMP = np.arange(0, 240, dtype=np.uint8).reshape(20, 12)
RGB = np.random.default_rng(0).integers(0, 256, (20, 12, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_sources_of_a_picture_give_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    path = tmp_path / "a\n\x1b[31m.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), image, Image.open(path), RGB):
        assert np.array_equal(read_image(source), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(Image.fromarray(RGB), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert expected.shape == ((20, 12, 3) if orientation < 5 else (12, 20, 3))
    assert np.array_equal(read_image(content), expected)
    assert np.array_equal(read_image(Image.open(io.BytesIO(content))), expected)


def test_a_damaged_exif_block_does_no_harm() -> None:
    exif = b"Exif\0\0MM\0*" + b"\xff" * 40
    content = encoded(Image.fromarray(RGB), "JPEG", exif=exif)
    assert read_image(content).shape == RGB.shape


def gray16() -> Image.Image:
    return Image.fromarray(RAMP.astype(np.uint16) * 257)


GRAY = np.repeat(RAMP[..., None], 3, axis=2)
KINDS: dict[str, tuple[Callable[[], Image.Image], str, np.ndarray]] = {
    "gray": (lambda: Image.fromarray(RAMP), "PNG", GRAY),
    "gray of 16 bits": (gray16, "PNG", GRAY),
    "gray of 16 bits in a TIFF": (gray16, "TIFF", GRAY),
    "black and white": (lambda: Image.fromarray(RAMP > 99), "PNG", np.where(GRAY > 99, 255, 0)),
    "palette": (lambda: Image.fromarray(RAMP).convert("P"), "GIF", GRAY),
    "CMYK": (lambda: Image.fromarray(RGB).convert("CMYK"), "TIFF", RGB),
    "BMP": (lambda: Image.fromarray(RGB), "BMP", RGB),
    "opaque": (lambda: Image.fromarray(np.dstack([RGB, np.full((20, 12), 255, np.uint8)])), "PNG", RGB),
    "transparent": (
        lambda: Image.fromarray(np.dstack([RGB, np.zeros((20, 12), np.uint8)])),
        "PNG",
        np.full_like(RGB, 255),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_mode_becomes_rgb(name: str) -> None:
    make, kind, expected = KINDS[name]
    assert np.array_equal(read_image(encoded(make(), kind)), expected)


def test_of_several_pictures_the_first_is_read() -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    for kind in ("TIFF", "MPO"):
        content = encoded(first, kind, save_all=True, append_images=[second])
        assert (
            abs(read_image(content).astype(int) - read_image(encoded(first, "JPEG" if kind == "MPO" else kind))).max()
            < 3
        )


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)), "JPEG")
    icon = encoded(Image.fromarray(RGB), "ICO")
    bad = {
        "none.jpg": (None, "does not exist"),
        "half.jpg": (whole[: len(whole) // 2], "cannot be decoded"),
        "empty.png": (b"", "no picture of a known format"),
        "page.jpg": (b"<html>", "no picture of a known format"),
        "icon.png": (icon, "no picture of a known format"),
        "float.tif": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "no known range"),
    }
    for name, (content, message) in bad.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UnreadableImageError, match=message) as error:
            read_image(path)
        assert str(path) in str(error.value)
    with pytest.raises(UnreadableImageError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(UnreadableImageError) as error:
        read_image(tmp_path / "a\nb\x1b[31m.jpg")
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged metadata
def test_damaged_bytes_are_never_another_error() -> None:
    rng = np.random.default_rng(0)
    for kind, _ in itertools.product(("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"), range(40)):
        content = bytearray(encoded(Image.fromarray(RGB), kind))
        for place in rng.integers(0, len(content), 4):
            content[place] = rng.integers(256)
        with contextlib.suppress(UnreadableImageError):
            read_image(bytes(content), max_pixels=10_000)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    content = encoded(Image.fromarray(RGB))
    with pytest.raises(UnreadableImageError, match=r"x\.png has 12 x 20 pixels, more than 100"):
        read_image(content, name="x.png", max_pixels=100)
    size = (60_000).to_bytes(4, "big")
    header = content[12:16] + size + size + content[24:29]
    declared = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    with pytest.raises(UnreadableImageError, match="declares too many pixels"):  # by Pillow's own limit
        read_image(declared, max_pixels=10**10)


@pytest.mark.parametrize("array", [RGB[..., 0], RGB.astype(np.float32), RGB[:0], RGB[..., :2]])
def test_arrays_must_be_rgb_pixels(array: np.ndarray) -> None:
    with pytest.raises(UnreadableImageError, match=r"uint8 \[H, W, 3\]"):
        read_image(array)
