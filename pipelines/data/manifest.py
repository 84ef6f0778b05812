"""What a packed data set is: a folder with a manifest, and how to read it.

pack.json             what is being packed, and the shards that are done
shard-00000.parquet   PACKED rows in ascending image id
index.parquet         INDEX, one row per image
manifest.json         hashes of all this; written last, so a folder without it is no pack
"""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskformer.taxonomy import Taxonomy
from pipelines.data.schema import INDEX, require
from pipelines.errors import UserError
from pipelines.storage import Location, absolute, locate, sha256

VERSION = 1
STATE_FILE, INDEX_FILE, MANIFEST_FILE = "pack.json", "index.parquet", "manifest.json"


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """A file of a pack, as it was when written."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete pack holds."""

    taxonomy: Taxonomy
    num_images: int
    num_segments: int
    """Crowds not counted."""
    num_things: int
    """Segments of thing classes, crowds not counted."""
    shards: tuple[PackedFile, ...]
    index: PackedFile
    fingerprint: str
    """Of the input: equal fingerprints give equal packs."""
    data_hash: str
    """Of the manifest, and so of every byte of the pack: runs on equal hashes saw equal data."""


def read_manifest(location: Location) -> Manifest:
    """Read what the pack at `location` holds.

    Raises:
        UserError: there is no pack, it is not complete, or it was written by another version.
    """
    file = location / MANIFEST_FILE
    if not file.exists():
        if (location / STATE_FILE).exists():
            raise UserError(f"The pack {location} is not complete; run the prepare_data.py that began it again.")
        raise UserError(f"There is no pack at {location}; give the output folder of prepare_data.py.")
    content = file.read_bytes()
    try:
        found = json.loads(content)
        if found["version"] != VERSION:
            raise UserError(
                f"The pack {location} has version {found['version']}, this program reads version {VERSION}; "
                f"pack the data set again with this version of prepare_data.py."
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
        UserError: the file is missing, or is not the one that the manifest names.
    """
    file = location / manifest.index.file
    content = file.read_bytes() if file.exists() else b""
    if sha256(content) != manifest.index.sha256:
        raise UserError(
            f"{file} is {'damaged' if content else 'missing'}: it is not the file that the manifest names. "
            f"Delete the pack {location} and pack the data set again."
        )
    table = pq.read_table(pa.BufferReader(content))
    require(table, INDEX, str(file))
    return table


@dataclass(frozen=True)
class PackedSet:
    """The images of a pack that a job works on."""

    uri: str
    shards: tuple[str, ...]
    taxonomy: Taxonomy
    data_hash: str
    image_ids: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    num_left_out: int

    def __len__(self) -> int:
        return len(self.image_ids)

    def subset(self, count: int) -> "PackedSet":
        """Return `count` images spread evenly over the set; always the same ones."""
        return self.take(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64))

    def take(self, places: np.ndarray) -> "PackedSet":
        """Return the images at `places`, in that order."""
        fields = {**vars(self), "image_ids": self.image_ids[places]}
        return PackedSet(**{**fields, "shard": self.shard[places], "row": self.row[places]})


def open_pack(uri: str, require_thing: bool = False) -> PackedSet:
    """Open a pack; with `require_thing`, leave out images without a thing that is not a crowd.

    Raises:
        UserError: there is no complete pack, or no image is left.
    """
    uri = absolute(uri)
    location = locate(uri)
    manifest = read_manifest(location)
    index = read_index(location, manifest)
    kept = index["num_things"].to_numpy() > 0 if require_thing else np.ones(len(index), bool)
    if not kept.any():
        raise UserError(
            f"No image of {uri} can be used: {len(index)} images, none with a thing that is not a crowd. "
            f"Use --data.no-require-thing to train on stuff alone."
        )
    return PackedSet(
        uri=uri,
        shards=tuple(str(location / shard.file) for shard in manifest.shards),
        taxonomy=manifest.taxonomy,
        data_hash=manifest.data_hash,
        image_ids=index["image_id"].to_numpy()[kept],
        shard=index["shard"].to_numpy()[kept],
        row=index["row"].to_numpy()[kept],
        num_left_out=int((~kept).sum()),
    )
