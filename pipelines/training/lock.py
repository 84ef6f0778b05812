"""One driver at a time for the folder of a run or of a sweep.

On a local disk the kernel holds the lock and frees it when the driver dies. In an object store the lock is an object
that its owner writes anew every 20 seconds; another driver may take it over when that stops.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import psutil

from maskformer.untrusted import parse_json
from pipelines.errors import UserError
from pipelines.storage import Location, retried

logger = logging.getLogger(__name__)

LOCK_FILE = "driver.lock"

# How often the owner of an object writes it anew, and after how long without that another driver takes it over. The
# owner tries twice in that time, even if its first request ends with a time-out.
_RENEWAL_SECONDS = 20.0
_TAKE_OVER_SECONDS = 60.0
_POLL_SECONDS = 5.0
_REQUEST_SECONDS = 5.0

_TAKEN_OVER = "Took over the %s in %s: its last driver is dead (%s)."
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_TRANSIENT = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}


@contextmanager
def locked(folder: Location, what: str) -> Iterator[threading.Event]:
    """Hold a folder for this driver during the block. The folder is created if it does not exist.

    A lock whose owner is dead is taken over: at once on a local disk and where the owner ran on this machine, else
    after 60 seconds without a sign of life. An object store that ignores the conditions of a write (If-None-Match,
    If-Match) gives no protection.

    Args:
        what: what the folder is of, for messages: "run" or "sweep".

    Yields:
        An event, set when another driver has taken the folder over because this one could not renew its lock.

    Raises:
        UserError: another driver holds the folder, or the lock cannot be written.
        StorageUnavailableError: the object store does not answer.
    """
    if folder.is_local:
        hold = _file_held(folder, what)
    elif folder.uri.startswith("s3://"):
        hold = _object_held(folder, what)
    else:
        _warn_unlocked(folder, what, "this kind of storage has no conditional write")
        yield threading.Event()
        return
    with hold as lost:
        yield lost


@dataclass(frozen=True)
class _Owner:
    """The content of a lock: who holds it."""

    host: str
    pid: int
    process_start: float
    """Seconds since 1970, as psutil gives them."""
    machine: str
    """The boot of the kernel and the namespace of its process numbers; empty where there is no /proc."""
    token: str
    since: float
    renewed: float

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} since {since}"

    @classmethod
    def this_process(cls) -> "_Owner":
        pid, now = os.getpid(), time.time()
        started = psutil.Process(pid).create_time()
        return cls(socket.gethostname(), pid, started, _machine(), uuid.uuid4().hex, since=now, renewed=now)

    @classmethod
    def parse(cls, data: bytes) -> "_Owner | None":
        with suppress(ValueError, TypeError):
            return cls(**parse_json(data))
        return None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_alive(self) -> bool | None:
        """Return whether its process runs; None if that cannot be told from here."""
        if not self.machine or (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            # Another start is another process with the same number, or a clock that was set.
            return True if abs(process.create_time() - self.process_start) < 1 else None
        except psutil.NoSuchProcess:
            return False


def _machine() -> str:
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _refuse(folder: Location, what: str, owner: _Owner | None) -> NoReturn:
    raise UserError(
        f"Another driver works on the {what} in {folder}: {owner or 'a process that has only just started'}. Wait "
        f"until it ends, or stop it there; the same command then continues the {what}. Or choose another name."
    )


def _warn_unlocked(folder: Location, what: str, reason: str) -> None:
    logger.warning("%s cannot be locked: %s. Start no second driver of this %s.", folder, reason, what)


@contextmanager
def _file_held(folder: Location, what: str) -> Iterator[threading.Event]:
    """Hold the lock of a folder on a local disk.

    The file stays when the lock is freed: a driver that has opened a file that another one then deletes would lock
    a file that no third driver sees. It is empty while nobody holds it.
    """
    descriptor = retried("lock", folder / LOCK_FILE, lambda: _lock_file(folder, what))
    try:
        yield threading.Event()
    finally:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _lock_file(folder: Location, what: str) -> int:
    """Return the descriptor of the locked file, which holds the lock until it is closed."""
    Path(folder.path).mkdir(parents=True, exist_ok=True)
    # Processes that the driver starts do not inherit it, so that Ray's do not hold the lock of a dead driver.
    descriptor = os.open((folder / LOCK_FILE).path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        held = _flock(descriptor)
        found = _Owner.parse(os.pread(descriptor, 4096, 0))
        if held is False:
            _refuse(folder, what, found)
        if held is None:
            _warn_unlocked(folder, what, "its file system has no locks")
        elif found:
            logger.info(_TAKEN_OVER, what, folder, found)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _Owner.this_process().to_bytes(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _flock(descriptor: int) -> bool | None:
    """Return whether the file could be locked; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextmanager
def _object_held(folder: Location, what: str) -> Iterator[threading.Event]:
    """Hold the lock of a folder in S3."""
    owner = _Owner.this_process()
    try:
        lock = _LockObject(folder / LOCK_FILE)
        etag = _acquire(lock, owner, folder, what)
    except NotImplementedError as error:
        _warn_unlocked(folder, what, str(error))
        yield threading.Event()
        return
    renewal = _Renewal(lock, owner, etag, folder, what)
    renewal.start()
    try:
        yield renewal.lost
    finally:
        renewal.end()


class _LockObject:
    """The lock's object. Writes succeed under a condition only, which the storage checks.

    Every method raises UserError for what the user can correct, TimeoutError if the storage does not answer (also by an
    answer such as 503), and NotImplementedError if it knows no conditions.
    """

    def __init__(self, file: Location) -> None:
        from boto3.session import Session
        from botocore.config import Config

        self.file = file
        bucket, _, key = file.path.partition("/")
        self._name = {"Bucket": bucket, "Key": key}
        with self._explained():
            self._client = Session().client(
                "s3",
                config=Config(
                    connect_timeout=_REQUEST_SECONDS,
                    read_timeout=_REQUEST_SECONDS,
                    retries={"total_max_attempts": 1},
                    request_checksum_calculation="when_required",  # the default needs a newer S3 than some stores have
                ),
            )

    def create(self, owner: _Owner) -> str | None:
        """Write the object; return its ETag, or None if there is one already."""
        return self._put(owner, IfNoneMatch="*")

    def replace(self, etag: str, owner: _Owner) -> str | None:
        """Write the object anew; return its new ETag, or None if it is another one than that of `etag`."""
        return self._put(owner, IfMatch=etag)

    def read(self) -> tuple[str, _Owner | None] | None:
        """Return the object's ETag and its owner, who is None if the content is not ours; None without an object."""
        with self._explained():
            answer = self._client.get_object(**self._name)
            return answer["ETag"], _Owner.parse(answer["Body"].read())
        return None

    def delete(self, etag: str) -> None:
        """Delete the object unless it is another one than that of `etag`."""
        with self._explained():
            self._client.delete_object(**self._name, IfMatch=etag)

    def _put(self, owner: _Owner, **condition: str) -> str | None:
        # The time of the renewal makes each content another one, so that each has another ETag.
        body = replace(owner, renewed=time.time()).to_bytes()
        with self._explained():
            return self._client.put_object(**self._name, Body=body, **condition)["ETag"]
        return None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Leave the block where the condition does not hold; raise all other errors as the class says."""
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        try:
            yield
        except exceptions.ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = error.response.get("Error", {}).get("Code", "")
            if status in (409, 412) or code == "NoSuchKey":
                return
            if status == 501:
                raise NotImplementedError("its S3 knows no conditional write") from error
            if status >= 500 or status == 429 or code in _TRANSIENT:
                raise OSError(errno.ETIMEDOUT, str(error)) from error
            raise self._user_error(error) from error
        except (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.IncompleteReadError,
            ResponseParserError,
        ) as error:
            raise OSError(errno.ETIMEDOUT, str(error)) from error
        except (exceptions.BotoCoreError, ValueError) as error:
            raise self._user_error(error) from error

    def _user_error(self, error: Exception) -> UserError:
        return UserError(
            f"The lock {self.file} cannot be written: {str(error).rstrip('.')}. Check the bucket, and the credentials, "
            f"the region and the endpoint (AWS_ENDPOINT_URL) in the environment."
        )


def _acquire(lock: _LockObject, owner: _Owner, folder: Location, what: str) -> str:
    """Make `owner` the owner of the object; return the object's ETag.

    The sign of life of a driver on another machine is a changed ETag. Clocks of different machines are not compared.
    """
    found = None
    watched, started, looked = None, 0.0, 0.0
    while True:
        if not found and (etag := retried("write", lock.file, lambda: lock.create(owner))):
            return etag
        found = retried("read", lock.file, lock.read)
        if found:
            etag, other = found
            if _is_of(owner, found):
                return etag  # the answer to our own write was lost
            alive = other.is_alive() if other else None
            if alive or etag != (watched or etag):
                _refuse(folder, what, other)
            now = time.monotonic()
            if watched is None:
                watched, started = etag, now
                if alive is None:
                    logger.info(
                        "The %s in %s is held by %s. Waiting %.0f s for a sign that it is alive.",
                        what, folder, other or "an unknown driver", _TAKE_OVER_SECONDS,
                    )  # fmt: skip
            elif now - looked > _RENEWAL_SECONDS:
                started = now  # the storage was away, for the owner too
            looked = now
            dead = alive is False or now - started >= _TAKE_OVER_SECONDS
            if dead and (ours := retried("write", lock.file, lambda etag=etag: lock.replace(etag, owner))):
                logger.info(_TAKEN_OVER, what, folder, other or "unknown")
                return ours
            # If another driver was faster, the next look refuses.
        time.sleep(_POLL_SECONDS)


def _is_of(owner: _Owner, found: tuple[str, _Owner | None]) -> bool:
    return found[1] is not None and found[1].token == owner.token


class _Renewal:
    """Writes the lock's object anew every 20 seconds, in a thread, until `end` deletes it."""

    def __init__(self, lock: _LockObject, owner: _Owner, etag: str, folder: Location, what: str) -> None:
        self._lock, self._owner, self._etag = lock, owner, etag
        self._folder, self._what = folder, what
        self.lost = threading.Event()
        """Set when another driver has the lock."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock renewal", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Free the lock. A storage that does not answer is no error: the next driver sees that this one has ended."""
        self._ended.set()
        self._thread.join()
        try:
            found = self._lock.read()
            if found and _is_of(self._owner, found):
                self._lock.delete(found[0])
        except Exception as error:
            logger.info("The lock %s could not be deleted: %s", self._lock.file, error)

    def _run(self) -> None:
        failing = False
        while not self._ended.wait(_RENEWAL_SECONDS):
            try:
                if not self._renew():
                    return
                failing = False
            except Exception as error:  # whatever it is, the run goes on and the next period tries again
                if not failing:
                    logger.warning("The lock %s cannot be renewed at the moment: %s", self._lock.file, error)
                failing = True

    def _renew(self) -> bool:
        """Write the object anew; return whether it is still ours."""
        etag, found = self._lock.replace(self._etag, self._owner), None
        if not etag and (found := self._lock.read()) and _is_of(self._owner, found):
            etag = found[0]  # the answer to our last write was lost
        if not etag and not found:  # somebody deleted it
            etag = self._lock.create(self._owner)
        if etag:
            self._etag = etag
            return True
        logger.warning(
            "Another driver has taken over the %s in %s (%s), since this one could not renew its lock in time. This "
            "one stops.",
            self._what, self._folder, (found and found[1]) or "unknown",
        )  # fmt: skip
        self.lost.set()
        return False
