"""The headers of the pages in a Parquet file.

For the encodings that are accepted here, pyarrow takes as much memory for a page as its header says, in bytes and in
values. The footer says the same of all pages of a column, and a stranger's file may say one thing in the footer and
another in the headers.
Format: https://parquet.apache.org/docs/file-format/, `PageHeader` in the compact protocol of Thrift.
"""

from typing import Any

import pyarrow.parquet as pq

# Types of fields.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 12
# Fields of a header. Each type of page has a header of its own inside.
_TYPE, _PLAIN_SIZE, _STORED_SIZE = 1, 2, 3
_DICTIONARY = 2
_INNER = {0: 5, _DICTIONARY: 7, 3: 8}
# Fields of the inner header.
_VALUES, _ENCODING = 1, {0: 2, _DICTIONARY: 2, 3: 4}

_ENCODINGS = (0, 2, 3, 8)
"""Plain, run lengths and dictionaries, which pyarrow writes by default. A page in another one, such as a delta
encoding, has a number inside by which pyarrow takes memory."""
_LAST_FIELD = 15
_ALWAYS_FIELDS, _BYTES_OF_FIELD = 100_000, 200
"""Fields in all headers of a file: how many there may be in any case, and one more for so many bytes. A page of 1 MB
has 15."""


def require_agreeing_pages(content: bytes, metadata: pq.FileMetaData) -> None:
    """Check that the sizes and numbers of values in the headers of the pages add up to those in the footer.

    Args:
        content: the whole file.
        metadata: of its footer. What it says must be checked before.

    Raises:
        ValueError: they do not, or a header is not valid. The message names the column.
    """
    headers = _Headers(content)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            try:
                agree = _agree(headers, column)
            except (IndexError, KeyError, TypeError, ValueError):  # it is not a header
                agree = False
            if not agree:
                raise ValueError(f"the pages of its column {column.path_in_schema} are not as its footer says")


def _agree(headers: "_Headers", column: pq.ColumnChunkMetaData) -> bool:
    if column.num_values == 0:  # pyarrow reads no page
        return True
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < at:  # as pyarrow finds the first page
        at = column.dictionary_page_offset
    end = at + column.total_compressed_size
    if not 0 <= at <= end <= len(headers.content):
        return False
    plain = values = 0
    while at < end:
        header, after = headers.read(at)
        kind, plain_size, stored_size = header[_TYPE], header[_PLAIN_SIZE], header[_STORED_SIZE]
        inner = header[_INNER[kind]]
        count = inner[_VALUES]
        if not all(0 <= number < 2**31 for number in (plain_size, stored_size, count)):
            return False
        if inner[_ENCODING[kind]] not in _ENCODINGS:
            return False
        if kind != _DICTIONARY:
            values += count
        elif 4 * count > plain_size:  # each value of a dictionary has four bytes or more
            return False
        plain += after - at + plain_size
        at = after + stored_size
    return (at, plain, values) == (end, column.total_uncompressed_size, column.num_values)


class _Headers:
    """Reads headers, of which a file has not more than a good one."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._at = 0
        self._left = _ALWAYS_FIELDS + len(content) // _BYTES_OF_FIELD

    def read(self, at: int) -> tuple[dict[int, Any], int]:
        """Return the 32-bit numbers and the structs of a header, by the numbers of their fields, and where it ends."""
        self._at = at
        return self._struct(0), self._at

    def _struct(self, depth: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        last = 0
        while head := self._byte():
            field = last + (head >> 4) if head >> 4 else self._number()
            self._left -= 1
            # Ascending, as they are written. Thrift reads the number of a field as 16 bits, so that a larger one would
            # be another field, and takes the last of two.
            if not last < field <= _LAST_FIELD or self._left < 0:
                raise ValueError(field)
            last = field
            kind = head & 15
            if kind == _I32:
                found[field] = self._number()
            elif kind == _STRUCT and depth < 2:
                found[field] = self._struct(depth + 1)
            elif kind in (_I16, _I64):  # where 32 bits are due, pyarrow ignores it
                self._number()
            elif kind == _BINARY:
                size = self._unsigned()
                self._at += size
            elif kind in (_TRUE, _FALSE, _BYTE, _DOUBLE):
                self._at += {_BYTE: 1, _DOUBLE: 8}.get(kind, 0)
            else:  # no header has lists
                raise ValueError(kind)
        return found

    def _byte(self) -> int:
        self._at += 1
        return self.content[self._at - 1]

    def _number(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _unsigned(self) -> int:
        value = 0
        for place in range(10):  # of 64 bits
            digit = self._byte()
            value |= (digit & 127) << (7 * place)
            if digit < 128:
                return value
        raise ValueError(value)
