"""Headers of pages: files of pyarrow are accepted, and each number that contradicts the footer is refused."""

import io
import tracemalloc
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.parquet_pages import require_agreeing_pages
from tests.security.hostile_files import varint

TABLE = pa.table(
    {
        "id": pa.array(range(5000), pa.int64()),
        "name": [f"name {number // 3}" for number in range(5000)],
        "some": [None if number % 3 else number / 7 for number in range(5000)],
        "lists": [list(range(number % 5)) for number in range(5000)],
        "structs": [{"a": bytes([number % 256] * 32), "b": number % 2 == 0} for number in range(5000)],
    }
)


def written(table: pa.Table = TABLE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def check(content: bytes) -> None:
    require_agreeing_pages(content, pq.ParquetFile(pa.BufferReader(content)).metadata)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False},
        {"data_page_size": 1000, "row_group_size": 1200},
        {"write_statistics": False, "dictionary_pagesize_limit": 100},
        {"write_page_index": True, "write_page_checksum": True},
    ],
    ids=str,
)
def test_files_of_pyarrow_agree(version: str, compression: str, options: dict[str, Any]) -> None:
    check(written(data_page_version=version, compression=compression, **options))


def test_an_empty_file_agrees() -> None:
    check(written(TABLE.slice(0, 0)))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("number", ["plain size", "stored size", "values"])
def test_a_header_that_contradicts_the_footer_is_refused(version: str, dictionary: bool, number: str) -> None:
    table = pa.table({"a": [f"{value % 5}" for value in range(100)]})
    options = {"use_dictionary": dictionary, "write_statistics": False, "compression": "none"}
    content = written(table, data_page_version=version, **options)
    check(content)
    assert len(headers(content)) == 1 + dictionary
    for place in headers(content):
        at = place + 2  # behind the first field, the type
        for _ in range(["plain size", "stored size", "values"].index(number)):
            at = after_number(content, at)
        at += number == "values"  # behind the beginning of the struct that has it
        assert content[at] == 0x15, "no field of 32 bits"
        changed = bytearray(content)
        changed[at + 1] ^= 0x40  # 32 more or less
        with pytest.raises(ValueError, match="column a are not as its footer says"):
            check(bytes(changed))


def headers(content: bytes | bytearray) -> list[int]:
    """Return the places of the headers of the first column's pages."""
    column = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(0).column(0)
    return [place for place in (column.dictionary_page_offset, column.data_page_offset) if place is not None]


def after_number(content: bytes | bytearray, at: int) -> int:
    """Return the place behind a field of a number, which is at `at`."""
    at += 1
    while content[at] & 128:
        at += 1
    return at + 1


def test_what_is_no_header_is_refused() -> None:
    content = written(compression="none")
    metadata = pq.ParquetFile(pa.BufferReader(content)).metadata
    for change in (
        bytes(8),
        b"\xff" * 8,
        b"\x19" * 8,
        b"\x1c" * 8,
        b"\x15\x00" * 4,
        b"\x18\xff\xff\xff\xff\xff\xff\x7f",
    ):
        changed = content[:4] + change + content[12:]
        with pytest.raises(ValueError, match="column id are not"):
            require_agreeing_pages(changed, metadata)


@pytest.mark.parametrize("number", range(2))
def test_a_size_of_64_bits_does_not_count(number: int) -> None:
    """pyarrow ignores it, so another field with the same number would say what it reads."""
    content = bytearray(written(pa.table({"a": [1, 2, 3]}), use_dictionary=False, compression="none"))
    (place,) = headers(content)
    at = place + 2 if number == 0 else after_number(content, place + 2)
    assert content[at] == 0x15
    content[at] = 0x16
    with pytest.raises(ValueError, match="column a are not"):
        check(bytes(content))


@pytest.mark.parametrize("field", [2, 2 + 2**16], ids=["a second time", "2 in 16 bits"])
def test_a_second_size_is_refused(field: int) -> None:
    """pyarrow takes the last of them, and reads the number of a field as 16 bits."""
    content = written(pa.table({"a": [1, 2, 3]}), use_dictionary=False, compression="none", write_statistics=False)
    (place,) = headers(content)
    sizes = [place + 2, after_number(content, place + 2)]
    column = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0).column(0)
    end = place + column.total_compressed_size - content[sizes[1] + 1] // 2  # of the header; the size is doubled
    assert content[end - 1] == 0
    more = b"\x05" + varint(field) + varint(60)
    changed = bytearray(content[: end - 1] + more + content[end - 1 : place + column.total_compressed_size - len(more)])
    for size in sizes:  # so that with the longer header, all is as the footer says
        changed[size + 1] -= 2 * len(more)
    with pytest.raises(ValueError, match="column a are not"):
        check(bytes(changed) + content[len(changed) :])


@pytest.mark.parametrize("encoding", ["DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"])
def test_other_encodings_are_refused(encoding: str) -> None:
    """A page of lengths in a delta encoding has a number inside for which pyarrow takes memory."""
    content = written(TABLE.select(["id"]), use_dictionary=False, column_encoding=encoding)
    with pytest.raises(ValueError, match="column id are not"):
        check(content)


def test_other_encodings_of_texts_are_refused() -> None:
    for encoding in ("DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"):
        content = written(TABLE.select(["name"]), use_dictionary=False, column_encoding=encoding)
        with pytest.raises(ValueError, match="column name are not"):
            check(content)


@pytest.mark.parametrize("fields", [b"\x1c\x00", b"\x15\x00", b"\x11", b"\x05\x02\x00"], ids=bytes.hex)
def test_a_huge_header_takes_no_memory(fields: bytes) -> None:
    table = pa.table({"a": range(1_000_000)})
    content = written(table, use_dictionary=False, compression="none", data_page_size=2**24, write_statistics=False)
    parquet = pq.ParquetFile(pa.BufferReader(content))
    changed = content[:4] + fields * (8_000_000 // len(fields)) + content[4 + 8_000_000 // len(fields) * len(fields) :]
    tracemalloc.start()
    with pytest.raises(ValueError, match="column a are not"):
        require_agreeing_pages(changed, parquet.metadata)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_file_of_tiny_pages_is_refused() -> None:
    """Thousands of headers that many columns share would take minutes."""
    table = pa.table({"a": range(20_000)})
    options = {"use_dictionary": False, "data_page_size": 1, "write_batch_size": 1}
    with pytest.raises(ValueError, match="column a are not"):
        check(written(table, **options))
    check(written(table.slice(0, 2000), **options))
