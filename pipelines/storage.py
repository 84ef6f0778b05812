"""One way to name a place, whether a local path or an s3:// URI.

Credentials, region and endpoint come from the environment only (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...),
never from a configuration. A file becomes visible whole or not at all: an object store does that by
itself, and on a local disk it is written beside its place and renamed.
"""

import errno
import hashlib
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipelines.errors import UserError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def is_remote(uri: str) -> bool:
    """Tell whether `uri` names an object store rather than a path of this machine."""
    return bool(_SCHEME.match(uri)) and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """Return `uri` unchanged if it has a scheme, else as an absolute path (workers have another directory)."""
    if is_remote(uri):
        scheme, _, path = uri.partition("://")
        return f"{scheme}://{path.rstrip('/')}"
    return os.path.abspath(Path(uri.removeprefix("file://")).expanduser())


@dataclass(frozen=True)
class Location:
    """A file or folder: where it lives and how to reach it. Compare and print it by `uri`."""

    filesystem: fs.FileSystem
    path: str
    uri: str

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, posixpath.join(self.path, name), posixpath.join(self.uri, name))

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def exists(self) -> bool:
        return self._kind() != fs.FileType.NotFound

    def is_dir(self) -> bool:
        return self._kind() == fs.FileType.Directory

    def names(self) -> list[str]:
        """List the names in this folder, sorted; an absent folder has none."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        with _explained("list", self):
            return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def size(self) -> int:
        """Count the bytes of all files in this folder; an absent folder has none."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with _explained("list", self):
            return sum(info.size or 0 for info in self.filesystem.get_file_info(selector))

    def read_bytes(self) -> bytes:
        with _explained("read", self), self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Put `data` in place at once, creating the folders above.

        Raises:
            UserError: the disk is full, or the place may not be written. Nothing of it is left behind.
        """
        with _explained("write", self):
            if self.is_local:
                _replace(Path(self.path), data)
            else:
                with self.filesystem.open_output_stream(self.path) as stream:
                    stream.write(data)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def delete(self) -> None:
        """Delete this file or folder with all in it; absent is fine."""
        kind = self._kind()
        with _explained("delete", self), suppress(FileNotFoundError):  # another process may have been faster
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif kind != fs.FileType.NotFound:
                self.filesystem.delete_file(self.path)

    def _kind(self) -> fs.FileType:
        with _explained("look at", self):
            return self.filesystem.get_file_info(self.path).type


def _replace(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(action: str, place: Location) -> Iterator[None]:
    """Raise what a person can mend as a UserError; that a file is absent, or a disk broken, stays an OSError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if not place.is_local:
            raise UserError(f"Cannot {action} {place}: {_one_line(error)}. {_credentials_hint()}") from error
        if error.errno in _FULL:
            raise UserError(
                f"Cannot {action} {place}: no space is left ({error.strerror}). What was finished before stays "
                f"valid; free some space or choose another place, and run the same command again."
            ) from error
        if error.errno in _FORBIDDEN:
            raise UserError(
                f"Cannot {action} {place}: {os.strerror(error.errno)}. Choose a place that this user may {action}."
            ) from error
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _credentials_hint() -> str:
    keys = "are set" if os.environ.get("AWS_ACCESS_KEY_ID") else "are not set here"
    return (
        f"Check that the bucket exists and may be used with the credentials (AWS_ACCESS_KEY_ID and "
        f"AWS_SECRET_ACCESS_KEY, which {keys}, or a role of the machine), the region (AWS_DEFAULT_REGION) and the "
        f"endpoint (AWS_ENDPOINT_URL) of the environment."
    )


def locate(uri: str | os.PathLike[str]) -> Location:
    """Open the place that a path or URI names; nothing is created or read.

    Raises:
        UserError: the scheme is unknown or the URI malformed.
    """
    uri = absolute(os.fspath(uri))
    if not is_remote(uri):
        return Location(fs.LocalFileSystem(), uri, uri)
    scheme, _, path = uri.partition("://")
    bucket, _, key = path.partition("/")
    if "?" in uri:
        raise UserError(
            f"{uri} has a query, which would be lost on the way to the workers. Set endpoint and region in the "
            f"environment (AWS_ENDPOINT_URL, AWS_DEFAULT_REGION)."
        )
    try:
        filesystem, root = _remote(f"{scheme}://{bucket}", _settings())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(
            f"Cannot open {uri}: {_one_line(error)}. Use a path or a URI such as s3://bucket/folder. "
            f"{_credentials_hint()}"
        ) from error
    return Location(filesystem, posixpath.join(root, key) if key else root, uri)


def _settings() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))


@lru_cache(maxsize=16)
def _remote(bucket: str, settings: tuple[tuple[str, str], ...]) -> tuple[fs.FileSystem, str]:
    """Open a bucket once per environment: each opening asks the store for the bucket's region.

    pyarrow itself tries a request that fails for a passing reason three times.
    """
    return fs.FileSystem.from_uri(bucket)


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
