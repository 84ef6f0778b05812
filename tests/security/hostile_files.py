"""Files that a stranger may send, made by code: pictures that are bombs or of other formats, FIFOs, devices, links."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Maker = Callable[[], bytes]

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n%%EndComments\n0 0 30 30 rectfill\nshowpage\n%%EOF\n"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(width: int = 32, height: int = 24, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def noise(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def varint(value: int) -> bytes:
    """Return a number from 0 on as Thrift's compact protocol, that of Parquet, writes it."""
    value, digits = 2 * value, bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *before: bytes, data: bytes | None = None, depth: int = 8, color: int = 2) -> bytes:
    """Return a PNG of black pixels, or of other compressed data, with chunks before it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    if data is None:
        data = zlib.compress(bytes((1 + width * 3 * depth // 8) * height), 1)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_bomb(kind: bytes) -> bytes:
    """Return a chunk of a few kilobytes that expands to 64 MB."""
    packed = zlib.compress(bytes(64 * 2**20), 9)
    head = {b"zTXt": b"key\0\0", b"iCCP": b"icc\0\0", b"iTXt": b"key\0\1\0\0\0"}[kind]
    return chunk(kind, head + packed)


def jpeg_of_size(width: int, height: int) -> bytes:
    """Return a small JPEG that declares another size."""
    content = bytearray(encoded(noise(), "JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def jpeg_of_scans(number: int, width: int = 6000, height: int = 4000) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    content = encoded(plain(width, height), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * number + content[-2:]


def jpeg_of_markers(number: int) -> bytes:
    """Return a progressive JPEG with markers that have no length (TEM) behind its first scan."""
    content = encoded(noise(), "JPEG", progressive=True)
    second = content.index(b"\xff\xda", content.index(b"\xff\xda") + 2)
    return content[:second] + b"\xff\x01" * number + content[second:]


def jpeg_with(place: int, value: int) -> bytes:
    """Return a JPEG with another byte in its frame header: 4 is the precision, 9 the number of components."""
    content = bytearray(encoded(noise(), "JPEG"))
    content[content.index(b"\xff\xc0") + place] = value
    return bytes(content)


def tiff(entries: list[tuple[int, int, int, int]], extra: bytes = b"") -> bytes:
    """Return a little-endian TIFF of one folder of entries: tag, type, count, value."""
    folder = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8) + folder + bytes(4) + extra


def tiff_of_tiles(side: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels in one tile that expands to side x side."""
    data = zlib.compress(bytes(side * side), 9)
    start = 8 + 2 + 10 * 12 + 4
    entries = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tiles = [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, start), (325, 4, 1, len(data))]
    return tiff(entries + tiles, data)


def tiff_of_strips(number: int) -> bytes:
    """Return a TIFF of one pixel that lists many strips."""
    start = 8 + 2 + 9 * 12 + 4
    entries = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    strips = [(273, 4, number, start), (278, 4, 1, 1), (279, 4, number, start)]
    return tiff(entries + strips, struct.pack("<I", 8) * number + bytes(start))


def bmp_of_runs() -> bytes:
    """Return a BMP of run lengths that moves 255 rows up in an image that is one row high."""
    rows = b"\0\2\0\0\0\xff" * 4 + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, 50_000_000, 1, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + bytes(1024) + rows


def gif_of_size(width: int, height: int) -> bytes:
    content = bytearray(encoded(plain(mode="P"), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def gif_of_comments(number: int) -> bytes:
    content = encoded(plain(mode="P"), "GIF")
    start = content.index(b",", 13 + 3 * 2 ** (1 + (content[10] & 7)) if content[10] & 128 else 13)
    return content[:start] + b"!\xfe" + b"\1a" * number + b"\0" + content[start:]


OTHER_FORMATS: dict[str, Maker] = {
    "EPS": lambda: EPS,
    "EPS with a preview": lambda: struct.pack("<IIIIIII", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0) + b"\xff\xff" + EPS,
    "PDF": lambda: encoded(plain(), "PDF"),
    "DDS": lambda: encoded(plain(), "DDS"),
    "broken DDS": lambda: b"DDS " + bytes(200),
    "AVIF": lambda: encoded(plain(), "AVIF"),
    "broken AVIF": lambda: encoded(plain(), "AVIF")[:120],
    "BLP": lambda: b"BLP1" + bytes(200),
    "BLP 2": lambda: encoded(plain(mode="P"), "BLP"),
    "ICO": lambda: encoded(plain(), "ICO"),
    "ICNS": lambda: b"icns" + struct.pack(">I", 200) + bytes(192),
    "JPEG 2000": lambda: encoded(plain(), "JPEG2000"),
    "PSD": lambda: b"8BPS\0\1" + bytes(200),
    "TGA": lambda: encoded(plain(), "TGA"),
    "PCX": lambda: encoded(plain(), "PCX"),
    "PPM": lambda: encoded(plain(), "PPM"),
    "SGI": lambda: encoded(plain(), "SGI"),
    "IM": lambda: encoded(plain(), "IM"),
    "WMF": lambda: b"\xd7\xcd\xc6\x9a" + bytes(200),
    "FITS": lambda: b"SIMPLE  =                    T" + bytes(4000),
    "XPM": lambda: b'/* XPM */\nstatic char *x[] = {"9 9 1 1", "a c #000000"};',
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "a program": lambda: b"#!/bin/sh\ntouch /tmp/attacked\n",
    "a pickle": lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "a ZIP": lambda: b"PK\3\4" + bytes(200),
}
"""Files under the name of an image that no decoder must see."""

BOMBS: dict[str, Maker] = {
    "PNG of 65,000 x 65,000": lambda: png(65_000, 65_000, data=b""),
    "PNG of 2^31 columns": lambda: png(2**31 - 1, 1, data=b""),
    "PNG without columns": lambda: png(0, 24, data=b""),
    "PNG that expands to 144 MB": lambda: png(8000, 6000),
    "PNG with zTXt of 64 MB": lambda: png(32, 24, text_bomb(b"zTXt")),
    "PNG with iTXt of 64 MB": lambda: png(32, 24, text_bomb(b"iTXt")),
    "PNG with iCCP of 64 MB": lambda: png(32, 24, text_bomb(b"iCCP")),
    "PNG of 100,000 texts": lambda: png(32, 24, chunk(b"tEXt", b"key\0value") * 100_000),
    "PNG of 200,000 empty chunks": lambda: png(32, 24, chunk(b"aaAa", b"") * 200_000),
    "PNG of a broken text": lambda: png(32, 24, chunk(b"zTXt", b"key\0\0no zlib")),
    "PNG of short data": lambda: png(32, 24, data=zlib.compress(bytes(100))),
    "PNG of much data": lambda: png(32, 24, data=zlib.compress(bytes(2**26), 9)),
    "PNG of a wrong checksum": lambda: png(32, 24)[:-20] + bytes(20),
    "PNG of 16-bit gray": lambda: encoded(Image.new("I;16", (32, 24), 40_000), "PNG"),
    "PNG of a long chunk": lambda: png(32, 24)[:33] + b"\x7f\xff\xff\xfftEXt" + bytes(100),
    "PNG of many frames": lambda: encoded(plain(), "PNG", save_all=True, append_images=[noise(32, 24)] * 200),
    "JPEG of 65,500 x 65,500": lambda: jpeg_of_size(65_500, 65_500),
    "JPEG of 8,000 x 6,000": lambda: jpeg_of_size(8000, 6000),
    "JPEG without rows": lambda: jpeg_of_size(64, 0),
    "JPEG of 12 bits": lambda: jpeg_with(4, 12),
    "JPEG without components": lambda: jpeg_with(9, 0),
    "JPEG of 255 components": lambda: jpeg_with(9, 255),
    "JPEG of 3,000 scans": lambda: jpeg_of_scans(3000),
    "JPEG of 50,000 comments": lambda: b"\xff\xd8" + b"\xff\xfe\0\4ab" * 50_000 + encoded(plain(), "JPEG")[2:],
    "JPEG of 90 scans of 51 million pixels": lambda: jpeg_of_scans(80, 7200, 7200),
    "JPEG of 400,000 empty segments": lambda: b"\xff\xd8" + b"\xff\xe5\0\2" * 400_000 + encoded(plain(), "JPEG")[2:],
    "JPEG of 5 million markers without a length": lambda: jpeg_of_markers(5_000_000),
    "JPEG of several pictures": lambda: encoded(plain(), "MPO", save_all=True, append_images=[plain()] * 50),
    "JPEG whose other pictures are missing": lambda: encoded(
        plain(), "MPO", save_all=True, append_images=[plain()] * 50
    )[:900],
    "JPEG of CMYK": lambda: encoded(plain(mode="CMYK"), "JPEG"),
    "WebP of 16,383 x 16,383": lambda: webp_of_size(16_383, 16_383),
    "WebP of many frames": lambda: encoded(plain(), "WEBP", save_all=True, append_images=[noise(32, 24)] * 100),
    "half a WebP": lambda: encoded(noise(), "WEBP")[:200],
}
"""Images whose header, metadata or pixels are more than they seem."""

OTHER_BOMBS: dict[str, Maker] = {
    "TIFF of one huge tile": lambda: tiff_of_tiles(40_000),
    "TIFF of many strips": lambda: tiff_of_strips(4_000_000),
    "TIFF without entries": lambda: tiff([]),
    "TIFF of a huge count": lambda: tiff([(256, 4, 2**32 - 1, 8)]),
    "TIFF whose folders are a circle": lambda: tiff([(256, 4, 1, 16), (257, 4, 1, 16)])[:-4] + struct.pack("<I", 8),
    "BMP of runs": bmp_of_runs,
    "BMP of negative size": lambda: encoded(plain(), "BMP")[:18] + struct.pack("<ii", -5, -7) + bytes(100),
    "GIF of 65,535 x 65,535": lambda: gif_of_size(65_535, 65_535),
    "GIF of comments of one byte": lambda: gif_of_comments(2_000_000),
    "GIF of many frames": lambda: encoded(plain(mode="P"), "GIF", save_all=True, append_images=[noise(32, 24)] * 100),
    "float TIFF": lambda: encoded(Image.new("F", (8, 8), float("nan")), "TIFF"),
}
"""Pictures of formats that only predictions read."""


def webp_of_size(width: int, height: int) -> bytes:
    """Return a lossless WebP that declares another size."""
    content = bytearray(encoded(plain(), "WEBP", lossless=True))
    start = content.index(b"VP8L") + 9
    bits = (width - 1) | (height - 1) << 14
    content[start : start + 4] = struct.pack("<I", bits)
    return bytes(content)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(target: str | Path) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def unix_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # since the name of a socket is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(size)

    return make


def unreadable_name(path: Path) -> None:
    """Add a file whose name is not UTF-8."""
    with open(os.fsencode(path.parent) + b"/\xff\xfe.jpg", "wb") as file:
        file.write(b"x")


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a FIFO": fifo,
    "a link to a FIFO": lambda path: (fifo(path.with_name("pipe")), link("pipe")(path)),
    "a link to /dev/zero": link("/dev/zero"),
    "a link to /dev/stdin": link("/dev/stdin"),
    "a link to /dev/tty": link("/dev/tty"),
    "a socket": unix_socket,
    "a folder": folder,
    "a link to itself": lambda path: link(path.name)(path),
    "a link to nothing": link("nothing"),
    "a sparse file of 20 GB": sparse(20 * 2**30),
}
"""What may lie where a file should be."""
