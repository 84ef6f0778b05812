"""Pack a COCO panoptic data set that was checked: write shards, index and manifest (see manifest.py).

A pack is a pure function of its input, so an interrupted one can be resumed and ends with the same bytes.
"""

import io
import json
import logging
import os
import re
import uuid
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maskformer.taxonomy import Taxonomy
from pipelines.data.coco import CocoDataset, CocoLayout
from pipelines.data.findings import escaped
from pipelines.data.manifest import INDEX_FILE, MANIFEST_FILE, STATE_FILE, VERSION, Manifest, PackedFile, read_manifest
from pipelines.data.pixels import compress_index_map, decode_panoptic, index_map
from pipelines.data.schema import INDEX, PACKED, row_hash
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


def open_output(dataset: CocoDataset, output: str, config: PackConfig, skip_bad: bool = False) -> PackReport | None:
    """Refuse an output folder that cannot take the pack; return the pack if it is complete already.

    Args:
        skip_bad: images may have been left out of the pack.

    Raises:
        UserError: `output` has other files or the pack of another input, or it cannot be written.
    """
    folder = locate(output)
    left_out: list[int] = []
    if skip_bad and (folder / STATE_FILE).exists():
        left_out = _read_state(folder / STATE_FILE)[0].get("left_out", [])
    source = _source(dataset, config, left_out)
    expected = _files(_cut(dataset.without(left_out), config))
    _shards_written(folder, source, expected)
    if expected <= set(folder.names()):
        return PackReport(output=folder, manifest=read_manifest(folder), was_complete=True)
    require_writable(folder / MANIFEST_FILE)
    return None


def require_writable(file: Location) -> None:
    """Write a file beside `file`, in a folder that is created if necessary, and remove both again.

    Raises:
        UserError: the folder cannot be written, or `file` is a folder.
    """
    if file.is_dir():
        raise UserError(f"{escaped(file.uri)} is a folder; give the name of a file.")
    suffix = f".{uuid.uuid4().hex}.tmp"
    probe = replace(file, path=f"{file.path}{suffix}", uri=f"{file.uri}{suffix}")
    created = [folder for folder in Path(file.path).parents if file.is_local and not folder.exists()]
    try:
        probe.write_bytes(b"")
        probe.delete()
    except UserError:
        raise
    except OSError as error:  # such as ENOENT, in /proc
        raise UserError(
            f"Cannot write {escaped(file.uri)}: {error.strerror or error}. Choose a folder that can be created and "
            f"written."
        ) from error
    finally:
        with suppress(OSError):
            for folder in created:
                folder.rmdir()


def pack(dataset: CocoDataset, output: str, config: PackConfig, left_out: Collection[int] = ()) -> PackReport:
    """Pack a data set that was checked into the folder `output`, resuming an interrupted pack.

    Packs have the same input if annotation JSON, split, configuration and left-out images are equal. Images that were
    replaced under an unchanged JSON are not noticed; pack them into a new folder.

    Args:
        left_out: ids of images that are not packed.

    Raises:
        UserError: `output` has other files or the pack of another input, or it cannot be written.
    """
    layout = dataset.layout
    folder = locate(output)
    source = _source(dataset, config, left_out)
    dataset = dataset.without(left_out)
    chunks = _cut(dataset, config)
    expected = _files(chunks)
    shards = _shards_written(folder, source, expected)
    if expected <= set(folder.names()):
        return PackReport(output=folder, manifest=read_manifest(folder), was_complete=True)

    for name in _temporaries(folder, expected):
        (folder / name).delete()
    _write_state(folder, source, shards)
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, records in progress(chunks.items(), len(chunks), "shards packed"):
            if name in shards and _is_intact(folder, shards[name]):
                logger.info("%s is already packed", name)
                continue
            rows = list(pool.map(partial(packed_row, layout, dataset.taxonomy), records.to_pylist()))
            shards[name] = _write(folder / name, _shard(rows), len(rows))
            _write_state(folder, source, shards)

    index = _index(dataset, chunks)
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
    return PackReport(output=folder, manifest=read_manifest(folder), was_complete=False)


def _source(dataset: CocoDataset, config: PackConfig, left_out: Collection[int]) -> dict[str, Any]:
    """Return what a pack is a function of."""
    return {
        "version": VERSION,
        "split": dataset.layout.split,
        "annotations_sha256": dataset.annotations_sha256,
        "rows_per_shard": config.rows_per_shard,
        **({"left_out": sorted(left_out)} if left_out else {}),
    }


def _cut(dataset: CocoDataset, config: PackConfig) -> dict[str, pa.Table]:
    starts = range(0, len(dataset.records), config.rows_per_shard)
    return {
        f"shard-{number:05d}.parquet": dataset.records.slice(start, config.rows_per_shard)
        for number, start in enumerate(starts)
    }


def _files(chunks: Mapping[str, pa.Table]) -> set[str]:
    return {STATE_FILE, INDEX_FILE, MANIFEST_FILE, *chunks}


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
            f"{key} is {str(source.get(key))[:80]}, was {str(before.get(key))[:80]}"
            for key in {**source, **before}
            if before.get(key) != source.get(key)
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


def packed_row(layout: CocoLayout, taxonomy: Taxonomy, record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the files of an image that was checked, given its row of RECORD; return its PACKED row."""
    panoptic = (layout.panoptic / record["panoptic_file"]).read_bytes()
    plane, classes = index_map(decode_panoptic(panoptic), record["segments"], taxonomy)
    row = {
        "image_id": record["image_id"],
        "file_name": record["image_file"],
        "height": record["height"],
        "width": record["width"],
        "image": (layout.images / record["image_file"]).read_bytes(),
        "panoptic": panoptic,
        "segments": [{key: segment[key] for key in ("id", "category_id", "iscrowd")} for segment in record["segments"]],
        "index_map": compress_index_map(plane, len(classes)),
        "classes": classes.tolist(),
    }
    return {**row, "sha256": row_hash(row)}


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


def _index(dataset: CocoDataset, chunks: Mapping[str, pa.Table]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for shard, records in enumerate(chunks.values()):
        for row, record in enumerate(records.to_pylist()):
            classes = [dataset.taxonomy.class_index(s["category_id"]) for s in record["segments"] if not s["iscrowd"]]
            rows.append(
                {
                    "image_id": record["image_id"],
                    "file_name": record["image_file"],
                    "shard": shard,
                    "row": row,
                    "height": record["height"],
                    "width": record["width"],
                    "num_things": sum(map(dataset.taxonomy.is_thing, classes)),
                    "num_segments": len(classes),
                }
            )
    return pa.Table.from_pylist(rows, schema=INDEX)


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
