"""What comes from outside: which files are opened, which JSON is parsed, and how text is shown."""

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskformer.untrusted import NotRegularError, escaped, open_regular, parse_json, read_json


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "socket"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    listener = socket.socket(socket.AF_UNIX)
    match kind:
        case "folder":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            listener.bind(str(path))
    with listener, pytest.raises(OSError):  # noqa: PT011 -- a socket cannot be opened at all
        open_regular(path)
    if kind != "socket":
        with pytest.raises(NotRegularError, match="not a file") as caught:
            open_regular(path)
        assert kind in str(caught.value.strerror)


def test_a_file_and_a_link_to_one_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1", "1" * 5000, b"\xff", '{"a" 1}'])
def test_json_that_cannot_be_read_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_a_json_file_has_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"a": [1, 2.5, None, "é"]}))
    assert read_json(file) == {"a": [1, 2.5, None, "é"]}
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_json(file, 10)


@given(st.text(st.characters(codec=None)))
def test_escaped_text_is_printable_and_tells_texts_apart(text: str) -> None:
    shown = escaped(text)
    assert shown.isprintable()
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_long_text_is_cut() -> None:
    assert escaped("abcdef", 3) == "abc..."
    assert escaped("abc", 3) == "abc"
    assert escaped("\x1b[2J\n\ud800\u202e") == r"\x1b[2J\n\ud800\u202e"
