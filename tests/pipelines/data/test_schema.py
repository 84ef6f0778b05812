import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.schema import AUGMENTED, INDEX, PACKED, RESIZED, require, row_hash


@pytest.mark.parametrize("schema", [PACKED, INDEX, AUGMENTED, RESIZED])
def test_schema_survives_parquet(schema, tmp_path):
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    require(pq.read_table(tmp_path / "empty.parquet"), schema, "the table")


def test_each_difference_is_named():
    found = pa.schema(
        [field for field in INDEX if field.name != "row"] + [pa.field("extra", pa.string())], metadata=INDEX.metadata
    )
    found = found.set(found.get_field_index("height"), pa.field("height", pa.int64()))
    with pytest.raises(ValueError, match=r"rows\.parquet does not .* index v1: .*") as error:
        require(found, INDEX, "rows.parquet")
    for difference in ("column row is missing", "column height is int64 instead of int32", "column extra is unknown"):
        assert difference in str(error.value)


def test_another_name_or_version_or_order_is_refused():
    with pytest.raises(ValueError, match="without a name instead of index v1"):
        require(INDEX.remove_metadata(), INDEX, "x")
    later = INDEX.with_metadata({**INDEX.metadata, b"maskformer.version": b"2"})
    with pytest.raises(ValueError, match="index v2 instead of index v1"):
        require(later, INDEX, "x")
    with pytest.raises(ValueError, match="order"):
        require(pa.schema(list(INDEX)[::-1], metadata=INDEX.metadata), INDEX, "x")


def test_the_hash_covers_every_column() -> None:
    row = {
        "image_id": 1,
        "file_name": "a.jpg",
        "height": 2,
        "width": 3,
        "image": b"jpeg",
        "panoptic": b"png",
        "segments": [{"id": 7, "category_id": 1, "iscrowd": False}],
        "index_map": b"plane",
        "classes": [0],
        "sha256": "",
    }
    assert [*row] == PACKED.names
    hashes = {row_hash(row)}
    for name, other in (
        ("image_id", 2),
        ("file_name", "b.jpg"),
        ("height", 3),
        ("width", 2),
        ("image", b"jpg"),
        ("panoptic", b"pnd"),
        ("segments", [{"id": 7, "category_id": 1, "iscrowd": True}]),
        ("index_map", b"plan"),
        ("classes", [1]),
    ):
        hashes.add(row_hash({**row, name: other}))
    assert len(hashes) == 10
    assert row_hash({**row, "image": b"jpegp", "panoptic": b"ng"}) not in hashes
