"""Local folders and S3 (a real API over HTTP) behave alike, and failed writes leave no partial file."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage import Location, absolute, is_remote, locate, sha256


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


def test_a_full_disk_leaves_only_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    code = (
        "import sys; from pipelines.errors import UserError; from pipelines.storage import locate\n"
        "try: locate(sys.argv[1]).write_bytes(bytes(100_000))\n"
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


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rename, the old file is there and complete, for readers and after a kill."""
    (tmp_path / "a").write_bytes(b"old")

    def break_off(self: Path, target: Path) -> None:
        assert self.parent == tmp_path  # only within one file system is a rename atomic
        assert self.read_bytes() == b"new"
        assert target.read_bytes() == b"old"
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(Path, "replace", break_off)
    with pytest.raises(OSError, match="broken disk") as error:
        locate(tmp_path / "a").write_bytes(b"new")
    assert not isinstance(error.value, UserError)
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


def test_an_unreachable_s3_server_is_not_an_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = fs.S3FileSystem(
        access_key="a",
        secret_key="b",
        region="us-east-1",
        endpoint_override="http://127.0.0.1:9",  # the discard port, on which no server listens
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # the default ones take 6 s
    )
    monkeypatch.setattr(storage, "_remote", lambda bucket, settings: (unreachable, "bucket"))
    folder = locate("s3://bucket/folder")
    for action, call in {"list": folder.names, "read": folder.read_bytes, "access": folder.exists}.items():
        with pytest.raises(UserError, match=rf"^Cannot {action} s3://bucket/folder: .*connect.*AWS_ENDPOINT_URL"):
            call()
