"""The three stages of a prediction: read, segment, write. They run one after the other here, or as stages on Ray Data.

A row is a picture on its way, whether it can be read or not:

    ITEM     source, name and, of a video, the numbers of the frames that are done
    READ     its file, its resized pixels, and its size
    FOUND    its file, its segment ids and segments, and its size
    RECORD   what is remembered of it
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from maskformer import Segmenter, Taxonomy
from maskformer.coco_format import encode_ids
from maskformer.draw import overlay
from maskformer.image_files import MAX_BYTES
from maskformer.images import UnreadableImageError, read_image
from maskformer.preprocess import resize_image, resized_shape
from maskformer.untrusted import escaped, open_regular
from pipelines.errors import StorageRefusedError
from pipelines.inference.videos import frames
from pipelines.storage import Location, is_remote, locate, patience

Row = dict[str, Any]

_COMMON = [
    pa.field("source", pa.binary()),  # a path need not be Unicode
    pa.field("name", pa.string()),
    pa.field("frame", pa.int64()),  # its number; -1 of a picture
    pa.field("frames", pa.int64()),  # in a row after the last frame of a video: their number; otherwise -1
    pa.field("reason", pa.string()),  # why there is no result; empty if there is one
    pa.field("missing", pa.bool_()),
    pa.field("height", pa.int64()),
    pa.field("width", pa.int64()),
]
ITEM = pa.schema(
    [("source", pa.binary()), ("name", pa.string()), ("video", pa.bool_()), ("done", pa.list_(pa.int64()))]
)
READ = pa.schema(
    [
        *_COMMON,
        pa.field("file", pa.binary()),
        pa.field("resized", pa.binary()),
        pa.field("resized_height", pa.int64()),
        pa.field("resized_width", pa.int64()),
    ]
)
FOUND = pa.schema(
    [*_COMMON, pa.field("file", pa.binary()), pa.field("ids", pa.binary()), pa.field("segments", pa.string())]
)
RECORD = pa.schema([*_COMMON, pa.field("segments", pa.string())])

_PATIENCE = 900.0
"""Seconds to wait for a storage that does not answer."""

_LEGIBLE, _TIMES, _LARGEST = 320, 8, 16384
"""Pixels that the shorter side of an overlay should have, by how much a picture is enlarged for it at most, and pixels
that the longer side may have: a JPEG ends at 65,500."""


@dataclass(frozen=True)
class Read:
    """Maps ITEM rows to READ rows: one of a picture, many of a video."""

    short_side: int
    long_side: int
    every: int
    keep_file: bool
    """Whether overlays will be drawn."""
    stores: Mapping[str, Location] = field(default_factory=dict)
    """Object stores by the beginning of their URIs, `s3://bucket`."""

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for item in table.to_pylist():
            for row in self.rows(item):
                yield pa.Table.from_pylist([row], schema=READ)

    def rows(self, item: Row) -> Iterator[Row]:
        """Yield the READ rows of an item."""
        source, count = os.fsdecode(item["source"]), 0
        try:
            with patience(_PATIENCE):
                if not item["video"]:
                    file = self._content(source)
                    yield self._read(item, item["name"], -1, file, read_image(file, name=escaped(source)))
                    return
                done = set(item["done"])
                for number, pixels in frames(self._open(source), escaped(source), self.every):
                    count += 1
                    if number not in done:
                        name = f"{item['name']}/frame_{number:08d}"
                        yield self._read(item, name, number, _bitmap(pixels), pixels)
                yield {**_row(item, item["name"]), "frames": count}
        except FileNotFoundError:
            yield {**_row(item, item["name"]), "reason": f"{escaped(source)} does not exist.", "missing": True}
        except (UnreadableImageError, StorageRefusedError) as error:
            yield {**_row(item, item["name"]), "reason": str(error)}
        except OSError as error:
            yield {**_row(item, item["name"]), "reason": f"{escaped(source)} cannot be read: {error.strerror}."}

    def _content(self, source: str) -> bytes:
        """Return the bytes of a picture."""
        if is_remote(source):
            return self._object(source).read_bytes(MAX_BYTES)
        with self._open(source) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise UnreadableImageError(f"{escaped(source)} has {size:,} bytes, more than {MAX_BYTES:,}.")
            return file.read()

    def _object(self, source: str) -> Location:
        parts = source.split("/", 3)
        store = self.stores.get("/".join(parts[:3]))
        return locate(source) if store is None else store / parts[3]

    def _open(self, source: str) -> BinaryIO:
        """Open a file; an object is read into memory as a whole."""
        if is_remote(source):
            return io.BytesIO(self._object(source).read_bytes())
        if not os.path.lexists(source):
            raise FileNotFoundError
        if not os.path.isfile(source):
            raise UnreadableImageError(f"{escaped(source)} is not a file. Name a picture.")
        return open_regular(source)

    def _read(self, item: Row, name: str, frame: int, file: bytes, pixels: npt.NDArray[np.uint8]) -> Row:
        height, width = pixels.shape[:2]
        resized = resize_image(pixels, resized_shape(height, width, self.short_side, self.long_side))
        return {
            **_row(item, name),
            "frame": frame,
            "height": height,
            "width": width,
            "file": file if self.keep_file else b"",
            "resized": resized.tobytes(),
            "resized_height": resized.shape[0],
            "resized_width": resized.shape[1],
        }


class Segment:
    """Maps READ rows to FOUND rows."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.row(row) for row in table.to_pylist()], schema=FOUND)

    def row(self, row: Row) -> Row:
        """Return the FOUND row of a READ row."""
        if row["reason"] or row["frames"] >= 0:
            return row
        shape = row["resized_height"], row["resized_width"], 3
        resized = np.frombuffer(row["resized"], np.uint8).reshape(shape)
        try:
            ids, segments = self._segmenter.segment_resized(resized, (row["height"], row["width"]))
        except torch.OutOfMemoryError:
            size = f"{row['width']} x {row['height']}"
            return {
                **row,
                "reason": f"{row['name']} has {size} pixels, too many for the GPU's memory. Make it smaller.",
            }
        return {
            **row,
            "resized": None,
            "ids": ids.astype(np.uint8 if len(segments) < 256 else np.int32).tobytes(),
            "segments": json.dumps(segments),
        }


@dataclass(frozen=True)
class Write:
    """Maps FOUND rows to RECORD rows, when the files of each are written."""

    folder: Location
    taxonomy: Taxonomy
    overlays: bool
    pngs: bool

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.row(row) for row in table.to_pylist()], schema=RECORD)

    def row(self, row: Row) -> Row:
        """Write the files of a FOUND row; return its RECORD row."""
        if row["reason"] or row["frames"] >= 0:
            return row
        shape = row["height"], row["width"]
        kind = np.uint8 if len(row["ids"]) == shape[0] * shape[1] else np.int32
        ids, segments = np.frombuffer(row["ids"], kind).reshape(shape), json.loads(row["segments"])
        with patience(_PATIENCE):
            if self.pngs:
                content = _encoded(encode_ids(ids.astype(np.int32)), "PNG")
                (self.folder / png_file(row["name"])).write_bytes(content)
            if self.overlays:
                pixels, larger = _legible(read_image(row["file"], name=row["name"]), ids)
                content = _encoded(overlay(pixels, larger, segments, self.taxonomy), "JPEG", quality=90)
                (self.folder / overlay_file(row["name"])).write_bytes(content)
        return row


def overlay_file(name: str) -> str:
    """Return the path of an overlay below the output folder."""
    return f"overlays/{name}.jpg"


def png_file(name: str) -> str:
    """Return the path of a panoptic PNG below the output folder."""
    return f"panoptic/{name}.png"


def _row(item: Row, name: str) -> Row:
    """Return the columns that all rows have."""
    source = item["source"]
    empty = {"frame": -1, "frames": -1, "reason": "", "missing": False, "height": 0, "width": 0}
    return {"source": source, "name": name, **empty}


def _bitmap(pixels: npt.NDArray[np.uint8]) -> bytes:
    return _encoded(pixels, "BMP")


def _encoded(pixels: npt.NDArray[np.uint8], kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _legible(pixels: npt.NDArray[np.uint8], ids: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Enlarge a small picture and its ids by repeating pixels, so that names fit in; leave out pixels of a huge one."""
    step = -(-max(ids.shape) // _LARGEST)
    pixels, ids = pixels[::step, ::step], ids[::step, ::step]
    times = min(-(-_LEGIBLE // min(ids.shape)), _TIMES, _LARGEST // max(ids.shape))
    if times == 1:
        return pixels, ids
    return pixels.repeat(times, axis=0).repeat(times, axis=1), ids.repeat(times, axis=0).repeat(times, axis=1)
