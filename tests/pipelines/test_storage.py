"""Local folders and S3 (a real API over HTTP) behave alike, outages are waited for, failed writes leave nothing."""

import errno
import hashlib
import http.client
import io
import logging
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from jobs.bench.shared.faulty_server import FaultyServer, Mode
from pipelines import storage
from pipelines.errors import StorageRefusedError, StorageUnavailableError, UserError
from pipelines.storage import Location, absolute, is_remote, locate, patience, retried, set_patience, sha256


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait briefly between tries and for an answer, and restore the patience."""
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(storage, "_REQUEST_TIMEOUT", 1)  # the least that pyarrow knows
    monkeypatch.setattr(storage, "_patience", 60.0)
    storage._remote.cache_clear()


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Return an absent folder."""
    return locate(tmp_path / "folder" if request.param == "local" else request.getfixturevalue("bucket") + "/folder")


def test_written_files_are_found_again(folder: Location) -> None:
    assert not folder.exists()
    assert not folder.is_dir()
    assert folder.names() == []
    data = os.urandom(3 << 20)
    (folder / "deep" / "b").write_bytes(data)
    (folder / "a").write_text("text ü")
    assert folder.is_dir()
    assert folder.names() == ["a", "deep"]
    assert (folder / "deep").names() == ["b"]
    assert (folder / "deep" / "b").read_bytes() == data
    assert (folder / "a").read_text() == "text ü"
    assert (folder / "a").exists()
    assert not (folder / "a").is_dir()


def test_writing_again_replaces(folder: Location) -> None:
    (folder / "a").write_bytes(b"long content")
    (folder / "a").write_bytes(b"short")
    assert (folder / "a").read_bytes() == b"short"
    assert folder.names() == ["a"]


def test_delete(folder: Location) -> None:
    (folder / "a").write_bytes(b"")
    (folder / "deep" / "er" / "b").write_bytes(b"")
    (folder / "a").delete()
    assert folder.names() == ["deep"]
    (folder / "deep").delete()
    assert folder.names() == []
    folder.delete()
    folder.delete()
    assert not folder.exists()
    (folder / "a").delete()


def test_reading_an_absent_file(folder: Location) -> None:
    with pytest.raises(FileNotFoundError):
        (folder / "a").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["pagemap", "status"])
def test_a_file_whose_size_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    """Reading one of /proc may be an invalid argument, or give more than its size says."""
    (tmp_path / "link").symlink_to(f"/proc/self/{name}")
    with pytest.raises(StorageRefusedError, match=r"Cannot read .*link: .*\. Name a regular file"):
        locate(tmp_path / "link").read_bytes(limit=10**9)


def test_a_file_of_as_many_bytes_as_the_limit_is_read(folder: Location) -> None:
    (folder / "a").write_bytes(b"12345")
    (folder / "b").write_bytes(b"")
    assert (folder / "a").read_bytes(limit=5) == b"12345"
    assert (folder / "b").read_bytes(limit=0) == b""
    with pytest.raises(StorageRefusedError, match="more than 4 bytes"):
        (folder / "a").read_bytes(limit=4)


def test_a_location_is_its_uri(folder: Location) -> None:
    below = folder / "a" / "b"
    assert str(below) == below.uri == f"{folder}/a/b"
    assert below.name == "b"
    below.write_bytes(b"x")
    assert locate(below.uri).read_bytes() == b"x"


def test_relative_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("runs") == f"{tmp_path}/runs"
    assert absolute("~/runs") == "/home/someone/runs"
    assert absolute("file:///runs") == "/runs"
    assert absolute("s3://bucket/runs/") == "s3://bucket/runs"
    assert [is_remote(uri) for uri in ("runs", "C:/runs", "file:///runs", "s3://b/runs")] == [False] * 3 + [True]


@pytest.mark.parametrize("uri", ["nothing://bucket/folder", "s3://a bucket/folder"])
def test_a_uri_that_cannot_be_opened(uri: str) -> None:
    with pytest.raises(UserError, match=f"{uri}.*s3://bucket/folder"):
        locate(uri)


def test_a_query_is_refused_since_workers_would_not_receive_it() -> None:
    with pytest.raises(UserError, match=r"s3://b/runs\?region=us-east-1 has a query string.*AWS_DEFAULT_REGION"):
        locate("s3://b/runs?region=us-east-1")


def test_sha256() -> None:
    # FIPS 180-2, appendix B.1.
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    "write", ["write_bytes(bytes(100_000))", "write_with(lambda f: torch.save(torch.zeros(25_000), f))"]
)
def test_a_full_disk_leaves_only_the_old_file(tmp_path: Path, write: str) -> None:
    (tmp_path / "a").write_bytes(b"old")
    code = (
        "import sys, torch; from pipelines.errors import UserError; from pipelines.storage import locate\n"
        f"try: locate(sys.argv[1]).{write}\n"
        "except UserError as error: sys.exit(str(error))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"Cannot write {tmp_path}/a: no space is left" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_writing_piece_by_piece_hashes_and_is_atomic(folder: Location) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(b"a")
        file.write(np.arange(3, dtype=np.int32).data)

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise ValueError("no")

    content = b"a" + np.arange(3, dtype=np.int32).tobytes()
    assert (folder / "deep" / "a").write_with(fill) == (hashlib.sha256(content).hexdigest(), 13)
    assert (folder / "deep" / "a").read_bytes() == content
    with pytest.raises(ValueError, match=r"^no$"):
        (folder / "deep" / "a").write_with(fail)
    assert (folder / "deep" / "a").read_bytes() == content
    assert (folder / "deep").names() == ["a"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rename, the old file is there and complete, for readers and after a kill."""
    (tmp_path / "a").write_bytes(b"old")

    def break_off(self: Path, target: Path) -> None:
        assert self.parent == tmp_path  # only within one file system is a rename atomic
        assert self.read_bytes() == b"new"
        assert target.read_bytes() == b"old"
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(Path, "replace", break_off)
    with patience(0), pytest.raises(StorageUnavailableError, match=r"broken disk.*Check the disk"):
        locate(tmp_path / "a").write_bytes(b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("action", "do"),
    [
        ("write", lambda folder: (folder / "b").write_bytes(b"")),
        ("read", lambda folder: (folder / "b").read_bytes()),
        ("list", lambda folder: folder.names()),
    ],
)
def test_a_folder_that_is_a_file(tmp_path: Path, action: str, do: Callable[[Location], object]) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(UserError, match=f"Cannot {action} {tmp_path}/a.*Choose a location that this user may {action}"):
        do(locate(tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"]


def test_s3_without_the_bucket(bucket: str) -> None:
    with pytest.raises(
        UserError, match=r"^Cannot write s3://another.*bucket.*AWS_ACCESS_KEY_ID.*AWS_ENDPOINT_URL"
    ) as e:
        locate("s3://another-bucket/folder/a").write_bytes(b"x")
    assert "\n" not in str(e.value)


def test_an_unreachable_s3_server_is_not_an_empty_folder(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port, on which no server listens
    folder = locate(f"{bucket}/folder")
    for action, call in {"list": folder.names, "read": folder.read_bytes, "access": folder.exists}.items():
        with (
            patience(0.1),
            pytest.raises(
                StorageUnavailableError, match=rf"^Cannot {action} {folder}: .*connect.*AWS_ENDPOINT_URL"
            ) as e,
        ):
            call()
        assert "\n" not in str(e.value)
        assert "the same command resumes" in str(e.value)


@contextmanager
def outage(server: FaultyServer, mode: Mode, requests: int = 2) -> Iterator[None]:
    """Let the server fail until it has received so many more requests."""
    before = server.counts[mode]
    server.mode = mode

    def end() -> None:
        server.wait_for(mode, before + requests)
        server.mode = "ok"

    thread = threading.Thread(target=end)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert server.counts[mode] >= before + requests


OPERATIONS: dict[str, Callable[[Location], object]] = {
    "write": lambda folder: ((folder / "a").write_bytes(b"new"), (folder / "a").read_bytes()),
    "read": lambda folder: (folder / "a").read_bytes(),
    "list": lambda folder: folder.names(),
    "delete": lambda folder: (folder.delete(), folder.names()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["503", "silent", "refuse", "cut"])
def test_an_operation_during_an_outage_ends_as_without(
    bucket: str, faulty_s3: FaultyServer, mode: Mode, operation: str
) -> None:
    results = []
    for name in ("disturbed", "undisturbed"):
        folder = locate(f"{bucket}/{name}")
        (folder / "a").write_bytes(b"content")
        (folder / "deep" / "b").write_bytes(b"")
        if name == "disturbed":
            with outage(faulty_s3, mode):
                results.append(OPERATIONS[operation](folder))
        else:
            results.append(OPERATIONS[operation](folder))
    assert results[0] == results[1]


def test_a_write_whose_confirmation_is_lost_is_repeated(s3_server: str, bucket: str, monkeypatch) -> None:
    class CutTheThird(FaultyServer):
        def receive(self, request: str) -> Mode:
            mode = super().receive(request)
            self.mode = "cut" if self.counts["ok"] == 2 and not self.counts["cut"] else "ok"
            return mode

    data = os.urandom(1 << 20)
    with CutTheThird(s3_server) as server:  # start, part, completion
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        (locate(bucket) / "a").write_bytes(data)
        assert server.counts["cut"] == 1
        assert locate(bucket).names() == ["a"]
        assert (locate(bucket) / "a").read_bytes() == data


@pytest.mark.parametrize("mode", ["503", "silent", "refuse", "cut"])
def test_the_patience_ends(bucket: str, faulty_s3: FaultyServer, mode: Mode) -> None:
    file = locate(f"{bucket}/a")
    file.write_bytes(b"old")
    faulty_s3.mode = mode
    with (
        patience(0.3),
        pytest.raises(StorageUnavailableError, match=f"^Cannot write {file}.*resumes.*AWS_ENDPOINT_URL"),
    ):
        file.write_bytes(b"new")
    assert faulty_s3.counts[mode] >= 2
    before = faulty_s3.counts[mode]
    with patience(0), pytest.raises(StorageUnavailableError, match=f"Cannot list {file}: .* when asked once"):
        file.names()
    assert faulty_s3.counts[mode] == before + 1
    faulty_s3.mode = "ok"
    assert file.read_bytes() == b"old"


def test_patience_is_that_of_the_thread_or_of_the_process(bucket: str, faulty_s3: FaultyServer) -> None:
    folder = locate(bucket)

    def impatient() -> None:
        with patience(0):
            with patience(0.01), pytest.raises(StorageUnavailableError):
                folder.names()
            with pytest.raises(StorageUnavailableError, match="asked once"):
                folder.names()

    faulty_s3.mode = "refuse"
    with ThreadPoolExecutor(1) as pool:
        set_patience(60)
        waiting = pool.submit(folder.names)
        impatient()  # while the other thread waits
        faulty_s3.mode = "ok"
        assert waiting.result(60) == []
        faulty_s3.mode = "refuse"
        set_patience(0)
        with pytest.raises(StorageUnavailableError, match="asked once"):
            pool.submit(folder.names).result(60)


def test_one_warning_an_outage(bucket: str, faulty_s3: FaultyServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipelines.storage")
    folder = locate(f"{bucket}/folder")

    def own_lines() -> list[tuple[str, str]]:
        return [(record.levelname, record.message) for record in caplog.records if record.name == storage.__name__]

    set_patience(900)
    with ThreadPoolExecutor(4) as pool, outage(faulty_s3, "refuse", 12):
        list(pool.map(lambda _: folder.names(), range(4)))
    lines = own_lines()
    assert [level for level, _ in lines] == ["WARNING", "INFO"]
    assert lines[0][1].startswith(f"Storage {bucket} does not answer (")
    assert lines[0][1].endswith("trying again for up to 15 min.")
    assert lines[1][1].startswith(f"Storage {bucket} answers again after ")
    with outage(faulty_s3, "503"):
        folder.names()
    assert len(own_lines()) == 4
    with patience(0), outage(faulty_s3, "503", 1), pytest.raises(StorageUnavailableError):
        folder.names()
    assert len(own_lines()) == 4  # the caller reports what was not waited for


def test_waiting_can_be_interrupted(bucket: str, faulty_s3: FaultyServer) -> None:
    faulty_s3.mode = "refuse"
    set_patience(900)

    def interrupt() -> None:
        faulty_s3.wait_for("refuse", 3)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        locate(bucket).names()
    thread.join()
    assert not storage._outages


def test_waiting_leaves_the_random_numbers_alone(bucket: str, faulty_s3: FaultyServer) -> None:
    state = random.getstate()
    with outage(faulty_s3, "refuse"):
        locate(bucket).names()
    assert random.getstate() == state


def test_a_location_sent_to_another_process_has_the_same_policy(bucket: str, faulty_s3: FaultyServer) -> None:
    sent = pickle.loads(pickle.dumps(locate(f"{bucket}/a")))
    sent.write_bytes(b"x")
    assert locate(f"{bucket}/a").read_bytes() == b"x"
    faulty_s3.mode = "503"
    with patience(0), pytest.raises(StorageUnavailableError):
        sent.read_bytes()
    assert faulty_s3.counts["503"] == 1  # pyarrow would try three times


@pytest.fixture
def answer(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], list[str]]]:
    """Return a function that sets the answer of an S3 server and returns the requests that it will receive."""
    current: tuple[int, str] = (200, "")
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(current[0])
            self.end_headers()
            if current[1]:
                self.wfile.write(f"<Error><Code>{current[1]}</Code><Message>no</Message></Error>".encode())

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    def set_answer(status: int, code: str) -> list[str]:
        nonlocal current
        current = (status, code)
        requests.clear()
        return requests

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield set_answer
        server.shutdown()
        thread.join()


CALLS: list[Callable[[Location], object]] = [
    lambda folder: folder.exists(),
    lambda folder: folder.names(),
    lambda folder: folder.write_bytes(b"x"),
]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (301, "PermanentRedirect"),
        (400, "AuthorizationHeaderMalformed"),
        (400, "ExpiredToken"),
        (401, ""),
        (403, "AccessDenied"),
        (403, "SignatureDoesNotMatch"),
        (403, "InvalidAccessKeyId"),
        (405, "MethodNotAllowed"),
    ],
)
def test_what_waiting_cannot_change_is_said_at_once(
    bucket: str, answer: Callable[[int, str], list[str]], status: int, code: str
) -> None:
    for call in CALLS:
        requests = answer(status, code)
        with pytest.raises(UserError, match=f"^Cannot [a-z]* {bucket}/a: .*AWS_ACCESS_KEY_ID"):
            call(locate(f"{bucket}/a"))
        unsigned = f"/{bucket.removeprefix('s3://')}"  # the question whether the endpoint redirects, asked at most once
        assert len(requests) - requests.count(unsigned) == 1
        assert requests.count(unsigned) <= 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (408, ""),
        (409, "OperationAborted"),
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (502, ""),
        (503, "ServiceUnavailable"),
        (504, ""),
    ],
)
def test_answers_that_may_change(bucket: str, answer: Callable[[int, str], list[str]], status: int, code: str) -> None:
    for call in CALLS:
        requests = answer(status, code)
        with patience(0.01), pytest.raises(StorageUnavailableError, match=f"^Cannot [a-z]* {bucket}/a: "):
            call(locate(f"{bucket}/a"))
        assert len(requests) >= 2


def test_throttling_with_status_400(bucket: str, answer: Callable[[int, str], list[str]]) -> None:
    answer(400, "Throttling")
    with patience(0), pytest.raises(StorageUnavailableError, match="THROTTLING"):
        locate(bucket).names()


def test_a_missing_bucket_is_asked_for_once(bucket: str, faulty_s3: FaultyServer) -> None:
    with pytest.raises(UserError, match="bucket does not exist"):
        locate("s3://another-bucket/a").write_bytes(b"")
    assert faulty_s3.counts == {"ok": 2}  # one of them unsigned, to learn whether the endpoint redirects


@pytest.mark.parametrize("region", ["AWS_REGION", "AWS_DEFAULT_REGION", None])
def test_region_and_endpoint_are_those_of_pyarrow(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, region: str | None
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    if region:
        monkeypatch.setenv(region, "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    expected, _ = fs.FileSystem.from_uri(bucket)
    found = locate(bucket).filesystem
    assert isinstance(expected, fs.S3FileSystem)
    assert isinstance(found, fs.S3FileSystem)
    assert found.region == expected.region
    assert locate(bucket).names() == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN])
def test_a_network_mount_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    replace, tries = Path.replace, []

    def fail_twice(self: Path, target: Path) -> Path:
        tries.append(self)
        if len(tries) <= 2:
            raise OSError(number, os.strerror(number))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_twice)
    locate(tmp_path / "a").write_bytes(b"new")
    assert len(tries) == 3
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(errno.EACCES, "no"), StorageRefusedError),
        (OSError(errno.ENOSPC, "full"), StorageRefusedError),
        (OSError(errno.EMFILE, "too many"), OSError),
        (FileNotFoundError(errno.ENOENT, "no"), FileNotFoundError),
        (ValueError("no"), ValueError),
    ],
)
def test_local_errors_that_are_raised_at_once(tmp_path: Path, error: Exception, expected: type[Exception]) -> None:
    tries = []

    def fail() -> None:
        tries.append(1)
        raise error

    with pytest.raises(expected) as raised:
        retried("read", locate(tmp_path), fail)
    assert type(raised.value) in (expected, type(error))
    assert len(tries) == 1


def test_retried_serves_the_files_of_other_libraries(bucket: str, faulty_s3: FaultyServer) -> None:
    location = locate(f"{bucket}/a.parquet")
    table = pa.table({"a": list(range(1000))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    location.write_bytes(buffer.getvalue())

    def read() -> pa.Table:
        return pq.ParquetFile(location.filesystem.open_input_file(location.path)).read()

    with outage(faulty_s3, "cut"):
        assert retried("read", location, read).equals(table)
    tries = []

    def corrupt() -> None:
        tries.append(1)
        raise OSError("Corrupt snappy compressed data.")

    with pytest.raises(OSError, match=r"^Corrupt snappy"):  # pyarrow's word for damaged data: no outage
        retried("read", location, corrupt)
    assert len(tries) == 1


def test_the_faulty_server_forwards_faithfully(bucket: str, faulty_s3: FaultyServer) -> None:
    client, name = boto3.client("s3", endpoint_url=faulty_s3.url), bucket.removeprefix("s3://")
    data = os.urandom((9 << 20) + 1)
    client.upload_fileobj(io.BytesIO(data), name, "multipart")  # parts of 8 MiB
    client.put_object(Bucket=name, Key="one/ü %+&?", Body=data[:1000], Metadata={"note": "kept"})
    head = client.head_object(Bucket=name, Key="one/ü %+&?")
    assert (head["ContentLength"], head["Metadata"]) == (1000, {"note": "kept"})
    assert client.get_object(Bucket=name, Key="multipart")["Body"].read() == data
    part = client.get_object(Bucket=name, Key="multipart", Range="bytes=5000000-8999999")
    assert part["ContentRange"] == f"bytes 5000000-8999999/{len(data)}"
    assert part["Body"].read() == data[5000000:9000000]
    client.delete_objects(Bucket=name, Delete={"Objects": [{"Key": "multipart"}]})
    client.delete_object(Bucket=name, Key="one/ü %+&?")
    assert locate(bucket).names() in ([], ["one"])  # a folder, if the server keeps it
    connection = http.client.HTTPConnection(faulty_s3.url.removeprefix("http://"), timeout=60)
    connection.request("PUT", f"/{name}/chunked", body=iter([b"abc", b"", b"defg"]), encode_chunked=True)
    assert connection.getresponse().read() == b""
    connection.close()
    assert (locate(bucket) / "chunked").read_bytes() == b"abcdefg"
