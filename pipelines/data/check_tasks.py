"""What the Ray Data tasks of a validation do. Importing it takes neither Ray nor torch, so tasks start soon."""

from dataclasses import asdict, dataclass

import pyarrow as pa

from maskformer.image_files import MAX_BYTES
from maskformer.taxonomy import Taxonomy
from pipelines.data.checks import CheckConfig, check_record
from pipelines.errors import StorageRefusedError
from pipelines.storage import Location, patience, sha256

_PATIENCE = 900.0
"""Seconds to wait for a storage that does not answer."""

_FINDING = pa.struct(
    [
        ("code", pa.string()),
        ("file", pa.string()),
        ("image_id", pa.int64()),
        ("segment_id", pa.int64()),
        ("what", pa.string()),
    ]
)
CHECKED = pa.schema([("sha256", pa.string()), ("bytes", pa.int64()), ("findings", pa.list_(_FINDING))])
FILE = pa.schema([("name", pa.string())])
_HASHED = pa.schema([("name", pa.string()), ("sha256", pa.string())])


@dataclass(frozen=True)
class CheckImages:
    """Operator of a task: maps RECORD rows to CHECKED rows."""

    images: Location
    panoptic: Location
    taxonomy: Taxonomy
    config: CheckConfig
    roots: tuple[str, ...]

    def __call__(self, records: pa.Table) -> pa.Table:
        with patience(_PATIENCE):
            found = [
                check_record(record, self.images, self.panoptic, self.taxonomy, self.config, self.roots)
                for record in records.to_pylist()
            ]
        return pa.Table.from_pylist([asdict(checked) for checked in found], schema=CHECKED)


@dataclass(frozen=True)
class HashFiles:
    """Operator of a task: maps names of files to their hashes."""

    folder: Location

    def __call__(self, files: pa.Table) -> pa.Table:
        names = files["name"].to_pylist()
        with patience(_PATIENCE):
            hashes = [self._sha256(name) for name in names]
        return pa.table([names, hashes], schema=_HASHED)

    def _sha256(self, name: str) -> str:
        try:
            return sha256((self.folder / name).read_bytes(MAX_BYTES))
        except (FileNotFoundError, StorageRefusedError):
            return ""  # checked when its own split is
