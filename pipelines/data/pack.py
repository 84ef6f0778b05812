"""Pack a COCO panoptic data set that was checked: write shards, index and manifest (see manifest.py).

A pack is a pure function of its input, so an interrupted one can be resumed and ends with the same bytes.
"""

import hashlib
import io
import json
import os
import re
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskformer.untrusted import MAX_JSON_BYTES, escaped, parse_json
from pipelines.data.coco import CocoDataset
from pipelines.data.findings import MAX_IMAGE_ID
from pipelines.data.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    VERSION,
    Manifest,
    PackedFile,
    read_manifest,
    shard_file,
)
from pipelines.data.schema import INDEX
from pipelines.data.shards import TASK, WRITTEN, WriteShard
from pipelines.errors import UserError
from pipelines.progress import progress
from pipelines.storage import Location, locate, sha256

_SHARD = re.compile(r"shard-[0-9]{5,}\.parquet")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How a data set is divided into shards."""

    shard_megabytes: int = 128
    """Size of a shard in MB. A larger image has a shard of its own."""
    rows_per_shard: int = 4096
    """Most images in a shard."""

    def __post_init__(self) -> None:
        for name, value in (("shard-megabytes", self.shard_megabytes), ("rows-per-shard", self.rows_per_shard)):
            if value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}.")


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
        left_out = _left_out(folder / STATE_FILE)
    chunks, source = _plan(dataset.without(left_out), config, left_out)
    expected = _files(chunks)
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
    name = f".{file.name}.{uuid.uuid4().hex}.tmp"  # one of `_temporaries`, if it is left behind
    probe = replace(file, path=file.path.removesuffix(file.name) + name)  # messages name the file itself
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


def pack(
    dataset: CocoDataset,
    output: str,
    config: PackConfig,
    left_out: Collection[int] = (),
    in_process: bool = False,
) -> PackReport:
    """Pack a data set that was checked into the folder `output`, resuming an interrupted pack.

    Ray Data writes each shard in a task. Packs have the same input if the annotation JSON, the names and sizes of the
    files, split, classes, configuration and left-out images are equal.

    Args:
        left_out: ids of images that are not packed.
        in_process: write all shards in this process, without Ray, which is faster for a few images.

    Raises:
        UserError: `output` has other files or the pack of another input, or it cannot be written, or a file was changed
            since it was checked.
    """
    folder = locate(output)
    dataset = dataset.without(left_out)
    chunks, source = _plan(dataset, config, left_out)
    expected = _files(chunks)
    shards = _shards_written(folder, source, expected)
    if expected <= set(folder.names()):
        return PackReport(output=folder, manifest=read_manifest(folder), was_complete=True)

    for name in [*_temporaries(folder, expected), *_leftovers(folder, expected, shards)]:
        (folder / name).delete()
    _write_state(folder, source, shards)
    tasks = [_task(number, chunk, shards.get(shard_file(number))) for number, chunk in enumerate(chunks)]
    write = WriteShard(dataset.layout, dataset.classes, folder)
    parts: list[pa.Table] = [WRITTEN.empty_table()] * len(tasks)
    for written in progress(map(write, tasks) if in_process else _on_ray(write, tasks), len(tasks), "shards packed"):
        number = written["shard"][0].as_py()
        parts[number] = written
        shards[shard_file(number)] = PackedFile(
            file=shard_file(number),
            rows=len(written),
            bytes=written["shard_bytes"][0].as_py(),
            sha256=written["shard_sha256"][0].as_py(),
        )
        _write_state(folder, source, shards)

    index = pa.concat_tables(parts).select(INDEX.names).cast(INDEX)
    sink = io.BytesIO()
    pq.write_table(index, sink, compression="zstd")
    content = sink.getvalue()
    (folder / INDEX_FILE).write_bytes(content)
    manifest = {
        "version": VERSION,
        "num_images": len(index),
        "num_segments": sum(index["num_segments"].to_pylist()),
        "num_things": sum(index["num_things"].to_pylist()),
        "source": source,
        "fingerprint": sha256(json.dumps(source, sort_keys=True).encode()),
        "categories": dataset.classes.taxonomy.to_coco(),
        "shards": [asdict(shards[shard_file(number)]) for number in range(len(chunks))],
        "index": {"file": INDEX_FILE, "rows": len(index), "bytes": len(content), "sha256": sha256(content)},
    }
    _write_json(folder / MANIFEST_FILE, manifest)
    return PackReport(output=folder, manifest=read_manifest(folder), was_complete=False)


def _on_ray(write: WriteShard, tasks: list[pa.Table]) -> Iterator[pa.Table]:
    """Apply the operator to each table in a Ray Data task; yield the results in any order."""
    import ray.data  # a pack of a few images is made without it

    from pipelines.data.execution import mapped, outputs

    yield from outputs(mapped(ray.data.from_arrow(tasks), write, "pack", in_order=False))


def _plan(dataset: CocoDataset, config: PackConfig, left_out: Collection[int]) -> tuple[list[pa.Table], dict[str, Any]]:
    """Return the records of each shard, and what the pack is a function of."""
    layout, records, classes = dataset.layout, dataset.records, dataset.classes
    sizes = np.zeros(len(records), np.int64)
    digest = hashlib.sha256()
    for folder, column in ((layout.images, "image_file"), (layout.panoptic, "panoptic_file")):
        of_column = np.array(_sizes(folder, records[column].to_pylist()), np.int64)
        digest.update(of_column.tobytes())
        sizes += of_column
    source = {
        "version": VERSION,
        "split": layout.split,
        "annotations_sha256": dataset.annotations_sha256,
        "sizes_sha256": digest.hexdigest(),
        "shard_megabytes": config.shard_megabytes,
        "rows_per_shard": config.rows_per_shard,
        **({"classes": classes.to_json()} if classes.changed else {}),
        **({"left_out": sorted(left_out)} if left_out else {}),
    }
    return [records.slice(start, end - start) for start, end in cut(sizes, config)], source


def _sizes(folder: Location, names: Sequence[str]) -> list[int]:
    """Return the bytes of files in a folder; 0 for what is no file."""
    if not folder.is_local:
        size_of = folder.sizes()
        return [size_of.get(name, 0) for name in names]
    sizes: list[int] = []  # without listing the folder, in which a stranger's links may lead anywhere
    for name in names:
        try:
            state = os.stat(os.path.join(folder.path, name))
        except OSError:  # reading it says why
            sizes.append(0)
        else:
            sizes.append(state.st_size if stat.S_ISREG(state.st_mode) else 0)
    return sizes


def cut(sizes: np.ndarray, config: PackConfig) -> list[tuple[int, int]]:
    """Divide images among shards; return the first image of each shard and the one after its last.

    Args:
        sizes: [N] bytes of the files of each image.
    """
    most, ends = config.shard_megabytes * 1_000_000, np.cumsum(sizes)
    bounds: list[tuple[int, int]] = []
    start = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        end = int(np.searchsorted(ends, before + most, "right"))
        end = min(max(end, start + 1), start + config.rows_per_shard)
        bounds.append((start, end))
        start = end
    return bounds


def _task(number: int, records: pa.Table, before: PackedFile | None) -> pa.Table:
    columns = (pa.array([number] * len(records)), pa.array([before.sha256 if before else None] * len(records)))
    table = records.take(list(range(len(records))))  # a copy, since pickling a slice pickles the entire table
    for field, values in zip((TASK.field("shard"), TASK.field("written")), columns, strict=True):
        table = table.append_column(field, values.cast(field.type))
    return table


def _files(chunks: Sequence[pa.Table]) -> set[str]:
    return {STATE_FILE, INDEX_FILE, MANIFEST_FILE, *map(shard_file, range(len(chunks)))}


def _shards_written(folder: Location, source: dict[str, Any], expected: set[str]) -> dict[str, PackedFile]:
    """Return the shards that an interrupted pack of the same input wrote; refuse any other folder that is not empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or empty folder with --output.")
    names = set(folder.names()) - set(_temporaries(folder, expected))
    shards: dict[str, PackedFile] = {}
    foreign = names
    if STATE_FILE in names:
        before, shards = _read_state(folder / STATE_FILE)
        if not shards and MANIFEST_FILE not in names:  # it stopped before a shard was finished, so nothing is lost
            before, expected = source, expected | {name for name in names if _SHARD.fullmatch(name)}
        foreign = names - expected
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
            f"{escaped(', '.join(sorted(foreign)[:5]), 300)}{', ...' if len(foreign) > 5 else ''}; give a new or "
            f"empty folder with --output."
        )
    return shards


def _leftovers(folder: Location, expected: set[str], shards: Mapping[str, PackedFile]) -> list[str]:
    """Return the shards of a pack that stopped before one was finished, if this one has fewer."""
    return [] if shards else [name for name in folder.names() if _SHARD.fullmatch(name) and name not in expected]


def _temporaries(folder: Location, expected: set[str]) -> list[str]:
    # Location.write_bytes leaves these in the folder when the process is killed.
    # `require_writable` may leave one of one.
    parts = ((name, re.fullmatch(r"\.+(.+?)(\.[0-9a-f]{32}\.tmp)+", name)) for name in folder.names())
    return [name for name, match in parts if match and (match[1] in expected or _SHARD.fullmatch(match[1]))]


def _write_state(folder: Location, source: dict[str, Any], shards: dict[str, PackedFile]) -> None:
    written = [asdict(shards[name]) for name in sorted(shards)]
    _write_json(folder / STATE_FILE, {"source": source, "shards": written})


def _read_state(file: Location) -> tuple[dict[str, Any], dict[str, PackedFile]]:
    try:
        state = parse_json(file.read_bytes(MAX_JSON_BYTES))
        shards = {shard["file"]: PackedFile(**shard) for shard in state["shards"]}
        return dict(state["source"]), shards
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} was not written by prepare_data.py ({error!r}); give a new or empty folder with --output."
        ) from error


def _left_out(file: Location) -> list[int]:
    ids = _read_state(file)[0].get("left_out", [])
    if isinstance(ids, list) and all(type(each) is int and abs(each) <= MAX_IMAGE_ID for each in ids):
        return ids
    raise UserError(f"{file} was not written by prepare_data.py; give a new or empty folder with --output.")


def _write_json(file: Location, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")
