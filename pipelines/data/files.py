"""Reading the files that an annotation JSON names: regular files of bounded size, in the folders of the data set.

A JSON and the links in a folder may come from a stranger. What they lead to outside would be packed, and published.
"""

import os
import re

from maskformer.image_files import MAX_BYTES
from maskformer.untrusted import escaped
from pipelines.errors import UserError
from pipelines.storage import Location

_DRIVE = re.compile("[A-Za-z]:")


class NameOutsideError(UserError):
    """A file name that is absolute or leaves its folder."""


class FileOutsideError(UserError):
    """A link to a file outside of the data set's folders."""


def is_name_inside(name: str) -> bool:
    """Return whether a file name, of any system, stays below its folder as it is written."""
    return (
        not name.startswith(("/", "\\")) and not _DRIVE.match(name) and ".." not in name.replace("\\", "/").split("/")
    )


def resolved(location: Location) -> str:
    """Return the path without links; of an object store, as it is."""
    return os.path.realpath(location.path) if location.is_local else location.path


def is_inside(path: str, roots: tuple[str, ...]) -> bool:
    """Return whether a path is one of the folders or below one, all without links."""
    return any(path == root or path.startswith(f"{root.rstrip('/')}/") for root in roots)


def read_file(folder: Location, name: str, roots: tuple[str, ...]) -> bytes:
    """Return the content of an image or PNG that the annotations name.

    Args:
        folder: that `name` is relative to.
        roots: folders in which it must really be, from `resolved`.

    Raises:
        NameOutsideError: the name leaves the folder.
        FileOutsideError: a link leads out of `roots`.
        FileNotFoundError: it does not exist.
        StorageRefusedError: it is not a regular file, too large, or may not be read.
    """
    location = folder / name
    if not is_name_inside(name):
        raise NameOutsideError(f"The file name {escaped(name, 200)} leaves the folder {escaped(folder)}. Correct it.")
    if location.is_local and not is_inside(real := os.path.realpath(location.path), roots):
        raise FileOutsideError(
            f"{escaped(location)} leads out of the data set's folders, to {escaped(real)}. Copy the file into the "
            f"folder, or name the folder where it really is with --images or --panoptic."
        )
    return location.read_bytes(MAX_BYTES)
