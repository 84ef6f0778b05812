import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.schema import AUGMENTED, INDEX, PACKED, RESIZED, require


@pytest.mark.parametrize("schema", [PACKED, INDEX, AUGMENTED, RESIZED])
def test_schema_survives_parquet(schema, tmp_path):
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    require(pq.read_table(tmp_path / "empty.parquet"), schema, "the table")


def test_each_difference_is_named():
    found = pa.schema(
        [field for field in INDEX if field.name != "row"] + [pa.field("extra", pa.string())], metadata=INDEX.metadata
    )
    found = found.set(found.get_field_index("height"), pa.field("height", pa.int64()))
    with pytest.raises(ValueError, match=r"rows\.parquet does not .* index v2: .*") as error:
        require(found, INDEX, "rows.parquet")
    for difference in ("column row is missing", "column height is int64 instead of int32", "column extra is unknown"):
        assert difference in str(error.value)


def test_another_name_or_version_or_order_is_refused():
    with pytest.raises(ValueError, match="without a name instead of index v2"):
        require(INDEX.remove_metadata(), INDEX, "x")
    later = INDEX.with_metadata({**INDEX.metadata, b"maskformer.version": b"3"})
    with pytest.raises(ValueError, match="index v3 instead of index v2"):
        require(later, INDEX, "x")
    with pytest.raises(ValueError, match="order"):
        require(pa.schema(list(INDEX)[::-1], metadata=INDEX.metadata), INDEX, "x")
