"""The pictures and videos that a command line names: files, folders, globs, object-store prefixes and lists.

Listings are streamed, in the same order each time. A listing holds the names of one folder and of those above it in
memory.
"""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pyarrow import fs

from maskformer.untrusted import escaped
from pipelines.errors import UserError
from pipelines.inference.names import common_folder, output_name, parts_of
from pipelines.storage import Location, absolute, is_remote, locate, retried

logger = logging.getLogger(__name__)

PICTURES = (".jpg", ".jpeg", ".jpe", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Suffixes of the files that are taken from a folder."""
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
"""Suffixes of videos, which must be named, by a glob or a list too."""

_MAX_LIST_BYTES = 2**28

Kind = Literal["file", "folder", "glob", "list", "missing"]


@dataclass(frozen=True)
class Item:
    """A picture or a video to segment."""

    source: str
    """Absolute path or URI."""
    name: str
    """Name of its outputs, below the output folder and without suffix."""

    @property
    def is_video(self) -> bool:
        return self.source.lower().endswith(VIDEOS)


@dataclass(frozen=True)
class _Root:
    kind: Kind
    uri: str


class Inputs:
    """All items of a command line; iterating again lists them again."""

    def __init__(self, inputs: Sequence[str], output: str) -> None:
        """Look at what is named, without listing it.

        Args:
            inputs: as on the command line.
            output: folder whose files are no inputs.

        Raises:
            UserError: nothing is named, or nothing that is named exists.
        """
        if not inputs:
            raise UserError("There is no picture to segment. Name files, folders, globs, s3:// prefixes or @lists.")
        self._output = absolute(output)
        self._roots = [_root(each) for each in inputs]
        if all(root.kind == "missing" for root in self._roots):
            names = ", ".join(escaped(root.uri) for root in self._roots[:5])
            raise UserError(f"There is nothing at {names}. Name existing pictures, folders or s3:// prefixes.")
        folders = [folder for root in self._roots for folder in _folders(root)]
        self._base = common_folder(folders)
        buckets = {f"{folder[0]}//{folder[1]}" for folder in folders if folder[0].endswith(":")}
        self.stores = {bucket: locate(bucket) for bucket in buckets}
        """The object stores with inputs, by the beginning of their URIs. Workers open objects through these."""

    def __iter__(self) -> Iterator[Item]:
        for root in self._roots:
            for source in _sources(root, self._output):
                yield Item(source, output_name(source, self._base))


def _root(text: str) -> _Root:
    if text.startswith("@"):
        location = locate(text[1:])
        if not location.exists() or location.is_dir():
            raise UserError(f"There is no list {location}. Give a text file with a path in each line after @.")
        return _Root("list", str(location))
    uri = absolute(text)
    if is_remote(uri):
        location = locate(uri)
        return _Root("folder" if location.is_dir() else "file" if location.exists() else "missing", uri)
    if os.path.lexists(uri):
        return _Root("folder" if os.path.isdir(uri) else "file", uri)
    return _Root("glob" if glob.has_magic(uri) else "missing", uri)


def _folders(root: _Root) -> Iterator[list[str]]:
    """Yield the folders, in parts, below which names of outputs start."""
    if root.kind == "list":
        folders = {os.path.dirname(source) for source in _lines(root.uri)}
        yield from (parts_of(folder) for folder in folders)
    elif root.kind == "glob":
        parts = parts_of(root.uri)
        yield parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))]
    else:
        yield parts_of(root.uri) if root.kind == "folder" else parts_of(root.uri)[:-1]


def _sources(root: _Root, output: str) -> Iterator[str]:
    match root.kind:
        case "list":
            yield from _lines(root.uri)
        case "glob":
            found = {path for path in _matches(root.uri) if os.path.isfile(path)}
            of_others = (path for path in found if not f"{path}/".startswith(f"{output}/"))
            yield from sorted(path for path in of_others if path.lower().endswith(PICTURES + VIDEOS))
        case "folder" if is_remote(root.uri):
            yield from _in_store(locate(root.uri), output)
        case "folder":
            yield from _in_folder(root.uri, output)
        case _:
            yield root.uri


def _lines(uri: str) -> Iterator[str]:
    """Yield the paths in a list, absolute; relative ones start in the working directory."""
    for line in locate(uri).read_bytes(_MAX_LIST_BYTES).splitlines():
        if line.strip():
            yield absolute(os.fsdecode(line))


def _matches(pattern: str) -> Iterator[str]:
    """Yield the paths that match a pattern, some of them several times if it has several `**`."""
    if pattern.endswith("/**"):
        pattern += "/*"
    before, deep, after = pattern.partition("/**/")
    if not deep:
        yield from glob.iglob(pattern)
        return
    for folder in glob.iglob(before or "/"):
        for path, is_folder in _below(folder):
            if is_folder:
                yield from _matches(f"{glob.escape(path)}/{after}")


def _in_folder(folder: str, output: str) -> Iterator[str]:
    for path, is_folder in _below(folder, output):
        if not is_folder and path.lower().endswith(PICTURES) and os.path.isfile(path):
            yield path


def _below(folder: str, left_out: str = "") -> Iterator[tuple[str, bool]]:
    """Yield a folder and all paths below it in order, except hidden ones, and whether each is a folder.

    Links to folders are not followed, since they may lead in circles.
    """
    waiting = [(folder, True)]
    while waiting:
        path, is_folder = waiting.pop()
        if path == left_out:
            continue
        yield path, is_folder
        if not is_folder:
            continue
        try:
            with os.scandir(path) as entries:
                found = sorted((each.name, each.is_dir(follow_symlinks=False)) for each in entries)
        except OSError as error:
            logger.warning("The folder %s is left out: %s.", escaped(path), error.strerror)
            continue
        waiting += [(os.path.join(path, name), is_dir) for name, is_dir in reversed(found) if name[0] != "."]


def _in_store(folder: Location, output: str) -> Iterator[str]:
    selector = fs.FileSelector(folder.path, allow_not_found=True)
    infos = retried("list", folder, lambda: folder.filesystem.get_file_info(selector))
    for info in sorted(infos, key=lambda info: info.base_name):
        inside = folder / info.base_name
        if info.base_name.startswith(".") or str(inside) == output:
            continue
        if info.type == fs.FileType.Directory:
            yield from _in_store(inside, output)
        elif info.base_name.lower().endswith(PICTURES):
            yield str(inside)
