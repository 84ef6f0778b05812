"""One shard of a pack: from the records of its images to a Parquet file, and the INDEX rows that say what is in it.

`WriteShard` is what a Ray Data task does; it needs no Ray.
"""

import hashlib
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from maskformer.coco_format import encode_ids
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped
from pipelines.data.classes import ClassMap
from pipelines.data.coco import CocoLayout, Segment
from pipelines.data.files import read_file
from pipelines.data.manifest import shard_file
from pipelines.data.pixels import compress_index_map, decode_panoptic, image_size, index_map, pixel_runs
from pipelines.data.schema import FILES, INDEX, PACKED, RECORD
from pipelines.errors import UserError
from pipelines.storage import Location, is_remote, patience, sha256

_PATIENCE = 900.0
"""Seconds to wait for a storage that does not answer."""

_REQUESTS = 16
"""Images of an object store that a task reads at the same time."""

TASK = pa.schema([*RECORD, pa.field("shard", pa.int32()), pa.field("written", pa.string())])
"""Input of a task: the records of a shard, its number, and its hash if it was written before."""

WRITTEN = pa.schema([*INDEX, pa.field("shard_bytes", pa.int64()), pa.field("shard_sha256", pa.string())])
"""Output of a task: the INDEX rows of a shard, its bytes and its hash."""


@dataclass(frozen=True)
class WriteShard:
    """Operator of a task: maps TASK rows of one shard to WRITTEN rows."""

    layout: CocoLayout
    classes: ClassMap
    output: Location

    def __call__(self, records: pa.Table) -> pa.Table:
        """Write a shard, unless it is there already.

        Raises:
            UserError: a file was changed since it was checked, or the shard cannot be written.
        """
        number, written = records["shard"][0].as_py(), records["written"][0].as_py()
        file = self.output / shard_file(number)
        with patience(_PATIENCE):
            content = _existing(file, written)
            if content is None:
                content = self._content(records.drop_columns(["shard", "written"]).to_pylist())
                file.write_bytes(content)
        rows = index_of(content, number, self.classes.taxonomy)
        return rows.append_column(
            WRITTEN.field("shard_bytes"), pa.array([len(content)] * len(rows), pa.int64())
        ).append_column(WRITTEN.field("shard_sha256"), pa.array([sha256(content)] * len(rows), pa.string()))

    def _content(self, records: list[dict[str, Any]]) -> memoryview:
        if is_remote(self.layout.images.uri) or is_remote(self.layout.panoptic.uri):
            with ThreadPoolExecutor(_REQUESTS) as pool:
                rows = list(pool.map(self._row, records))
        else:
            rows = [self._row(record) for record in records]
        return shard_content(rows)

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        with patience(_PATIENCE):  # of this thread
            return packed_row(self.layout, self.classes, record)


def packed_row(layout: CocoLayout, classes: ClassMap, record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the files of an image that was checked, given its row of RECORD; return its PACKED row.

    Raises:
        UserError: a file is missing or cannot be decoded.
    """
    panoptic_file, size = layout.panoptic / record["panoptic_file"], (record["height"], record["width"])
    segments = [
        Segment(id=segment["id"], category_id=segment["category_id"], iscrowd=segment["iscrowd"])
        for segment in record["segments"]
    ]
    try:
        image = read_file(layout.images, record["image_file"], layout.roots)
        panoptic = read_file(layout.panoptic, record["panoptic_file"], layout.roots)
        ids = decode_panoptic(panoptic, size)
        if (found := image_size(image)) != size:
            raise ValueError(f"the image is {found[1]} x {found[0]}, not {size[1]} x {size[0]}")
        if classes.changed:
            relabeled, segments = _relabeled(ids, segments, classes)
            if not np.array_equal(relabeled, ids):
                ids, png = relabeled, io.BytesIO()
                Image.fromarray(encode_ids(ids)).save(png, "PNG")
                panoptic = png.getvalue()
        plane, numbered = index_map(ids, segments, classes.taxonomy)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"A file of image {record['image_id']}, {escaped(record['image_file'])} or {escaped(panoptic_file.uri)}, "
            f"changed since it was checked: {error}. Run prepare_data.py again."
        ) from error
    return {
        "image_id": record["image_id"],
        "file_name": record["image_file"],
        "height": record["height"],
        "width": record["width"],
        "segments": segments,
        "classes": numbered.tolist(),
        "panoptic": panoptic,
        "image": image,
        "index_map": compress_index_map(plane, len(numbered)),
    }


def _relabeled(ids: np.ndarray, segments: list[Segment], classes: ClassMap) -> tuple[np.ndarray, list[Segment]]:
    """Return ids and segments with the classes to train on, as if they had been annotated."""
    new_id = {segment["id"]: 0 for segment in segments}  # a dropped class is void
    kept: list[Segment] = []
    stuff: dict[int, int] = {}
    for segment in segments:
        category = classes.category_of[segment["category_id"]]
        if category is None:
            continue
        isthing = classes.taxonomy.is_thing(classes.taxonomy.class_index(category))
        if not isthing and category in stuff:  # an image has one segment of a class of stuff
            new_id[segment["id"]] = stuff[category]
            continue
        new_id[segment["id"]] = segment["id"]
        kept.append(Segment(id=segment["id"], category_id=category, iscrowd=segment["iscrowd"] and isthing))
        if not isthing:
            stuff[category] = segment["id"]
    values, which, runs = pixel_runs(ids)
    new = np.array([new_id.get(value, 0) for value in values.tolist()], ids.dtype)
    return np.repeat(new[which], runs.length).reshape(ids.shape), kept


def shard_content(rows: list[dict[str, Any]]) -> memoryview:
    """Return the bytes of a shard.

    It has one row group per row, so that its bytes are in one place. The cost, measured with 11 segments per row: 620
    bytes of footer and 480 bytes of column headers per row. Images are compressed already, and no query filters by
    column, hence no compression and no statistics.
    """
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema=PACKED)
    pq.write_table(table, sink, row_group_size=1, compression="none", use_dictionary=False, write_statistics=False)
    return memoryview(sink.getvalue()).cast("B")


def index_of(content: bytes | memoryview, number: int, taxonomy: Taxonomy) -> pa.Table:
    """Return the INDEX rows of the shard of this number and content."""
    file = pq.ParquetFile(pa.BufferReader(content))
    rows: list[dict[str, Any]] = []
    for row in range(file.num_row_groups):
        packed = file.read_row_group(row).to_pylist()[0]
        group = file.metadata.row_group(row)
        columns = [group.column(column) for column in range(group.num_columns)]
        classes = [taxonomy.class_index(s["category_id"]) for s in packed["segments"] if not s["iscrowd"]]
        parts = {
            column.path_in_schema: _part(content, column, packed[column.path_in_schema])
            for column in columns
            if column.path_in_schema in FILES
        }
        counts = {"num_things": sum(map(taxonomy.is_thing, classes)), "num_segments": len(classes)}
        rows.append({**packed, **parts, **counts, "shard": number, "row": row})
    return pa.Table.from_pylist(rows, schema=INDEX)


def _part(content: bytes | memoryview, column: pq.ColumnChunkMetaData, value: bytes) -> dict[str, Any]:
    """Return where the only value of a column is in the shard, and its hash.

    A plain, uncompressed column of one value ends with its bytes.
    """
    offset = column.data_page_offset + column.total_compressed_size - len(value)
    if content[offset : offset + len(value)] != value:
        raise AssertionError(f"The column {column.path_in_schema} does not end with its value.")
    return {"offset": offset, "bytes": len(value), "sha256": hashlib.sha256(value).digest()}


def _existing(file: Location, expected: str | None) -> bytes | None:
    """Return the content of a shard that was written before; None if it is not there or damaged."""
    if expected is None or not file.exists():
        return None
    content = file.read_bytes()
    return content if sha256(content) == expected else None
