"""The headers of the pages in a Parquet file.

pyarrow takes as much memory for a page as its header says, and as many values. The footer says both as well, of all
pages of a column, and a file of a stranger may say one thing there and another in the headers.
Format: https://parquet.apache.org/docs/file-format/, `PageHeader` in the compact protocol of Thrift.
"""

from typing import Any

import pyarrow.parquet as pq

# Types of fields.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 12
# Fields of a header. Each type of page has a header of its own inside, whose first field is the number of values.
_TYPE, _PLAIN_SIZE, _STORED_SIZE = 1, 2, 3
_INNER = {0: 5, 2: 7, 3: 8}
_DICTIONARY = 2
_VALUES = 1


def require_agreeing_pages(content: bytes, metadata: pq.FileMetaData) -> None:
    """Check that the pages of a file have together the sizes and values that its footer says.

    Args:
        content: the whole file.
        metadata: of its footer. What it says must be checked before.

    Raises:
        ValueError: they have not, or a header is not valid. The message names the column.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            try:
                agree = _agree(content, column)
            except (IndexError, KeyError, TypeError, ValueError):  # it is not a header
                agree = False
            if not agree:
                raise ValueError(f"the pages of its column {column.path_in_schema} are not as its footer says")


def _agree(content: bytes, column: pq.ColumnChunkMetaData) -> bool:
    if column.num_values == 0:  # pyarrow reads no page
        return True
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < at:  # as pyarrow finds the first page
        at = column.dictionary_page_offset
    end = at + column.total_compressed_size
    if not 0 <= at <= end <= len(content):
        return False
    plain = values = 0
    while at < end:
        header, after = _struct(content, at)
        plain_size, stored_size, count = (
            header[_PLAIN_SIZE],
            header[_STORED_SIZE],
            header[_INNER[header[_TYPE]]][_VALUES],
        )
        if not all(0 <= number < 2**31 for number in (plain_size, stored_size, count)):
            return False
        if header[_TYPE] != _DICTIONARY:
            values += count
        elif count > plain_size:  # each value of a dictionary has bytes
            return False
        plain += after - at + plain_size
        at = after + stored_size
    return (at, plain, values) == (end, column.total_uncompressed_size, column.num_values)


def _struct(content: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return the 32-bit numbers and the structs of a struct, by the numbers of their fields, and where it ends."""
    found: dict[int, Any] = {}
    field = 0
    while content[at]:
        step, kind = content[at] >> 4, content[at] & 15
        field, at = (field + step, at + 1) if step else _number(content, at + 1)
        if kind == _I32:
            found[field], at = _number(content, at)
        elif kind == _STRUCT and depth < 3:
            found[field], at = _struct(content, at, depth + 1)
        elif kind in (_I16, _I64):  # where 32 bits are due, pyarrow ignores it
            _, at = _number(content, at)
        elif kind == _BINARY:
            size, at = _unsigned(content, at)
            at += size
        elif kind in (_TRUE, _FALSE, _BYTE, _DOUBLE):
            at += {_BYTE: 1, _DOUBLE: 8}.get(kind, 0)
        else:  # no header has lists
            raise ValueError(kind)
    return found, at + 1


def _number(content: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(content, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):  # of 64 bits
        digit = content[at + place]
        value |= (digit & 127) << (7 * place)
        if digit < 128:
            return value, at + place + 1
    raise ValueError(value)
