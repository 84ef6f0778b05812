"""The packed data set ("pack"): a folder of shards with a manifest, and how to open it.

pack.json             the input of the pack, and the shards written so far
shard-00000.parquet   PACKED rows in ascending image id
index.parquet         INDEX, one row per image
manifest.json         hashes of these files; written last, so a folder without it is not a complete pack
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskformer.taxonomy import Taxonomy
from pipelines.data.schema import FILES, INDEX, require
from pipelines.errors import UserError
from pipelines.storage import Location, absolute, locate, sha256

VERSION = 3
STATE_FILE, INDEX_FILE, MANIFEST_FILE = "pack.json", "index.parquet", "manifest.json"


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
    content = file.read_bytes()
    try:
        found = json.loads(content)
        if found["version"] != VERSION:
            raise UserError(
                f"The pack {location} has version {found['version']}, and this program reads version {VERSION}; "
                f"pack the data set again: python jobs/prepare_data.py --input COCO --split SPLIT --output NEW."
            )
        return Manifest(
            taxonomy=Taxonomy.from_coco(found["categories"]),
            num_images=found["num_images"],
            num_segments=found["num_segments"],
            num_things=found["num_things"],
            shards=tuple(PackedFile(**shard) for shard in found["shards"]),
            index=PackedFile(**found["index"]),
            fingerprint=found["fingerprint"],
            data_hash=sha256(content),
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a manifest of prepare_data.py ({error!r}); pack the data set again.") from error


def read_index(location: Location, manifest: Manifest) -> pa.Table:
    """Read the INDEX table of the pack at `location`.

    Raises:
        UserError: the file is missing, does not match the manifest, or has values that no pack has.
    """
    file = location / manifest.index.file
    content = file.read_bytes() if file.exists() else b""
    if sha256(content) != manifest.index.sha256:
        raise UserError(
            f"{file} is {'damaged' if content else 'missing'}: it does not have the hash in the manifest. "
            f"Delete the pack {location} and pack the data set again."
        )
    table = pq.read_table(pa.BufferReader(content))
    require(table, INDEX, str(file))
    shard, ids = table["shard"].to_numpy(), table["image_id"].to_numpy()
    parts = [table[name].combine_chunks() for name in FILES]
    sizes = [table["height"], table["width"], *(part.field("bytes") for part in parts)]
    offsets = [part.field("offset") for part in parts]
    if len(ids) and ids.min() < 0:
        problem = f"has the image id {ids.min()}, but ids must not be negative"
    elif not np.array_equal(shard, np.repeat(np.arange(len(manifest.shards)), [s.rows for s in manifest.shards])):
        problem = f"lists other images than the shards in {MANIFEST_FILE} have"
    elif any((np.asarray(column) < least).any() for columns, least in ((sizes, 1), (offsets, 0)) for column in columns):
        problem = "has an image without a size"
    else:
        return table
    raise UserError(f"{file} {problem}. Pack the data set again into another folder.")


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
