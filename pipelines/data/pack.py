"""Pack a COCO panoptic data set: check all of it, then write shards, index and manifest (see manifest.py).

A pack is a pure function of its input, so an interrupted one can be resumed and ends with the same bytes.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maskformer.taxonomy import Taxonomy
from pipelines.data.coco import CocoLayout, Record, read_coco
from pipelines.data.manifest import INDEX_FILE, MANIFEST_FILE, STATE_FILE, VERSION, Manifest, PackedFile, read_manifest
from pipelines.data.pixels import compress_index_map, decode_panoptic, index_map
from pipelines.data.schema import FILES, INDEX, PACKED
from pipelines.data.validate import Fault, validate
from pipelines.errors import UserError
from pipelines.progress import progress
from pipelines.storage import Location, locate, sha256

logger = logging.getLogger(__name__)

_THREADS = min(32, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How a data set is divided into shards."""

    rows_per_shard: int = 256
    """Images per shard. 256 images of COCO are about 40 MB."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise UserError(f"--rows-per-shard must be at least 1, got {self.rows_per_shard}; use 256 for COCO.")


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """Result of `pack`."""

    output: Location
    manifest: Manifest
    was_complete: bool
    """The pack was complete already, and the images were not opened."""
    warnings: tuple[Fault, ...]
    """Faults of the data set that do not prevent training."""


def pack(layout: CocoLayout, output: str, config: PackConfig) -> PackReport:
    """Check all of a data set, then pack it into the folder `output`, resuming an interrupted pack.

    Packs have the same input if annotation JSON, split and configuration are equal. Images that were replaced under
    an unchanged JSON are not noticed; pack them into a new folder.

    Raises:
        UserError: the data has errors, `output` has other files, or it cannot be written. Unless writing itself
            failed, nothing was written.
    """
    dataset = read_coco(layout)
    folder = locate(output)
    chunks = _cut(dataset.records, config.rows_per_shard)
    source = {
        "version": VERSION,
        "split": layout.split,
        "annotations_sha256": dataset.annotations_sha256,
        "rows_per_shard": config.rows_per_shard,
    }
    expected = {STATE_FILE, INDEX_FILE, MANIFEST_FILE, *chunks}
    shards = _shards_written(folder, source, expected)
    if expected <= set(folder.names()):
        return PackReport(output=folder, manifest=read_manifest(folder), was_complete=True, warnings=())

    faults = validate(dataset, _THREADS)
    _refuse_errors(faults, len(dataset.records))

    for name in _temporaries(folder, expected):
        (folder / name).delete()
    _write_state(folder, source, shards)
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, records in progress(chunks.items(), len(chunks), "shards packed"):
            if name in shards and _is_intact(folder, shards[name]):
                logger.info("%s is already packed", name)
                continue
            rows = list(pool.map(partial(packed_row, layout, dataset.taxonomy), records))
            shards[name] = _write(folder / name, _shard(rows), len(rows))
            _write_state(folder, source, shards)

    index = pa.concat_tables(
        index_of((folder / name).read_bytes(), number, dataset.taxonomy) for number, name in enumerate(chunks)
    )
    index_file = _write(folder / INDEX_FILE, _parquet(index), len(index))
    manifest = {
        "version": VERSION,
        "num_images": len(index),
        "num_segments": sum(index["num_segments"].to_pylist()),
        "num_things": sum(index["num_things"].to_pylist()),
        "source": source,
        "fingerprint": sha256(json.dumps(source, sort_keys=True).encode()),
        "categories": dataset.taxonomy.to_coco(),
        "shards": [asdict(shards[name]) for name in chunks],
        "index": asdict(index_file),
    }
    _write_json(folder / MANIFEST_FILE, manifest)
    return PackReport(output=folder, manifest=read_manifest(folder), was_complete=False, warnings=tuple(faults))


def _cut(records: Sequence[Record], rows_per_shard: int) -> dict[str, Sequence[Record]]:
    starts = range(0, len(records), rows_per_shard)
    return {
        f"shard-{number:05d}.parquet": records[start : start + rows_per_shard] for number, start in enumerate(starts)
    }


def _shards_written(folder: Location, source: dict[str, Any], expected: set[str]) -> dict[str, PackedFile]:
    """Return the shards that an interrupted pack of the same input wrote; refuse any other folder that is not empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or empty folder with --output.")
    names = set(folder.names()) - set(_temporaries(folder, expected))
    shards: dict[str, PackedFile] = {}
    foreign = names
    if STATE_FILE in names:
        foreign = names - expected
        before, shards = _read_state(folder / STATE_FILE)
        differing = [
            f"{key} is {value}, was {before.get(key)}" for key, value in source.items() if before.get(key) != value
        ]
        if differing:
            raise UserError(
                f"{folder} has a pack of another input ({'; '.join(differing)}); give another folder with --output, "
                f"or delete this one first."
            )
    if foreign:
        raise UserError(
            f"{folder} has {len(foreign)} files or folders that are not part of this pack: "
            f"{', '.join(sorted(foreign)[:5])}{', ...' if len(foreign) > 5 else ''}; give a new or empty folder with "
            f"--output."
        )
    return shards


def _temporaries(folder: Location, expected: set[str]) -> list[str]:
    # Location.write_bytes leaves these in the folder when the process is killed.
    parts = ((name, re.fullmatch(r"\.(.+)\.[0-9a-f]{32}\.tmp", name)) for name in folder.names())
    return [name for name, match in parts if match and match[1] in expected]


def _write_state(folder: Location, source: dict[str, Any], shards: dict[str, PackedFile]) -> None:
    written = [asdict(shards[name]) for name in sorted(shards)]
    _write_json(folder / STATE_FILE, {"source": source, "shards": written})


def _read_state(file: Location) -> tuple[dict[str, Any], dict[str, PackedFile]]:
    try:
        state = json.loads(file.read_bytes())
        shards = {shard["file"]: PackedFile(**shard) for shard in state["shards"]}
        return dict(state["source"]), shards
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} was not written by prepare_data.py ({error!r}); give a new or empty folder with --output."
        ) from error


def _refuse_errors(faults: Sequence[Fault], num_records: int) -> None:
    errors = [fault for fault in faults if fault.severity == "error"]
    if not errors:
        return
    others = ", ".join(f"{code} {count}" for code, count in sorted(Counter(fault.code for fault in errors[1:]).items()))
    images = len({fault.image_id for fault in errors})
    raise UserError(
        f"The data set has errors, so nothing was packed. First: {errors[0]} Others: {others or 'none'}; "
        f"{images} of {num_records} images are affected."
    )


def packed_row(layout: CocoLayout, taxonomy: Taxonomy, record: Record) -> dict[str, Any]:
    """Read the files of an image that was checked; return its PACKED row."""
    panoptic = (layout.panoptic / record.panoptic_file).read_bytes()
    plane, classes = index_map(decode_panoptic(panoptic), record.segments, taxonomy)
    return {
        "image_id": record.image_id,
        "file_name": record.image_file,
        "height": record.height,
        "width": record.width,
        "image": (layout.images / record.image_file).read_bytes(),
        "panoptic": panoptic,
        "segments": [{key: segment[key] for key in ("id", "category_id", "iscrowd")} for segment in record.segments],
        "index_map": compress_index_map(plane, len(classes)),
        "classes": classes.tolist(),
    }


def _shard(rows: list[dict[str, Any]]) -> bytes:
    # One row group per row, so that reading a row takes one read of only its bytes. The cost, measured with 11 segments
    # per row: 620 bytes of footer and 480 bytes of column headers per row. A reader parses the footer once per open
    # file. Images are compressed already, and no query filters by column, hence no compression and no statistics.
    return _parquet(
        pa.Table.from_pylist(rows, schema=PACKED),
        row_group_size=1,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )


def index_of(content: bytes, shard: int, taxonomy: Taxonomy) -> pa.Table:
    """Return the INDEX rows of the shard number `shard` with this content."""
    file = pq.ParquetFile(pa.BufferReader(content))
    rows: list[dict[str, Any]] = []
    for number in range(file.num_row_groups):
        packed = file.read_row_group(number).to_pylist()[0]
        group = file.metadata.row_group(number)
        classes = [taxonomy.class_index(s["category_id"]) for s in packed["segments"] if not s["iscrowd"]]
        files = {
            name: _part(content, group.column(column), packed[name])
            for column, name in enumerate(_leaves(group))
            if name in FILES
        }
        rows.append(
            {
                **packed,
                **files,
                "num_things": sum(map(taxonomy.is_thing, classes)),
                "num_segments": len(classes),
                "shard": shard,
                "row": number,
            }
        )
    return pa.Table.from_pylist(rows, schema=INDEX)


def _leaves(group: pq.RowGroupMetaData) -> list[str]:
    return [group.column(column).path_in_schema for column in range(group.num_columns)]


def _part(content: bytes, column: pq.ColumnChunkMetaData, value: bytes) -> dict[str, Any]:
    """Return where the only value of a column is in the shard, and its hash.

    A plain, uncompressed column of one value ends with its bytes.
    """
    offset = column.data_page_offset + column.total_compressed_size - len(value)
    if content[offset : offset + len(value)] != value:
        raise AssertionError(f"The column {column.path_in_schema} does not end with its value.")
    return {"offset": offset, "bytes": len(value), "sha256": hashlib.sha256(value).digest()}


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _write(file: Location, content: bytes, rows: int) -> PackedFile:
    file.write_bytes(content)
    return PackedFile(file=file.name, rows=rows, bytes=len(content), sha256=sha256(content))


def _is_intact(folder: Location, shard: PackedFile) -> bool:
    file = folder / shard.file
    return file.exists() and sha256(file.read_bytes()) == shard.sha256


def _write_json(file: Location, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")
