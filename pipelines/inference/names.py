"""Names of outputs: the path of a picture below a common folder, safe on any file system and unique."""

import hashlib
import os
from itertools import takewhile

_FORBIDDEN = '\\:*?"<>|%'
_LONGEST = 180
"""Bytes of a part of a name; file systems allow 255, and a suffix follows."""


def parts_of(source: str) -> list[str]:
    """Return the folders and the file name of an absolute path, or of a URI after its scheme and bucket."""
    return source.split("/") if "://" not in source else source.replace("://", ":/", 1).split("/")


def common_folder(folders: list[list[str]]) -> list[str]:
    """Return the parts that all folders, in parts, begin with."""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return [parts[0] for parts in same]


def output_name(source: str, base: list[str]) -> str:
    """Return the name of a picture's outputs, without suffix: its path below the folder `base`, in parts.

    Characters that are not printed, or that other systems do not allow, are percent-encoded, as are the parts `.` and
    `..`. Long parts are shortened and end with a hash. So the name stays below the output folder, and different
    pictures have different names.
    """
    return "/".join(map(_safe, parts_of(source)[len(base) :]))


def _safe(part: str) -> str:
    safe = "".join(char if char.isprintable() and char not in _FORBIDDEN else _encoded(char) for char in part)
    if safe in ("", ".", ".."):
        safe = safe.replace(".", "%2E") or "%"
    if len(safe.encode()) > _LONGEST:
        digest = hashlib.sha256(os.fsencode(part)).hexdigest()[:16]
        safe = safe.encode()[: _LONGEST - 17].decode(errors="ignore") + "~" + digest
    return safe


def _encoded(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(char))
