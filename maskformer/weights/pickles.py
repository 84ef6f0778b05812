"""Read pickled checkpoints without unpickling them: a process of its own, with limits, says what they hold.

The process (`unpickle.py`) gets bytes of the file, and answers with a description in JSON. What is used here are the
description, after it is checked, and the values of tensors, read straight from the file. Nothing in this process
interprets a pickle or a zip file.
"""

import os
import re
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from maskformer.untrusted import escaped, parse_json
from maskformer.weights.stored import Place, StoredTensor, Unreadable, contiguous_strides, dtypes, read_tensors

_SCRIPT = Path(__file__).with_name("unpickle.py")
_PATIENCE = 60
"""Seconds to wait for the process, not counting the file: it computes for 6 seconds at most (see `unpickle.py`)."""
_LARGEST_REQUEST = 2**16
_LARGEST_RESULT = 32 * 2**20
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""Variables that Python may need to start; the others may be secrets."""

_TYPES = dtypes(
    {
        name: name
        for name in (
            *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
            *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
            *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        )
    }
)
_NUMPY_TYPES = dtypes(
    {
        "b1": "bool",
        **{f"i{size}": f"int{8 * size}" for size in (1, 2, 4, 8)},
        **{f"u{size}": f"uint{8 * size}" for size in (1, 2, 4, 8)},
        **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    }
)

Kind = Literal["zip", "legacy", "plain"]
"""Formats of pickled checkpoints: `torch.save`, the same before 1.6, and the plain pickles of detectron2's zoo."""


_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6, pickled


class RefusedError(ValueError):
    """The file names a function or class that no checkpoint needs. The message is this name."""

    def __init__(self, name: str) -> None:
        super().__init__(escaped(name, 100))


def kind_of(head: bytes) -> Kind | None:
    """Return the format of a file that begins with `head`; None if it is not pickled."""
    if head.startswith(_ZIP):
        return "zip"
    if head[2 : 2 + len(_OLD_TORCH)] == _OLD_TORCH:
        return "legacy"
    return "plain" if head.startswith(b"\x80") else None


def load(file: BinaryIO) -> Any:
    """Return the complete content of a file of `torch.save`, as `torch.load(weights_only=True)` does.

    Values are dictionaries, lists, tuples, sets, texts, numbers and dense tensors, as in a checkpoint of this project.

    Raises:
        RefusedError: the file holds more than tensors, arrays and plain values.
        ValueError: the file is damaged, or too large for the limits. The message is the reason.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    kind = kind_of(file.read(64))
    if kind is None:
        raise ValueError("it has an unknown format")
    content = describe(file, size, kind)
    found: list[StoredTensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, StoredTensor):
            value.check(size)
            found.append(value)
        elif isinstance(value, Unreadable):
            raise ValueError(value.reason)
        elif isinstance(value, dict | list | tuple):
            items = cast("dict[Any, Any]", value).values() if isinstance(value, dict) else cast("list[Any]", value)
            for each in items:
                collect(each)

    def with_tensors(value: Any) -> Any:
        if isinstance(value, StoredTensor):
            return tensors[value]
        if isinstance(value, dict):
            return {key: with_tensors(each) for key, each in cast("dict[Any, Any]", value).items()}
        if isinstance(value, list | tuple):
            items = list(map(with_tensors, cast("list[Any]", value)))
            return tuple(items) if isinstance(value, tuple) else items
        return value

    collect(content)
    tensors = read_tensors(file, size, found)
    return with_tensors(content)


def describe(file: BinaryIO, size: int, kind: Kind) -> Any:
    """Return what a file of `size` bytes holds: dictionaries, lists and plain values, and `StoredTensor` for tensors.

    Dictionaries have texts and numbers as keys; entries with other keys are left out. Objects that are of no use here
    are None, and tensors that cannot be read are `Unreadable`.

    Raises:
        RefusedError: the file holds more than tensors, arrays and plain values.
        ValueError: the file is damaged, or too large for the limits. The message is the reason.
    """
    found = _run(file, size, kind)
    if "refused" in found:
        raise RefusedError(str(found["refused"]))
    if "damaged" in found:
        raise ValueError(escaped(found["damaged"], 300))
    try:
        return _Decoder(found["storages"]).decode(found["content"])
    except (KeyError, TypeError, IndexError, OverflowError, RecursionError, AttributeError) as error:
        raise ValueError("its description is not valid") from error


def _run(file: BinaryIO, size: int, kind: Kind) -> dict[str, Any]:
    """Return the answer of a process of its own."""
    command = [sys.executable, "-I", "-S", "-B", str(_SCRIPT), kind, str(size)]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
    ) as process:
        try:
            answer = _converse(process, file, size)
        except (EOFError, BrokenPipeError):
            code = _ended(process)
            raise ValueError(
                f"the process that reads its pickle ended {f'by signal {-code}' if code < 0 else f'with status {code}'}"
                f", at a limit on time or memory or because of a fault"
            ) from None
        finally:
            process.kill()
    found = parse_json(answer)
    if not isinstance(found, dict):
        raise ValueError("its description is not valid")
    return found  # pyright: ignore[reportUnknownVariableType]  # JSON


def _ended(process: "subprocess.Popen[bytes]") -> int:
    """Return the exit status of a process that has nothing more to say."""
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _converse(process: "subprocess.Popen[bytes]", file: BinaryIO, size: int) -> bytes:
    """Give the process the bytes that it asks for; return its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    left, requested = float(_PATIENCE), 0
    waiting = process.stdout.fileno()
    poll = select.poll()  # unlike select, it takes descriptors beyond 1023
    poll.register(waiting, select.POLLIN)

    def read(count: int) -> bytes:
        nonlocal left
        data = bytearray()
        while len(data) < count:
            start = time.monotonic()
            ready = poll.poll(1000 * left)
            left -= time.monotonic() - start
            if not ready or left <= 0:
                raise ValueError(f"the process that reads its pickle did not answer for {_PATIENCE} seconds")
            part = os.read(waiting, count - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    while True:
        offset, count = struct.unpack("<qq", read(16))
        if offset == -1 and 0 < count <= _LARGEST_RESULT:
            return read(count)
        requested += count
        if not 0 <= offset < size or not 0 < count <= min(_LARGEST_REQUEST, size - offset) or requested > 2**40:
            raise ValueError("its description is not valid")
        file.seek(offset)
        data = file.read(count)
        if len(data) != count:
            raise ValueError("it became shorter while it was read")
        process.stdin.write(data)  # no more than a pipe holds, so it never waits


class _Decoder:
    """Turns the description into values. Nothing in it is trusted."""

    def __init__(self, storages: list[list[int]]) -> None:
        self._places = [_place(storage) for storage in storages]

    def decode(self, node: Any) -> Any:
        """Return the value of a description."""
        if not isinstance(node, list):
            if isinstance(node, dict):
                raise TypeError("an object in the description")
            return node
        letter, *items = cast("list[Any]", node)
        match letter:
            case "d":
                keys, values = map(self.decode, items[::2]), map(self.decode, items[1::2])
                pairs = list(zip(keys, values, strict=True))
                return {key: value for key, value in pairs if _is_key(key)}
            case "l":
                return list(map(self.decode, items))
            case "t":
                return tuple(map(self.decode, items))
            case "s":
                return {each for each in items if _is_key(each)}
            case "T":
                return self._tensor(*items)
            case "A":
                return _array(*items)
            case "c":
                return complex(*items)
            case "!":
                return Unreadable(escaped(items[0], 200))
            case "x":
                return None
            case other:
                raise TypeError(other)

    def _tensor(self, storage: int, kind: str, offset: int, shape: list[int], strides: list[int]) -> Any:
        if kind not in _TYPES:
            return Unreadable(f"it is of torch.{escaped(kind, 20)}")
        return StoredTensor(
            self._places[_integer(storage)], _TYPES[kind], _integer(offset), _integers(shape), _integers(strides)
        )


def _array(code: str, shape: list[int], in_fortran_order: bool, place: list[int]) -> Any:
    if not re.fullmatch(r"[<>|=][biuf][1248]", code) or code[1:] not in _NUMPY_TYPES:
        return Unreadable(f"its numpy data type {escaped(code, 20)!r} is not one of numbers in 1 to 8 bytes")
    sizes = _integers(shape)
    strides = contiguous_strides(sizes[::-1])[::-1] if in_fortran_order else contiguous_strides(sizes)
    big_endian = code[0] == ">" or (code[0] != "<" and sys.byteorder == "big")
    return StoredTensor(_place(place), _NUMPY_TYPES[code[1:]], 0, sizes, strides, big_endian, fills=True)


def _place(numbers: list[int]) -> Place:
    at, size, *text = _integers(numbers)
    if len(text) not in (0, 2):
        raise TypeError(text)
    return Place(at, size, (text[0], text[1]) if text else None)


def _integers(values: list[int]) -> tuple[int, ...]:
    return tuple(map(_integer, values))


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


def _is_key(value: object) -> bool:
    # Other keys may be made to have equal hashes, with which a dictionary takes quadratic time.
    return value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63)
