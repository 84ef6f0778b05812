"""The packed data set ("pack"): a folder of shards with a manifest, and how to open it.

pack.json             the input of the pack, and the shards written so far
shard-00000.parquet   PACKED rows in ascending image id
index.parquet         INDEX, one row per image
manifest.json         hashes of these files; written last, so a folder without it is not a complete pack
"""

import itertools
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maskformer.image_files import MAX_BYTES, MAX_PIXELS
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import MAX_JSON_BYTES, escaped, parse_json, shown
from pipelines.data.parquet_pages import require_agreeing_pages
from pipelines.data.schema import FILES, INDEX, require
from pipelines.errors import UserError
from pipelines.storage import Location, absolute, locate, sha256

VERSION = 3
STATE_FILE, INDEX_FILE, MANIFEST_FILE = "pack.json", "index.parquet", "manifest.json"
MAX_INDEX_BYTES = 2**30
_MAX_FOOTER = 2**17  # bytes; 64 million images have a footer of this size
_MAX_EXPANSION, _ALWAYS = 20, 2**25
"""How much larger than its file an index may be, in bytes or values, and how large it may be in any case."""
_LONGEST_NAME = 4095  # bytes of a path on Linux
_MAX_GAP = 2**16  # bytes between two files of a row: a header of 500
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """Size and hash of a file of a pack."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a complete pack."""

    taxonomy: Taxonomy
    num_images: int
    num_segments: int
    """Segments, not counting crowds."""
    num_things: int
    """Segments of thing classes, not counting crowds."""
    shards: tuple[PackedFile, ...]
    index: PackedFile
    fingerprint: str
    """Hash of the input: equal fingerprints give equal packs."""
    data_hash: str
    """Hash of the manifest, which has the hashes of all other files: equal data hashes mean equal data."""


def read_manifest(location: Location) -> Manifest:
    """Read the manifest of the pack at `location`.

    Raises:
        UserError: there is no pack, it is not complete, or another version wrote it.
    """
    file = location / MANIFEST_FILE
    if not file.exists():
        if (location / STATE_FILE).exists():
            raise UserError(f"The pack {location} is not complete; run prepare_data.py again with the same arguments.")
        raise UserError(f"There is no pack at {location}; give the output folder of prepare_data.py.")
    content = file.read_bytes(MAX_JSON_BYTES)
    try:
        found = parse_json(content)
        if found["version"] != VERSION or isinstance(found["version"], bool):
            raise UserError(
                f"The pack {escaped(location)} has version {shown(found['version'], 40)}, and this program "
                f"reads version {VERSION}; pack the data set again: python jobs/prepare_data.py --input COCO --split "
                f"SPLIT --output NEW."
            )
        manifest = Manifest(
            taxonomy=Taxonomy.from_coco(found["categories"]),
            num_images=_count(found, "num_images"),
            num_segments=_count(found, "num_segments"),
            num_things=_count(found, "num_things"),
            shards=tuple(_packed_file(shard, shard_file(number)) for number, shard in enumerate(found["shards"])),
            index=_packed_file(found["index"], INDEX_FILE),
            fingerprint=_hash(found, "fingerprint"),
            data_hash=sha256(content),
        )
        if not manifest.num_images == manifest.index.rows == sum(shard.rows for shard in manifest.shards):
            raise ValueError("num_images, the rows of the index and those of the shards differ")
        if not manifest.num_things <= manifest.num_segments:
            raise ValueError("it has more things than segments")
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{escaped(file)} is not a manifest of prepare_data.py ({escaped(reason, 200)}); pack the data set again."
        ) from error
    return manifest


def shard_file(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.parquet"


def _packed_file(found: Any, name: str) -> PackedFile:
    """Check the entry of a file, which has this name and no other: a manifest must not name files elsewhere."""
    if found["file"] != name:
        raise ValueError(f"it names the file {shown(found['file'])} instead of {name}")
    rows, size = _count(found, "rows"), _count(found, "bytes")
    return PackedFile(file=name, rows=rows, bytes=size, sha256=_hash(found, "sha256"))


def _count(found: Any, key: str) -> int:
    value = found[key]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{key} is {shown(value, 60)}, not a number from 0 on")
    return value


def _hash(found: Any, key: str) -> str:
    value = found[key]
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{key} is {shown(value, 60)}, not a SHA-256 in hexadecimal")
    return value


def read_index(location: Location, manifest: Manifest) -> pa.Table:
    """Read the INDEX table of the pack at `location`.

    Its own hash is in the manifest, but a stranger may have written both. So what it declares is checked before it is
    read, and each value before it is used.

    Raises:
        UserError: the file is missing, does not match the manifest, or has values that no pack has.
    """
    file = location / manifest.index.file
    content = file.read_bytes(MAX_INDEX_BYTES) if file.exists() else b""
    if sha256(content) != manifest.index.sha256:
        raise UserError(
            f"{escaped(file)} is {'damaged' if content else 'missing'}: it does not have the hash in the manifest. "
            f"Delete the pack {escaped(location)} and pack the data set again."
        )
    try:
        table = _table(content, manifest)
        problem = _problem(table, manifest)
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types for a damaged file
        problem = f"cannot be read ({escaped(' '.join(str(error).split()), 500).rstrip('.')})"
    else:
        if problem is None:
            return table
    raise UserError(f"{escaped(file)} {problem}. Pack the data set again into another folder.")


def _table(content: bytes, manifest: Manifest) -> pa.Table:
    footer = int.from_bytes(content[-8:-4], "little")
    if footer > _MAX_FOOTER:  # before it is parsed, since a schema may be nested deeply
        raise ValueError(f"its footer has {footer:,} bytes, more than {_MAX_FOOTER:,}")
    parquet = pq.ParquetFile(pa.BufferReader(content))
    require(parquet.schema_arrow, INDEX, "it")
    metadata, rows = parquet.metadata, manifest.index.rows
    if metadata.num_rows != rows:
        raise ValueError(f"it has {metadata.num_rows:,} rows, and the manifest says {rows:,}")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    # The first column, the image id, has one value per row.
    if sum(g.num_rows for g in groups) != rows or any(g.column(0).num_values != g.num_rows for g in groups):
        raise ValueError("its parts have other numbers of rows than the whole")
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    plain, values = sum(c.total_uncompressed_size for c in columns), sum(c.num_values for c in columns)
    negative = any(c.total_uncompressed_size < 0 or c.num_values < 0 for c in columns)
    # Each row has three hashes, which nothing compresses, so the whole is not much larger than its file.
    if negative or max(plain, values) > _MAX_EXPANSION * len(content) + _ALWAYS:
        raise ValueError(f"it declares {plain:,} bytes and {values:,} values in a file of {len(content):,} bytes")
    require_agreeing_pages(content, metadata)
    # A name is read once, however many rows have it, until all names together are known to be small enough.
    table = pq.ParquetFile(pa.BufferReader(content), metadata=metadata, read_dictionary=["file_name"]).read()
    if len(table) != rows:
        raise ValueError(f"it says that it has {rows:,} rows, but has {len(table):,}")
    place = table.schema.get_field_index("file_name")
    total = 0
    for part in table.column(place).chunks:
        length = pc.call_function("binary_length", [part.dictionary]).to_numpy(zero_copy_only=False)
        if length.max(initial=0) > _LONGEST_NAME:
            raise ValueError(f"it has a file name of more than {_LONGEST_NAME:,} bytes")
        total += int(length[part.indices.drop_null().to_numpy()].sum())
    if total > _MAX_EXPANSION * len(content) + _ALWAYS:
        raise ValueError(f"it has file names of {total:,} bytes in a file of {len(content):,} bytes")
    table = table.set_column(place, INDEX.field("file_name"), table.column(place).cast(pa.string()))
    table.validate(full=True)  # also that texts are UTF-8, which Parquet does not promise
    return table


def _problem(table: pa.Table, manifest: Manifest) -> str | None:
    """Return what is wrong with the values of an index; None if a pack may have them."""
    for column in table.columns:
        if _has_null(column):
            return "has a row with a value that is missing"
    taxonomy, parts = manifest.taxonomy, {name: table[name].combine_chunks() for name in FILES}
    ids, shard, row = (table[name].to_numpy() for name in ("image_id", "shard", "row"))
    height, width = (table[name].to_numpy().astype(np.int64) for name in ("height", "width"))
    offset = {name: part.field("offset").to_numpy() for name, part in parts.items()}
    size = {name: part.field("bytes").to_numpy() for name, part in parts.items()}
    classes = table["classes"].combine_chunks().flatten().to_numpy()
    categories = table["segments"].combine_chunks().flatten().field("category_id").to_numpy()
    things, segments = table["num_things"].to_numpy(), table["num_segments"].to_numpy()
    rows = np.array([packed.rows for packed in manifest.shards])
    if len(ids) and ids.min() < 0:
        return f"has the image id {ids.min()}, but ids must not be negative"
    if (np.diff(ids) <= 0).any():
        return "has image ids that do not ascend"
    in_order = np.repeat(np.arange(len(rows)), rows)  # as many as the table has rows, by the manifest
    if not np.array_equal(shard, in_order) or not np.array_equal(
        row, np.arange(len(row)) - (np.cumsum(rows) - rows)[in_order]
    ):
        return f"lists other images than the shards in {MANIFEST_FILE} have"
    if (height < 1).any() or (width < 1).any() or any((each < 1).any() for each in size.values()):
        return "has an image without a size"
    if (height * width > MAX_PIXELS).any():
        return f"has an image of more than {MAX_PIXELS:,} pixels"
    if any((each < 0).any() for each in offset.values()):
        return "has an image without a size"
    # In this order, with little in between, since two are read with one request.
    end = np.array([packed.bytes for packed in manifest.shards])[shard] if len(shard) else np.zeros(0, np.int64)
    for first, second in itertools.pairwise(FILES):
        gap = offset[second] - offset[first]
        if (gap < size[first]).any() or (gap - size[first] > _MAX_GAP).any():
            return "has files that do not follow one another in their shard"
    last = FILES[-1]
    if any((each > MAX_BYTES).any() for each in size.values()) or (offset[last] > end - size[last]).any():
        return "has a file that is too large, or ends behind its shard"
    if len(classes) and not (classes.min() >= 0 and classes.max() < taxonomy.num_classes):
        return f"has a class that is none of the {taxonomy.num_classes} in {MANIFEST_FILE}"
    if not np.isin(categories, [category.id for category in taxonomy.categories]).all():
        return f"has a segment of a category that {MANIFEST_FILE} does not have"
    if (things < 0).any() or (things > segments).any() or things.sum(dtype=np.int64) != manifest.num_things:
        return f"counts other things than {MANIFEST_FILE}"
    if segments.sum(dtype=np.int64) != manifest.num_segments:
        return f"counts other segments than {MANIFEST_FILE}"
    return None


def _has_null(column: pa.ChunkedArray | pa.Array) -> bool:
    """Return whether a value, or one in it, is null."""
    if column.null_count:
        return True
    if isinstance(column, pa.ChunkedArray):
        return any(map(_has_null, column.chunks))
    if pa.types.is_struct(column.type):
        return any(map(_has_null, column.flatten()))
    return pa.types.is_list(column.type) and _has_null(column.flatten())


@dataclass(frozen=True)
class PackedSet:
    """The images of an opened pack that a job uses. It is opened once, and can be sent to other processes."""

    uri: str
    shards: tuple[str, ...]
    taxonomy: Taxonomy
    data_hash: str
    index: pa.Table
    """The rows of these images, of the INDEX schema."""
    num_left_out: int = 0
    """Number of images that `with_things` removed."""

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def image_ids(self) -> np.ndarray:
        return self.index["image_id"].to_numpy()

    @cached_property
    def shard(self) -> np.ndarray:
        """[N] index of each image's shard in `shards`."""
        return self.index["shard"].to_numpy()

    @cached_property
    def row(self) -> np.ndarray:
        """[N] row of each image in its shard."""
        return self.index["row"].to_numpy()

    @cached_property
    def num_things(self) -> np.ndarray:
        """[N] segments of thing classes in each image, not counting crowds."""
        return self.index["num_things"].to_numpy()

    def with_things(self) -> "PackedSet":
        """Return the images that have a thing other than a crowd.

        Raises:
            UserError: there are none.
        """
        kept = np.flatnonzero(self.num_things > 0)
        if not len(kept):
            raise UserError(
                f"No image of {self.uri} can be used: none of its {len(self)} images has a thing other than a crowd. "
                f"Use --data.no-require-thing to train on stuff alone."
            )
        return replace(self.take(kept), num_left_out=len(self) - len(kept))

    def subset(self, count: int) -> "PackedSet":
        """Return `count` images, evenly spaced in the set and always the same; all images if there are fewer."""
        return self.take(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64))

    def take(self, indices: np.ndarray) -> "PackedSet":
        """Return the images at `indices`, in that order."""
        return replace(self, index=self.index.take(indices))


def open_pack(uri: str) -> PackedSet:
    """Open a pack with all its images.

    Raises:
        UserError: there is no complete pack, or it has no images, or its index does not fit its shards.
    """
    uri = absolute(uri)
    location = locate(uri)
    manifest = read_manifest(location)
    index = read_index(location, manifest)
    if not len(index):
        raise UserError(f"The pack {uri} has no images. Pack a data set that has some.")
    return PackedSet(
        uri=uri,
        shards=tuple(str(location / shard.file) for shard in manifest.shards),
        taxonomy=manifest.taxonomy,
        data_hash=manifest.data_hash,
        index=index,
    )
