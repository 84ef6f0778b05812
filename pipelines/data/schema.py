"""The schemas of the data pipeline: five pyarrow schemas, each with a name and a version.

An annotation JSON is read to RECORD. The packer writes PACKED and INDEX. Ray Data tasks read both and return AUGMENTED
for training or RESIZED for inference, and the receiver of a batch checks its schema. Name and version are in the
schema's metadata. A change of meaning needs a new version even if no type changes.
"""

import pyarrow as pa

_NAME, _VERSION = b"maskformer.schema", b"maskformer.version"


def _schema(name: str, version: int, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={_NAME: name.encode(), _VERSION: str(version).encode()})


RECORD = _schema(
    "record",
    1,
    [
        pa.field("image_id", pa.int64()),
        pa.field("image_file", pa.string()),  # relative to the folder of the images
        pa.field("panoptic_file", pa.string()),  # relative to the folder of the PNGs
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field(
            "segments",  # in the annotation's order
            pa.list_(
                pa.struct(
                    [
                        ("id", pa.int64()),
                        ("category_id", pa.int64()),
                        ("iscrowd", pa.bool_()),
                        # What is derived from the pixels is optional, and is checked but not used.
                        ("area", pa.int64()),
                        ("bbox", pa.list_(pa.float64())),
                    ]
                )
            ),
        ),
    ],
)
"""One row is one annotated image of an annotation JSON. Values of segments are null where they are not usable."""

_SEGMENTS = pa.list_(pa.struct([("id", pa.int32()), ("category_id", pa.int32()), ("iscrowd", pa.bool_())]))
_PART = pa.struct([("offset", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.binary(32))])

FILES = ("panoptic", "image", "index_map")
"""The columns of a packed row that are files."""

PACKED = _schema(
    "packed",
    3,
    [
        pa.field("image_id", pa.int64()),
        pa.field("file_name", pa.string()),  # of the image, as the annotation JSON has it
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("segments", _SEGMENTS),  # in the annotation's order; ids are those of the PNG, R + 256 G + 65536 B
        pa.field("classes", pa.list_(pa.int16())),  # class index of each number of the index map, from 1 on
        # Evaluation reads the first two of these, training the last two, in one piece.
        pa.field(
            "panoptic", pa.large_binary()
        ),  # the panoptic PNG's bytes, untouched unless classes were merged or dropped
        pa.field("image", pa.large_binary()),  # the image file's bytes, untouched
        # What training reads in place of the PNG, see `pixels.index_map`: zstd of height * width numbers, row-major.
        # uint8, or little-endian uint16 for more than 255 classes above.
        pa.field("index_map", pa.large_binary()),
    ],
)
"""One row is one image with its annotation."""

INDEX = _schema(
    "index",
    2,
    [
        *(PACKED.field(name) for name in ("image_id", "file_name", "height", "width", "segments", "classes")),
        pa.field("num_things", pa.int32()),  # segments of thing classes, not counting crowds
        pa.field("num_segments", pa.int32()),  # all segments, not counting crowds
        pa.field("shard", pa.int32()),  # index in the manifest's list of shards
        pa.field("row", pa.int32()),  # within the shard; also the number of its row group
        *(pa.field(name, _PART) for name in FILES),  # where in the shard, and its hash
    ],
)
"""One row per packed row, in ascending image id: all of it but the three files, and where they are in the shard.

A reader needs no more than a range of the shard's bytes. The manifest has the index's hash.
"""

AUGMENTED = _schema(
    "augmented",
    3,
    [
        pa.field("position", pa.int64()),  # in the infinite order of samples
        pa.field("epoch", pa.int32()),
        pa.field("image_id", pa.int64()),
        pa.field("height", pa.int32()),  # of the augmented image
        pa.field("width", pa.int32()),
        pa.field("image", pa.large_binary()),  # height * width * 3 uint8, RGB, row-major
        # height * width numbers, row-major: 0 is void or crowd, k is the k-th segment. uint8, or little-endian uint16
        # for more than 255 segments.
        pa.field("index_map", pa.large_binary()),
        pa.field("classes", pa.list_(pa.int16())),  # class index of each segment
        pa.field("skipped", pa.string()),  # why another image than the order's is at this position; usually null
    ],
)
"""One row is one training sample, to be padded and stacked."""

RESIZED = _schema(
    "resized",
    1,
    [
        pa.field("image_id", pa.int64()),
        pa.field("file_name", pa.string()),
        pa.field("height", pa.int32()),  # of the image as resized for the model
        pa.field("width", pa.int32()),
        pa.field("image", pa.large_binary()),  # height * width * 3 uint8, RGB, row-major
        pa.field("original_height", pa.int32()),
        pa.field("original_width", pa.int32()),
        pa.field("panoptic", pa.large_binary()),  # the ground truth at its original size, as packed
        pa.field("segments", _SEGMENTS),
    ],
)
"""One row is one image for inference, with its ground truth."""


def require(data: pa.Table | pa.RecordBatch | pa.Schema, expected: pa.Schema, what: str) -> None:
    """Check that `data` has the columns, types and version of `expected`.

    Nullability and the metadata of columns are not compared.

    Args:
        what: names the data in the message, such as a file's URI.

    Raises:
        ValueError: they differ; the message lists each difference.
    """
    found = data if isinstance(data, pa.Schema) else data.schema
    wanted, got = _label(expected), _label(found)
    differences = [f"schema {got} instead of {wanted}"] if got != wanted else []
    for field in expected:
        indices = found.get_all_field_indices(field.name)
        if len(indices) != 1:
            differences.append(f"column {field.name} is {'missing' if not indices else 'duplicated'}")
        elif found.field(indices[0]).type != field.type:
            differences.append(f"column {field.name} is {found.field(indices[0]).type} instead of {field.type}")
    differences += [f"column {name} is unknown" for name in found.names if name not in expected.names]
    if not differences and found.names != expected.names:
        differences.append(f"the columns are in the order {found.names} instead of {expected.names}")
    if differences:
        raise ValueError(
            f"{what} does not have the schema {wanted}: {'; '.join(differences)}. "
            f"Write it again with this version of the program."
        )


def _label(schema: pa.Schema) -> str:
    metadata = schema.metadata or {}
    if _NAME not in metadata:
        return "without a name"
    return f"{metadata[_NAME].decode()} v{metadata.get(_VERSION, b'?').decode()}"
