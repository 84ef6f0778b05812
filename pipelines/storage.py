"""Files and folders, addressed in the same way on a local disk and in an object store (s3://).

Credentials, region and endpoint come from the environment only (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...),
never from a configuration. Writes are atomic: an object store guarantees that, and on a local disk a file is
written under a temporary name in the same folder and renamed.
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
    """Return whether `uri` names an object store rather than a path on this machine."""
    return bool(_SCHEME.match(uri)) and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """Return a path as an absolute path, since workers run in another directory, and a URI without a trailing slash."""
    if is_remote(uri):
        scheme, _, path = uri.partition("://")
        return f"{scheme}://{path.rstrip('/')}"
    return os.path.abspath(Path(uri.removeprefix("file://")).expanduser())


@dataclass(frozen=True)
class Location:
    """A file or folder and the filesystem that it is on. Compare and print locations by `uri`."""

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
        """List the names in this folder, sorted; empty if the folder does not exist."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        with _explained("list", self):
            return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def size(self) -> int:
        """Return the bytes of this file, or of all files in this folder; 0 if it does not exist."""
        with _explained("list", self):
            info = self.filesystem.get_file_info(self.path)
        if info.type == fs.FileType.File:
            return info.size or 0
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with _explained("list", self):
            return sum(info.size or 0 for info in self.filesystem.get_file_info(selector))

    def read_bytes(self) -> bytes:
        with _explained("read", self), self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Write the file atomically, creating its parent folders.

        Raises:
            UserError: the disk is full, or the file may not be written. No partial file is left.
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
        """Delete this file, or this folder and its contents. It need not exist."""
        kind = self._kind()
        with _explained("delete", self), suppress(FileNotFoundError):  # another process may have deleted it
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif kind != fs.FileType.NotFound:
                self.filesystem.delete_file(self.path)

    def _kind(self) -> fs.FileType:
        with _explained("access", self):
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
def _explained(action: str, location: Location) -> Iterator[None]:
    """Raise what the user can correct as a UserError; a missing file or a broken disk stays an OSError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if not location.is_local:
            raise UserError(f"Cannot {action} {location}: {_one_line(error)}. {_credentials_hint()}") from error
        if error.errno in _FULL:
            raise UserError(
                f"Cannot {action} {location}: no space is left ({error.strerror}). Files written earlier stay valid. "
                f"Free some space or choose another location, and run the same command again."
            ) from error
        if error.errno in _FORBIDDEN:
            raise UserError(
                f"Cannot {action} {location}: {os.strerror(error.errno)}. Choose a location that this user "
                f"may {action}."
            ) from error
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _credentials_hint() -> str:
    keys = "are set" if os.environ.get("AWS_ACCESS_KEY_ID") else "are not set here"
    return (
        f"Check that the bucket exists, and check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, which "
        f"{keys}, or a role of the machine), the region (AWS_DEFAULT_REGION) and the endpoint (AWS_ENDPOINT_URL) in "
        f"the environment."
    )


def locate(uri: str | os.PathLike[str]) -> Location:
    """Return the location that a path or URI names; nothing is created or read.

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
            f"{uri} has a query string, which the workers would not receive. Set endpoint and region in the "
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
    """Open a bucket, once per environment, since each opening requests the bucket's region.

    pyarrow itself retries a request that fails for a transient reason, three times in all.
    """
    return fs.FileSystem.from_uri(bucket)


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
