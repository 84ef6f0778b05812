"""Read the files of a packed row: one request for a range of its shard, whose hash the index has.

A row that is missing, damaged or unusable is an `UnusableRowError`, which a stream may answer with another image.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from pipelines.errors import UserError
from pipelines.storage import locate

PACK_AGAIN = "Delete the pack and run prepare_data.py again"


class UnusableRowError(Exception):
    """A packed row that is missing, damaged or not usable. The message is a sentence without its full stop."""


def unusable(shard: str, entry: Mapping[str, Any], reason: object) -> UnusableRowError:
    """Return the error for the row of an INDEX entry."""
    text = " ".join(str(reason).split()).rstrip(".")
    return UnusableRowError(f"Row {entry['row']} of {shard}, image {entry['image_id']}, cannot be used: {text}")


def read_files(shard: str, entry: Mapping[str, Any], first: str, second: str) -> tuple[memoryview, memoryview]:
    """Read two files of a row that follow one another, for as long as the storage's patience allows.

    Args:
        shard: the URI of its shard.
        entry: the row's INDEX entry.
        first: name of a column, "panoptic" or "image".
        second: name of the next one.

    Raises:
        UnusableRowError: the row is missing or damaged, also in the shard opened anew.
        StorageUnavailableError: the storage does not answer.
        UserError: the storage refuses.
    """
    try:
        return _read_and_check(shard, entry, first, second, anew=False)
    except (UnusableRowError, UserError):
        return _read_and_check(shard, entry, first, second, anew=True)  # it may have been replaced since it was opened


def _read_and_check(
    shard: str, entry: Mapping[str, Any], first: str, second: str, anew: bool
) -> tuple[memoryview, memoryview]:
    start = entry[first]["offset"]
    end = entry[second]["offset"] + entry[second]["bytes"]
    try:
        content = memoryview(locate(shard).read_range(start, end - start, anew))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise unusable(shard, entry, "the file does not exist") from error
    except OSError as error:
        if error.errno is not None:  # of this machine, such as too many open files, so another attempt may succeed
            message = f"Cannot read image {entry['image_id']}, row {entry['row']} of {shard}: {error}"
            raise OSError(error.errno, message) from error
        raise unusable(shard, entry, error) from error
    files = content[: entry[first]["bytes"]], content[entry[second]["offset"] - start :]
    for name, file in zip((first, second), files, strict=True):
        if hashlib.sha256(file).digest() != entry[name]["sha256"]:
            raise UnusableRowError(
                f"Row {entry['row']} of {shard} is damaged: its bytes are not those of image {entry['image_id']} as "
                f"packed"
            )
    return files
