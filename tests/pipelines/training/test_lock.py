"""The lock of a run's folder: real processes that are killed, racing drivers, and another machine's driver in S3."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError, IncompleteReadError, NoCredentialsError
from moto.s3.responses import S3Response

from jobs.bench.shared.faulty_server import FaultyServer
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.storage import Location, locate, patience
from pipelines.training import lock
from pipelines.training.lock import locked
from tests.waiting import wait_for

LOCK = "pipelines.training.lock"
HOLDER = """
import subprocess, sys
from pipelines.storage import locate
from pipelines.training.lock import locked
with locked(locate(sys.argv[1]), "run"):
    child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, close_fds=False)  # as Ray's processes
    print(child.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(f"{request.getfixturevalue('bucket')}/run" if request.param == "s3" else tmp_path / "run")


@pytest.fixture
def remote(bucket: str) -> Location:
    return locate(bucket) / "run"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, LOCK)
    return caplog


def messages(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOCK and part in record.getMessage()]


def content(folder: Location) -> dict[str, Any]:
    file = folder / "driver.lock"
    if folder.is_local:
        return json.loads(file.read_bytes())
    # In one request: the object may be written anew between the two of a Location.
    bucket, _, key = file.path.partition("/")
    return json.loads(boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read())


def is_free(folder: Location) -> bool:
    file = folder / "driver.lock"
    return file.read_bytes() == b"" if folder.is_local else not file.exists()


@contextmanager
def other_driver(folder: Location) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Start a process that holds the lock; give it and the process number of its child."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = None
    try:
        assert holder.stdout
        child = int(holder.stdout.readline())
        yield holder, child
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.communicate()


def foreign(**changes: Any) -> lock._Owner:
    """Return an owner on another machine."""
    return replace(lock._Owner.this_process(), host="elsewhere", machine="another", pid=4321, token="theirs", **changes)


def put(folder: Location, owner: lock._Owner) -> None:
    (folder / "driver.lock").write_bytes(owner.to_bytes())


def test_one_driver_at_a_time(folder: Location) -> None:
    with locked(folder, "run"):
        assert content(folder)["pid"] == os.getpid()
        with pytest.raises(UserError, match="Another driver works on the run in") as refused, locked(folder, "run"):
            pass
        for part in (f"process {os.getpid()} on {socket.gethostname()} since 20", "UTC", str(folder), "another name"):
            assert part in str(refused.value)
    assert is_free(folder)
    with pytest.raises(ZeroDivisionError), locked(folder, "run"):
        _ = 1 / 0
    assert is_free(folder)
    with locked(folder, "run"):
        pass


def test_no_word_after_an_orderly_end(folder: Location, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with locked(folder, "run"):
            pass
    assert not messages(caplog, "")


def test_a_killed_drivers_lock_is_taken_over(folder: Location, caplog: pytest.LogCaptureFixture) -> None:
    with other_driver(folder) as (holder, child):
        with pytest.raises(UserError, match=f"process {holder.pid} on {socket.gethostname()}"), locked(folder, "run"):
            pass
        holder.send_signal(signal.SIGKILL)
        # It stays a zombie, as in a container whose first process collects none; its own child lives on.
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE
        with locked(folder, "sweep"):
            assert content(folder)["pid"] == os.getpid()
            assert psutil.pid_exists(child)
    assert [f"process {holder.pid} " in message for message in messages(caplog, "Took over the sweep in")] == [True]


@pytest.fixture
def atomic_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a conditional write of moto one step, as S3 promises: moto looks first and writes then."""
    one_at_a_time = threading.Lock()
    for name in ("put_object", "delete_object"):

        def serialized(self: S3Response, original: Callable[..., Any] = getattr(S3Response, name)) -> Any:  # noqa: B008
            with one_at_a_time:
                return original(self)

        monkeypatch.setattr(S3Response, name, serialized)


@pytest.mark.usefixtures("atomic_s3")
@pytest.mark.parametrize("dead", [False, True], ids=["free", "of a dead driver"])
def test_one_of_many_wins(folder: Location, dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.01)
    drivers, rounds = 4, 20 if folder.is_local else 3
    ready, decided = threading.Barrier(drivers), threading.Barrier(drivers)
    outcomes: list[str] = []
    gone = replace(lock._Owner.this_process(), pid=_unused_pid())

    def drive() -> None:
        for _ in range(rounds):
            if ready.wait(60) == 0 and dead:
                put(folder, gone)
            ready.wait(60)
            try:
                with locked(folder, "run"):
                    outcomes.append("won")
                    decided.wait(60)
            except UserError:
                outcomes.append("refused")
                decided.wait(60)

    threads = [threading.Thread(target=drive) for _ in range(drivers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (outcomes.count("won"), outcomes.count("refused")) == (rounds, rounds * (drivers - 1))


def _unused_pid() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def test_who_is_alive() -> None:
    own = lock._Owner.this_process()
    assert own.is_alive() is True
    assert replace(own, pid=_unused_pid()).is_alive() is False
    assert replace(own, process_start=own.process_start - 100).is_alive() is None  # the number may be in use again
    assert replace(own, host="elsewhere").is_alive() is None
    assert replace(own, machine="another boot").is_alive() is None  # or another machine of the same name
    assert replace(own, machine="").is_alive() is None


class Clock:
    """Stands in for `time` in the module: a sleep passes at once, and may do something meanwhile."""

    def __init__(self, during: Callable[[int], float | None] = lambda sleep: None) -> None:
        self.now, self.sleeps, self.during = 1000.0, 0, during

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        self.now += seconds + (self.during(self.sleeps) or 0)


def test_another_machines_driver_that_gives_no_sign(
    remote: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    monkeypatch.setattr(lock, "time", clock)
    put(remote, foreign())
    with locked(remote, "run"):
        assert content(remote)["pid"] == os.getpid()
    assert 1060 <= clock.now < 1066
    waiting, taken = messages(caplog, "")
    assert "held by process 4321 on elsewhere since" in waiting
    assert "Waiting 60 s" in waiting
    assert "Took over" in taken
    assert "process 4321 on elsewhere" in taken


def test_another_machines_driver_that_lives(remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its clock is far behind ours, which must not matter.
    clock = Clock(lambda sleep: put(remote, foreign(renewed=0.0 + sleep)) if sleep == 11 else None)
    monkeypatch.setattr(lock, "time", clock)
    put(remote, foreign(renewed=0.0))
    with pytest.raises(UserError, match="process 4321 on elsewhere"), locked(remote, "run"):
        pass
    assert clock.sleeps == 11
    assert content(remote)["token"] == "theirs"


def test_time_without_the_storage_does_not_count_against_the_owner(
    remote: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(lambda sleep: 300.0 if sleep == 10 else None)  # neither driver could write for 300 s
    monkeypatch.setattr(lock, "time", clock)
    put(remote, foreign())
    with locked(remote, "run"):
        assert clock.now - 1000 >= 10 * 5 + 300 + 60


def test_content_that_is_not_ours(remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "time", Clock())
    (remote / "driver.lock").write_text("locked")
    with locked(remote, "run"):
        assert content(remote)["pid"] == os.getpid()


@pytest.fixture
def faulty(bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    with FaultyServer(s3_server) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


def test_renewed_through_an_outage(
    faulty: FaultyServer, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 0.02)
    folder = locate(bucket) / "run"

    def renewed_since(time: float) -> bool:
        return content(folder)["renewed"] > time

    with locked(folder, "run"):
        wait_for(lambda: renewed_since(content(folder)["since"]), "renewal", seconds=30)
        for mode in ("503", "refuse", "cut"):
            faulty.mode = mode
            assert faulty.wait_for(mode, faulty.counts[mode] + 3)
        faulty.mode = "ok"
        now = content(folder)["renewed"]
        wait_for(lambda: renewed_since(now), "renewal after the outage", seconds=30)
        assert content(folder)["pid"] == os.getpid()
    assert is_free(folder)
    assert messages(caplog, "cannot be renewed at the moment")
    assert not messages(caplog, "taken over")


def test_the_lost_answer_of_a_write(faulty: FaultyServer, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(bucket) / "run"
    write, lost = lock._LockObject._put, []

    def unanswered(self: lock._LockObject, owner: lock._Owner, **condition: str) -> str | None:
        etag = write(self, owner, **condition)
        if not lost:
            lost.append(etag)
            raise TimeoutError(errno.ETIMEDOUT, "no answer")
        return etag

    monkeypatch.setattr(lock._LockObject, "_put", unanswered)
    with locked(folder, "run"):
        assert lost[0]
        assert content(folder)["pid"] == os.getpid()
    assert is_free(folder)


def test_taken_over_meanwhile(
    remote: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 0.02)
    with locked(remote, "run"):
        put(remote, foreign())
        wait_for(lambda: messages(caplog, "Another driver has taken over the run"), "word of it", seconds=30)
    assert "process 4321 on elsewhere" in messages(caplog, "taken over")[0]
    assert content(remote)["token"] == "theirs"


def test_deleted_meanwhile(remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 0.02)
    with locked(remote, "run"):
        (remote / "driver.lock").delete()
        wait_for((remote / "driver.lock").exists, "a new lock", seconds=30)
        assert content(remote)["pid"] == os.getpid()
    assert is_free(remote)


def test_a_storage_that_does_not_answer(faulty: FaultyServer, bucket: str) -> None:
    folder = locate(bucket) / "run"
    faulty.mode = "503"
    with patience(0.5), pytest.raises(StorageUnavailableError, match=r"driver\.lock"), locked(folder, "run"):
        pass
    assert faulty.counts["503"] > 1


def test_a_storage_that_answers_again(faulty: FaultyServer, bucket: str) -> None:
    folder = locate(bucket) / "run"
    faulty.mode = "503"
    awakener = threading.Thread(target=lambda: faulty.wait_for("503", 2) and setattr(faulty, "mode", "ok"))
    awakener.start()
    with patience(30), locked(folder, "run"):
        assert content(folder)["pid"] == os.getpid()
    awakener.join()


def _answer(status: int, code: str = "") -> ClientError:
    answer: Any = {"Error": {"Code": code, "Message": "words"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (_answer(412, "PreconditionFailed"), None),
        (_answer(409, "ConditionalRequestConflict"), None),
        (_answer(404, "NoSuchKey"), None),
        (_answer(404, "NoSuchBucket"), UserError),
        (_answer(403, "AccessDenied"), UserError),
        (_answer(400, "ExpiredToken"), UserError),
        (NoCredentialsError(), UserError),
        (_answer(400, "RequestTimeout"), TimeoutError),
        (_answer(503, "SlowDown"), TimeoutError),
        (_answer(500), TimeoutError),
        (IncompleteReadError(actual_bytes=1, expected_bytes=2), TimeoutError),
        (_answer(501, "NotImplemented"), NotImplementedError),
    ],
)
def test_answers_of_s3(remote: Location, error: Exception, becomes: type[Exception] | None) -> None:
    def answered() -> None:
        with lock._LockObject(remote / "driver.lock")._explained():
            raise error

    if becomes:
        with pytest.raises(becomes) as raised:
            answered()
        assert type(raised.value) is becomes
    else:
        answered()


def test_a_bucket_that_does_not_exist(bucket: str) -> None:
    folder = locate(bucket) / "run"
    folder = replace(folder, path=f"no-such-{folder.path}")
    with pytest.raises(UserError, match=r"cannot be written: .*NoSuchBucket"), locked(folder, "run"):
        pass


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_in_the_folders_place(tmp_path: Path, below: str) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="Cannot lock"), locked(locate(tmp_path / "run" / below), "run"):
        pass
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize(
    ("function", "number"), [("open", errno.EROFS), ("open", errno.EACCES), ("pwrite", errno.ENOSPC)]
)
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, function: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(lock.os, function, fail)
        with pytest.raises(UserError, match="Cannot lock"), locked(locate(tmp_path), "run"):
            pass
    with locked(locate(tmp_path), "run"):  # nothing holds it
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(locate(tmp_path), "run"):
        pass
    assert messages(caplog, f"{tmp_path} cannot be locked: its file system has no locks")


def test_an_object_store_without_conditional_writes(
    remote: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise NotImplementedError("its S3 knows no conditional write")

    monkeypatch.setattr(lock._LockObject, "create", fail)
    for folder in (remote, replace(remote, uri="gs://bucket/run")):
        entered = False
        with locked(folder, "run"):
            entered = True
        assert entered
        assert messages(caplog, f"{folder} cannot be locked")
