"""Reading the lists of a large JSON file one entry at a time, in bounded memory.

Memory holds a few megabytes of text and one entry at a time, whatever the size of the file.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NoReturn

from maskformer.untrusted import escaped
from pipelines.errors import UserError
from pipelines.storage import Location

_CHUNK = 2**22  # bytes
_LONGEST = 2**23  # characters of one entry: 65,535 segments take up to 7 million, nested lists 52 bytes for each
_MAX_KEYS = 1000  # of the top-level object
_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()


class JsonLists:
    """The entries of all lists in the top-level object of a JSON file; other values are skipped.

    The attributes are complete after the last entry.
    """

    def __init__(self, file: Location) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.kind = "dict"
        """Python type of the file's value. Only a dict has entries."""
        self.lists: dict[str, int] = {}
        """Number of entries of each list."""
        self.others: set[str] = set()
        """Keys whose value is no list."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the file in hexadecimal."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[tuple[str, int, Any]]:
        """Yield the name of the list, the number of the entry from 0 on, and the entry.

        Raises:
            UserError: the file cannot be read or is not valid JSON.
        """
        text = _Text(self._file, self._chunks())
        if text.peek() == "{":
            yield from self._members(text)
        else:
            self.kind = type(text.value()).__name__
        if text.peek():
            text.fail("Extra data")

    def _members(self, text: "_Text") -> Iterator[tuple[str, int, Any]]:
        text.take("{")
        while text.peek() != "}":
            if text.peek() != '"':
                text.fail("Expecting property name enclosed in double quotes")
            key = text.value()
            text.take(":")
            if key in self.lists or key in self.others:
                raise UserError(
                    f"{escaped(self._file)} has the key {escaped(key, 60)!r} twice; remove or merge one of them."
                )
            if len(self.lists) + len(self.others) >= _MAX_KEYS:
                raise UserError(
                    f"{escaped(self._file)} has more than {_MAX_KEYS} keys; give a COCO panoptic JSON, whose keys are "
                    f"images, annotations, categories and a few others."
                )
            if text.peek() == "[":
                self.lists[key] = 0
                yield from self._elements(text, key)
            else:
                self.others.add(key)
                text.value()
            if text.peek() != "}":
                text.take(",")
                if text.peek() == "}":
                    text.fail("Expecting property name enclosed in double quotes")
        text.take("}")

    def _elements(self, text: "_Text", key: str) -> Iterator[tuple[str, int, Any]]:
        text.take("[")
        while text.peek() != "]":
            yield key, self.lists[key], text.value()
            self.lists[key] += 1
            if text.peek() != "]":
                text.take(",")
                if text.peek() == "]":
                    text.fail("Expecting value")
        text.take("]")

    def _chunks(self) -> Iterator[bytes]:
        file, offset = self._file, 0
        while chunk := file.read_range(offset, _CHUNK, anew=offset == 0):
            self._hash.update(chunk)
            offset += len(chunk)
            yield chunk


class _Text:
    """A window of a text that is read piece by piece."""

    def __init__(self, file: Location, chunks: Iterator[bytes]) -> None:
        self._file, self._chunks = file, chunks
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._lines = self._column = 0  # of the start of the window

    def peek(self) -> str:
        """Return the next character that is no white space, or "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> None:
        if self.peek() != character:
            self.fail(f"Expecting {character!r}")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            start = self._at  # `_more` moves it
            try:
                value, end = _DECODER.raw_decode(self._text, start)
            except json.JSONDecodeError as error:
                if len(self._text) - start > _LONGEST:
                    self.fail(f"A value of more than {_LONGEST:,} characters, or an error in it,")
                wanted = 2 * (len(self._text) - start)  # so that a long value is not read again for each piece
                if not self._more():
                    self.fail(error.msg, self._at + error.pos - start)
                while len(self._text) < min(wanted, _LONGEST) and self._more():
                    pass
            except RecursionError:
                self.fail("Lists and objects nested too deeply (recursion)")
            except ValueError:
                self.fail("Exceeds the limit of 4,300 digits of a number")
            else:
                if end - start > _LONGEST:
                    self.fail(f"A value of more than {_LONGEST:,} characters")
                # A number may go on in the next piece.
                if end + 3 < len(self._text) or not self._more():
                    self._at += end - start
                    return value

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        before = self._text[: self._at if position is None else position]
        line = self._lines + before.count("\n") + 1
        column = len(before) - before.rfind("\n") if "\n" in before else self._column + len(before) + 1
        raise UserError(
            f"{escaped(self._file)} is not valid JSON: {message} at line {line}, column {column}; "
            f"it may be truncated, so download or write it again."
        )

    def _more(self) -> bool:
        """Append the next piece and drop what was used; return whether there was one."""
        try:
            chunk = next(self._chunks, b"")
            piece = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{escaped(self._file)} is not a JSON text ({error.reason}); give a COCO panoptic JSON file."
            ) from error
        except OSError as error:
            raise UserError(
                f"Cannot read {escaped(self._file)}: {error}. Make it readable and run this again."
            ) from error
        used = self._text[: self._at]
        self._lines += used.count("\n")
        self._column = len(used) - used.rfind("\n") - 1 if "\n" in used else self._column + len(used)
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(chunk)
