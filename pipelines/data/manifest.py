"""The packed data set ("pack"): a folder of shards with a manifest, and how to open it.

pack.json             the input of the pack, and the shards written so far
shard-00000.parquet   PACKED rows in ascending image id
index.parquet         INDEX, one row per image
manifest.json         hashes of these files; written last, so a folder without it is not a complete pack
"""

import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskformer.taxonomy import Taxonomy
from pipelines.data.schema import INDEX, require
from pipelines.errors import UserError
from pipelines.storage import Location, absolute, locate, sha256

VERSION = 2
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
        UserError: the file is missing or does not match the manifest.
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
    return table


@dataclass(frozen=True)
class PackedSet:
    """The images of an opened pack that a job uses. It is opened once, and can be sent to other processes."""

    uri: str
    shards: tuple[str, ...]
    taxonomy: Taxonomy
    data_hash: str
    image_ids: np.ndarray
    shard: np.ndarray
    """[N] index of each image's shard in `shards`."""
    row: np.ndarray
    """[N] row of each image in its shard."""
    num_things: np.ndarray
    """[N] segments of thing classes in each image, not counting crowds."""
    num_left_out: int = 0
    """Number of images that `with_things` removed."""

    def __len__(self) -> int:
        return len(self.image_ids)

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
        names = ("image_ids", "shard", "row", "num_things")
        return replace(self, **{name: getattr(self, name)[indices] for name in names})


def open_pack(uri: str) -> PackedSet:
    """Open a pack with all its images.

    Raises:
        UserError: there is no complete pack, or it has no images, or an image id is negative.
    """
    uri = absolute(uri)
    location = locate(uri)
    manifest = read_manifest(location)
    index = read_index(location, manifest)
    if not len(index):
        raise UserError(f"The pack {uri} has no images. Pack a data set that has some.")
    first = int(index["image_id"].to_numpy().min())
    if first < 0:  # of an older prepare_data.py
        raise UserError(
            f"The pack {uri} has the image id {first}, but ids must not be negative. Renumber the images and pack the "
            f"data set again into another folder."
        )
    return PackedSet(
        uri=uri,
        shards=tuple(str(location / shard.file) for shard in manifest.shards),
        taxonomy=manifest.taxonomy,
        data_hash=manifest.data_hash,
        image_ids=index["image_id"].to_numpy(),
        shard=index["shard"].to_numpy(),
        row=index["row"].to_numpy(),
        num_things=index["num_things"].to_numpy(),
    )
