"""What comes from outside: only regular files are opened, JSON is bounded, and text is escaped before it is shown."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 16 * 2**20
"""Bytes of a JSON file of settings, classes or names. Nested lists take 52 times as much memory when parsed."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularError(OSError):
    """A path that is a folder, a FIFO, a socket or a device, where a file is needed. `strerror` says which."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read its bytes, or what a link to one leads to.

    Raises:
        NotRegularError: it is something else, which might never end or never answer.
        OSError: it does not exist or cannot be read.
    """
    # A FIFO would wait for its writer, hence not blocking. It has no effect on a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for matches, name in _KINDS if matches(mode)), "of an unknown kind")
            raise NotRegularError(None, f"it is {kind}, not a file", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        ValueError: it is larger, and was not read.
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""  # not `limit`, for which memory would be taken
    if max(size, len(content)) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content


def parse_json(content: str | bytes | bytearray | memoryview) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has an integer of thousands of digits.
    """
    text = content if isinstance(content, str) else bytes(content).decode()
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the value in a JSON file of at most `limit` bytes.

    Raises:
        ValueError: as `parse_json`, or the file is larger.
        OSError: as `open_regular`.
    """
    return parse_json(read_regular(path, limit))


def escaped(value: object, longest: int | None = None) -> str:
    """Return a text from outside so that it stays in its line: what a terminal would act on is shown as its code.

    Args:
        longest: cut what is longer than this many characters, and mark it with three dots.
    """
    text = value if isinstance(value, str) else str(value)
    cut = longest is not None and len(text) > longest
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:longest])
    return f"{line}..." if cut else line


def shown(value: object, longest: int = 100) -> str:
    """Return a value from outside as Python writes it, in one line that is cut after `longest` characters."""
    return escaped(repr(value), longest)
