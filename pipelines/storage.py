"""Files and folders, addressed in the same way on a local disk and in an object store (s3://).

Credentials, region and endpoint come from the environment only (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...),
never from a configuration. Writes are atomic: an object store guarantees that, and on a local disk a file is
written under a temporary name in the same folder and renamed.

A storage may be away for a while: each operation is tried again until the patience of the process (`set_patience`) is
over. What waiting cannot change, such as a wrong bucket or key, is a UserError at once.
"""

import errno
import hashlib
import io
import logging
import os
import posixpath
import random
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.error import HTTPError

import pyarrow as pa
from pyarrow import fs

from maskformer.untrusted import NotRegularError, escaped, open_regular
from pipelines.credentials import open_url, redacted, redirect, refuse_credentials
from pipelines.errors import StorageRefusedError, StorageUnavailableError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_NOT_REGULAR = {  # a socket, a device, a file of /proc, no name of a file
    *(errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG)
}
_NO_SUCH_NAME = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_AWAY = {  # of a network mount, mostly
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN, errno.EREMOTEIO),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNREFUSED),
}
_FROM_S3 = re.compile(r"AWS Error|errors when deleting objects in S3 bucket")  # not from decoding what was read
_PERMANENT = re.compile(  # answers of S3 that stay the same, in the words of pyarrow; all others may be an outage
    r"AWS Error (ACCESS_DENIED|(INVALID|MISSING)_\w+|SIGNATURE_DOES_NOT_MATCH|INCOMPLETE_SIGNATURE|UNRECOGNIZED_CLIENT"
    r"|OPT_IN_REQUIRED|VALIDATION|NO_SUCH_BUCKET|RESOURCE_NOT_FOUND"
    r"|UNKNOWN \(HTTP status (3\d\d|4(?!08|09|25|29)\d\d)\))"  # but timeout, conflict, too early, too many requests
    r"|curlCode: (3|60|77),"  # malformed address; certificate
)
_DELETED = re.compile(r"AWS Error NO_SUCH_KEY")  # after it was opened

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0  # seconds between two tries
_CONNECT_TIMEOUT, _REQUEST_TIMEOUT = 5, 10  # seconds; the second is how long not one byte may come
_patience = 10.0  # a job's own process: a mistyped endpoint is reported soon
_patience_here: ContextVar[float | None] = ContextVar("patience", default=None)  # each thread has its own
_outages: dict[str, object] = {}  # the storages for which this process is waiting, and the call that reports each
_jitter = random.SystemRandom()  # leaves the generators of the training alone, and differs between forked processes


def set_patience(seconds: float) -> None:
    """Set for how many seconds this process tries a storage that does not answer; 0: once."""
    global _patience
    _patience = seconds


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Set the patience of `set_patience` for this thread only, such as 0 for what can be done another time.

    Within another such block, the shorter one holds.
    """
    outer = _patience_here.get()
    token = _patience_here.set(seconds if outer is None else min(seconds, outer))
    try:
        yield
    finally:
        _patience_here.reset(token)


def is_remote(uri: str) -> bool:
    """Return whether `uri` names an object store rather than a path on this machine."""
    return bool(_SCHEME.match(uri)) and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """Return a path as an absolute path, since workers run in another directory, and a URI without a trailing slash.

    Raises:
        UserError: the URI has a user name, password, key or token in it.
    """
    refuse_credentials(uri)
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
        if self.is_local:  # where a name need not be UTF-8, as pyarrow wants it
            return retried("list", self, lambda: sorted(_listed(self.path)))
        selector = fs.FileSelector(self.path, allow_not_found=True)
        infos = retried("list", self, lambda: self.filesystem.get_file_info(selector))
        return sorted(info.base_name for info in infos)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file in this folder and in its subfolders, by the path below this folder."""
        if self.is_local:
            return retried("list", self, lambda: _local_sizes(self.path))
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        infos = retried("list", self, lambda: self.filesystem.get_file_info(selector))
        start = len(self.path) + 1
        return {info.path[start:]: info.size or 0 for info in infos if info.type == fs.FileType.File}

    def size(self) -> int:
        """Return the bytes of this file, or of all files in this folder; 0 if it does not exist."""
        if self.is_local:
            if self._kind() == fs.FileType.File:
                return retried("list", self, lambda: os.stat(self.path).st_size)
            return sum(self.sizes().values())
        info = retried("list", self, lambda: self.filesystem.get_file_info(self.path))
        if info.type == fs.FileType.File:
            return info.size or 0
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        infos = retried("list", self, lambda: self.filesystem.get_file_info(selector))
        return sum(info.size or 0 for info in infos)

    def read_bytes(self, limit: int | None = None) -> bytes:
        """Return the content of this file.

        Args:
            limit: refuse a file of more bytes, of which no more are read.

        Raises:
            StorageRefusedError: it is no regular file, such as a FIFO, or it has more bytes than `limit`.
        """

        def read() -> bytes | None:
            if self.is_local:
                with open_regular(self.path) as file:
                    if limit is None:
                        return file.read()
                    if (size := os.fstat(file.fileno()).st_size) > limit:
                        return None
                    if len(content := file.read(size + 1)) > size:  # in /proc, where files may have no end
                        raise NotRegularError(None, f"it has more bytes than its size of {size:,}", self.path)
                    return content
            with self.filesystem.open_input_file(self.path) as file:  # an input stream requests 256 KiB at a time
                return file.read() if limit is None or file.size() <= limit else None

        content = retried("read", self, read)
        if content is None:
            raise StorageRefusedError(
                f"{escaped(self.uri)} has more than {limit:,} bytes, which are the most that are read of such a file. "
                f"Make it smaller."
            )
        return content

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_range(self, offset: int, length: int, anew: bool = False) -> bytes:
        """Read `length` bytes from `offset` on with one request, or fewer if the file ends before.

        An object stays open in this process, which holds nothing but its size, so that this is not requested again.

        Args:
            anew: open the object again, which may have been replaced.
        """

        def read() -> bytes:
            if self.is_local:
                with open_regular(self.path) as file:
                    return os.pread(file.fileno(), length, offset)
            try:
                return _opened(self.uri, _settings()).read_at(length, offset)
            except OSError:
                _opened.cache_clear()  # one that failed once may fail forever
                raise

        if anew:
            _opened.cache_clear()
        return retried("read", self, read)

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Write the file atomically, creating its parent folders.

        Raises:
            UserError: the disk is full, or the file may not be written. No partial file is left.
        """

        def write() -> None:
            if self.is_local:
                _replace(Path(self.path), lambda file: file.write(data))
            else:
                with self.filesystem.open_output_stream(self.path) as stream:
                    stream.write(data)

        retried("write", self, write)

    def write_with(self, fill: Callable[[BinaryIO], object]) -> tuple[str, int]:
        """Write the file atomically, creating its parent folders, with what `fill` writes to the file it is given.

        On a local disk the content need not be in memory as a whole. `fill` may be called again, as in `retried`.

        Returns:
            The SHA-256 of the content in hexadecimal, and its bytes.

        Raises:
            UserError: as `write_bytes`.
        """

        def hashed(file: BinaryIO) -> tuple[str, int]:
            through = _Hashed(file)
            try:
                fill(cast(BinaryIO, through))
            except Exception:
                if through.error is not None:
                    raise through.error from None  # torch.save hides it behind a RuntimeError
                raise
            return through.hash.hexdigest(), through.bytes

        if self.is_local:
            return retried("write", self, lambda: _replace(Path(self.path), hashed))
        memory = io.BytesIO()  # since a stream to an object store completes the object even when `fill` fails
        result = hashed(memory)
        self.write_bytes(memory.getbuffer())
        return result

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def delete(self) -> None:
        """Delete this file, or this folder and its contents. It need not exist."""

        def delete() -> None:
            kind = self.filesystem.get_file_info(self.path).type
            with suppress(FileNotFoundError):  # another process, or an earlier try, may have deleted it
                if kind == fs.FileType.Directory:
                    self.filesystem.delete_dir(self.path)
                elif kind != fs.FileType.NotFound:
                    self.filesystem.delete_file(self.path)

        retried("delete", self, delete)

    def _kind(self) -> fs.FileType:
        if self.is_local:
            return retried("access", self, lambda: _local_kind(self.path))
        return retried("access", self, lambda: self.filesystem.get_file_info(self.path).type)


class _Hashed(io.RawIOBase):
    """Passes what is written on to another file, and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        size = memoryview(data).nbytes
        self.bytes += size
        return size


def _local_kind(path: str) -> fs.FileType:
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # such as a NUL in the name
        return fs.FileType.NotFound
    except OSError as error:
        if error.errno in _NO_SUCH_NAME:
            return fs.FileType.NotFound
        raise
    if stat.S_ISDIR(mode):
        return fs.FileType.Directory
    return fs.FileType.File if stat.S_ISREG(mode) else fs.FileType.Unknown


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if os.path.exists(path):
            raise
        return []


def _local_sizes(root: str) -> dict[str, int]:
    """Return the bytes of each file below a folder. Links are followed, but no folder is listed twice."""
    sizes: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(root, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            names.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        for path in (os.path.join(folder, name) for name in files):
            try:
                state = os.stat(path)
            except OSError as error:
                if error.errno not in _NO_SUCH_NAME:  # a link to nothing, or a file that was deleted meanwhile
                    raise
            else:
                if stat.S_ISREG(state.st_mode):
                    sizes[os.path.relpath(path, root)] = state.st_size
    return sizes


def _replace(target: Path, fill: Callable[[BinaryIO], T]) -> T:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            result = fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        return result
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def retried(action: str, location: Location, operation: Callable[[], T]) -> T:
    """Return the result of `operation`, tried again until the storage answers or the patience is over.

    `operation` is repeated from its start, so doing it twice must be the same as once.

    Args:
        action: what it does with the location, for messages: "read", "write", ...

    Raises:
        StorageUnavailableError: the storage did not answer for as long as the patience of this process or thread.
        StorageRefusedError: waiting will not help: a wrong bucket, key or region, no permission, or a full disk.
        FileNotFoundError: the file does not exist.
        OSError: anything else that neither the storage's absence nor the user explains.
    """
    return _retried(action, location.uri, operation)


def _retried(action: str, uri: str, operation: Callable[[], T]) -> T:
    bucket = "/".join(uri.split("/")[:3]) if is_remote(uri) else ""
    overridden = _patience_here.get()
    seconds = _patience if overridden is None else overridden
    failed_at = None  # when the first try failed
    waiting = _FIRST_WAIT
    call = object()
    try:
        while True:
            try:
                result = operation()
            except FileNotFoundError:
                raise
            except OSError as error:
                if _DELETED.search(str(error)):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
                if not _is_away(error, uri):
                    explained = _explained(error, action, uri)
                    if explained is None:
                        raise
                    raise explained from error
                now = time.monotonic()
                first, failed_at = failed_at is None, failed_at or now
                remaining = failed_at + seconds - now
                if remaining <= 0:
                    raise _unavailable(error, action, uri, now - failed_at) from error
                if first and _outages.setdefault(bucket, call) is call:
                    logger.warning(
                        f"Storage {bucket or uri} does not answer ({_one_line(error)}); trying again for up to "
                        f"{_duration(seconds)}."
                    )
            else:
                if failed_at is not None and _outages.get(bucket) is call:
                    logger.info(
                        f"Storage {bucket or uri} answers again after {_duration(time.monotonic() - failed_at)}."
                    )
                return result
            time.sleep(min(remaining, waiting * _jitter.uniform(0.5, 1)))
            waiting = min(2 * waiting, _LONGEST_WAIT)
    finally:
        if _outages.get(bucket) is call:
            del _outages[bucket]


def _is_away(error: OSError, uri: str) -> bool:
    """Return whether the storage may answer `error` differently after a while."""
    if error.errno in _AWAY:
        return True
    if uri.startswith("s3://"):
        text = str(error)
        return bool(_FROM_S3.search(text)) and not _PERMANENT.search(text)
    return is_remote(uri)  # another store's answers are not known here


def _explained(error: OSError, action: str, uri: str) -> StorageRefusedError | None:
    """Return a StorageRefusedError for what the user can correct; None for other errors."""
    if is_remote(uri):
        if _FROM_S3.search(str(error)):
            return StorageRefusedError(f"Cannot {action} {uri}: {_one_line(error)}. {_credentials_hint()}")
    elif isinstance(error, NotRegularError) or error.errno in _NOT_REGULAR:
        return StorageRefusedError(
            f"Cannot {action} {escaped(uri)}: {error.strerror}. Name a regular file, or a link to one."
        )
    elif error.errno in _FULL:
        return StorageRefusedError(
            f"Cannot {action} {uri}: no space is left ({error.strerror}). Files written earlier stay valid. "
            f"Free some space or choose another location, and run the same command again."
        )
    elif error.errno in _FORBIDDEN:
        return StorageRefusedError(
            f"Cannot {action} {uri}: {os.strerror(error.errno)}. Choose a location that this user may {action}."
        )
    return None


def _unavailable(error: OSError, action: str, uri: str, seconds: float) -> StorageUnavailableError:
    tried = f"for {_duration(seconds)}" if seconds else "when asked once"
    check = _credentials_hint() if is_remote(uri) else "Check the disk or the network mount."
    return StorageUnavailableError(
        f"Cannot {action} {uri}: the storage did not answer {tried}; the last error was: {_one_line(error)}. Once it "
        f"answers, the same command resumes. {check}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _one_line(error: BaseException) -> str:
    return redacted(" ".join(str(error).split())).rstrip(".")


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
        UserError: the scheme is unknown or the URI malformed, or has a user name, password, key or token in it.
        StorageUnavailableError: the bucket's region cannot be requested.
    """
    uri = absolute(os.fspath(uri))
    if not uri.isascii():
        try:
            uri.encode()
        except UnicodeEncodeError:
            raise UserError(f"The name {escaped(uri)} is not UTF-8. Rename the file or folder.") from None
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
        filesystem, root = _retried("open", uri, lambda: _remote(f"{scheme}://{bucket}", _settings()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(
            f"Cannot open {uri}: {_one_line(error)}. Use a path or a URI such as s3://bucket/folder. "
            f"{_credentials_hint()}"
        ) from error
    return Location(filesystem, posixpath.join(root, key) if key else root, uri)


def _settings() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))


class _S3(fs.S3FileSystem):
    """S3 where a request is tried once, so that `retried` alone decides, in each process that receives it."""

    def __init__(self, region: str, endpoint: str | None) -> None:
        super().__init__(
            region=region,
            endpoint_override=endpoint,
            connect_timeout=_CONNECT_TIMEOUT,
            request_timeout=_REQUEST_TIMEOUT,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        )
        self._arguments = (region, endpoint)

    def __reduce__(self) -> tuple[type, tuple]:
        return _S3, self._arguments  # pyarrow's own would drop the retry strategy


@lru_cache(maxsize=16)
def _remote(bucket: str, settings: tuple[tuple[str, str], ...]) -> tuple[fs.FileSystem, str]:
    """Open a bucket, once per environment, since each opening requests the bucket's region."""
    filesystem, root = fs.FileSystem.from_uri(bucket)
    if isinstance(filesystem, fs.S3FileSystem):
        environment = dict(settings)
        endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        if endpoint:
            refuse_credentials(endpoint, "The endpoint in $AWS_ENDPOINT_URL")
            _refuse_redirects(endpoint, root)
        filesystem = _S3(filesystem.region, endpoint)
    return filesystem, root


def _refuse_redirects(endpoint: str, bucket: str) -> None:
    """Refuse an endpoint that redirects: the client follows, and sends content and session token to the other host too.

    The client cannot be told not to. AWS redirects between its own regions, so only a given endpoint is asked, once for
    each bucket, and without credentials. Unlike jobs, the client uses no proxy of the environment.

    Raises:
        StorageRefusedError: it redirects.
    """
    target = ""
    try:
        open_url(f"{endpoint.rstrip('/')}/{bucket}", _CONNECT_TIMEOUT, direct=True).close()
    except HTTPError as error:
        target = redirect(error.code, error.headers.get("Location"))
        error.close()
    except (OSError, ValueError, HTTPException):
        return  # the client itself finds out, and tries again
    if target:
        raise StorageRefusedError(
            f"The S3 endpoint {endpoint} answers with a redirect to {target}, which is not followed: credentials "
            f"would be sent there. If that is your storage, set $AWS_ENDPOINT_URL to its address."
        )


@lru_cache(maxsize=4096)
def _opened(uri: str, settings: tuple[tuple[str, str], ...]) -> pa.NativeFile:
    location = locate(uri)
    return location.filesystem.open_input_file(location.path)


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
