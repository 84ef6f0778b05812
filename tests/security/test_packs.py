"""Packs of a stranger: a manifest, an index and shards whose hashes fit, but not what they say."""

import io
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.manifest import open_pack
from pipelines.data.pack import PackConfig, pack
from pipelines.data.pixels import compress_index_map
from pipelines.data.reading import read_files
from pipelines.data.schema import INDEX
from pipelines.errors import UserError
from pipelines.evaluation.predictions import _Compare, _read
from pipelines.evaluation.score import _truth
from pipelines.storage import locate, sha256
from tests.pipelines.data.coco_folder import SPLIT, write_coco_folder
from tests.security.hostile_files import BOMBS, NO_FILES, OTHER_FORMATS, encoded, noise, varint
from tests.security.hostile_use import REFUSALS, use_pack
from tests.security.isolated import MEMORY, run
from tests.security.test_data_sets import ends_of, require

Change = Callable[[Path], object]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    write_coco_folder(folder / "coco", 3)
    dataset = read_coco(CocoLayout.find(str(folder / "coco"), SPLIT))
    pack(dataset, str(folder / "packed"), PackConfig(rows_per_shard=2), in_process=True)
    return folder / "packed"


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    def edit(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_text())
        change(found)
        (folder / "manifest.json").write_text(json.dumps(found))

    return edit


def text(make: Callable[[str], str | bytes]) -> Change:
    def edit(folder: Path) -> None:
        made = make((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_bytes(made if isinstance(made, bytes) else made.encode())

    return edit


def index_is(content: bytes, folder: Path, **values: Any) -> None:
    """Write the index, and its hash into the manifest."""
    (folder / "index.parquet").write_bytes(content)
    facts = {"sha256": sha256(content), "bytes": len(content), **values}
    manifest(lambda found: found["index"].update(facts))(folder)


def index(change: Callable[[list[dict[str, Any]]], object], **options: Any) -> Change:
    """Return a change of the rows of the index."""

    def edit(folder: Path) -> None:
        rows = pq.read_table(folder / "index.parquet").to_pylist()
        change(rows)
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX), buffer, **options)
        index_is(buffer.getvalue(), folder)

    return edit


def first(**values: Any) -> Change:
    return index(lambda rows: rows[0].update(values))


def part(name: str, **values: Any) -> Change:
    return index(lambda rows: rows[0][name].update(values))


def file(name: str, content: Callable[[dict[str, Any]], bytes], **values: Any) -> Change:
    """Replace a file of the first row: the three files are written to a new shard, and the index fits them."""

    def edit(folder: Path) -> None:
        rows = pq.read_table(folder / "index.parquet").to_pylist()
        shard = (folder / "shard-00000.parquet").read_bytes()
        row, new = rows[0], bytearray(shard)
        for each in ("panoptic", "image", "index_map"):
            place = row[each]
            data = shard[place["offset"] : place["offset"] + place["bytes"]] if each != name else content(row)
            row[each] = {"offset": len(new), "bytes": len(data), "sha256": bytes.fromhex(sha256(data))}
            new += data
        row.update(values)
        (folder / "shard-00000.parquet").write_bytes(new)
        manifest(lambda found: found["shards"][0].update(bytes=len(new), sha256=sha256(bytes(new))))(folder)
        index(lambda found: found.__setitem__(slice(None), rows))(folder)

    return edit


def plane(make: Callable[[int, int], np.ndarray], classes: int) -> Callable[[dict[str, Any]], bytes]:
    return lambda row: compress_index_map(make(row["height"], row["width"]), classes)


def table(make: Callable[[], pa.Table], **options: Any) -> Change:
    """Replace the index by another table."""

    def edit(folder: Path) -> None:
        buffer, made = io.BytesIO(), make()
        pq.write_table(made, buffer, **options)
        index_is(buffer.getvalue(), folder)

    return edit


def nested(depth: int) -> pa.Table:
    kind: pa.DataType = pa.int8()
    for _ in range(depth):
        kind = pa.list_(kind)
    return pa.table([pa.nulls(1, kind)], names=["a"])


def linked(name: str, target: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def many_values(rows: list[dict[str, Any]]) -> None:
    rows[0]["classes"] = np.zeros(60_000_000, np.int16)


def many_rows(number: int) -> Change:
    """Return an index of few bytes with many rows, and a manifest that says so."""

    def edit(folder: Path) -> None:
        rows = pq.read_table(folder / "index.parquet")
        content = io.BytesIO()
        pq.write_table(rows.take(np.zeros(number, np.int64)), content, compression="zstd")
        index_is(content.getvalue(), folder, rows=number)
        manifest(lambda found: found.update(num_images=number, shards=[{**found["shards"][0], "rows": number}]))(folder)

    return edit


def long_names(length: int, number: int) -> Change:
    """Return an index whose rows all have one name of this length, which the file has once."""

    def edit(folder: Path) -> None:
        rows = pq.read_table(folder / "index.parquet").take(np.zeros(number, np.int64))
        ids, names = pa.array(range(number), pa.int64()), pa.array(["a" * length]).take(pa.array([0] * number))
        rows = rows.set_column(0, INDEX.field(0), ids).set_column(1, INDEX.field(1), names)
        content = io.BytesIO()
        pq.write_table(rows, content, compression="zstd", dictionary_pagesize_limit=2**24)
        index_is(content.getvalue(), folder, rows=number)
        manifest(lambda found: found.update(num_images=number, shards=[{**found["shards"][0], "rows": number}]))(folder)

    return edit


def footer_says(number: int) -> Change:
    """Write an index whose footer, and a manifest that, says that it has another number of rows."""

    def edit(folder: Path) -> None:
        index(lambda rows: None, row_group_size=1)(folder)
        content = bytearray((folder / "index.parquet").read_bytes())
        start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        # In Thrift's compact protocol: field 3 (num_rows) of type i64, whose value 3 is zigzag 6, and a list of groups.
        place = content.index(b"\x16\x06\x19\x3c", start)
        content[place + 1 : place + 2] = varint(number)
        content[-8:-4] = (len(content) - 8 - start).to_bytes(4, "little")
        index_is(bytes(content), folder, rows=number)
        manifest(lambda found: found.update(num_images=number, shards=[{**found["shards"][0], "rows": number}]))(folder)

    return edit


def large_page(size: int) -> Change:
    """Write an index with a name of this length, whose footer says that the column has 100 bytes."""

    def edit(folder: Path) -> None:
        rows = pq.read_table(folder / "index.parquet")
        names = pa.array(["a" * size, *rows["file_name"].to_pylist()[1:]])
        buffer = io.BytesIO()
        pq.write_table(rows.set_column(1, INDEX.field(1), names), buffer, compression="zstd", use_dictionary=False)
        content = buffer.getvalue()
        column = pq.ParquetFile(buffer).metadata.row_group(0).column(1)
        # In the footer, fields 6 and 7 of a column are its sizes, of type i64 in Thrift's compact protocol.
        stored = b"\x16" + varint(column.total_compressed_size)
        said = b"\x16" + varint(column.total_uncompressed_size) + stored
        start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        footer = content[start:-8]
        assert footer.count(said) == 1
        footer = footer.replace(said, b"\x16" + varint(100) + stored)
        index_is(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1", folder)

    return edit


ATTACKS: dict[str, tuple[Change, str]] = {
    **{
        f"a shard named {name!r}": (manifest(lambda m, name=name: m["shards"][0].update(file=name)), "names the file")
        for name in (
            "/etc/passwd",
            "../coco/x",
            "s3://bucket/x",
            "shard-00001.parquet",
            "shard-00000.parquet/",
            "",
            "\x1b[2J",
        )
    },
    "an index named /dev/zero": (manifest(lambda m: m["index"].update(file="/dev/zero")), "names the file"),
    "a shard without a name": (manifest(lambda m: m["shards"][0].pop("file")), "no 'file'"),
    "a shard whose name is a number": (manifest(lambda m: m["shards"][0].update(file=5)), "names the file 5"),
    "shards that are a text": (manifest(lambda m: m.update(shards="abc")), "not a manifest"),
    "a manifest that is a list": (text(lambda _: "[]"), "not a manifest"),
    "a manifest nested 100,000 deep": (text(lambda _: "[" * 100_000), "nested too deeply"),
    "a manifest with a number of 5,000 digits": (text(lambda t: t.replace("3", "3" * 5000, 1)), "not a manifest"),
    "a manifest in UTF-16": (text(lambda t: t.encode("utf-16")), "not a manifest"),
    "a manifest of 40 MB": (text(lambda t: t + " " * 40_000_000), "more than"),
    "a version that is a text": (manifest(lambda m: m.update(version="3")), "has version '3'"),
    "a version that is a boolean": (manifest(lambda m: m.update(version=True)), "has version True"),
    "a version with a terminal's commands": (manifest(lambda m: m.update(version="\x1b[2J\n")), "has version"),
    "no version": (manifest(lambda m: m.pop("version")), "no 'version'"),
    "no categories": (manifest(lambda m: m.update(categories=[])), "not a manifest"),
    "a category with a terminal's commands": (
        manifest(lambda m: m["categories"][0].update(id="\x1b[2J")),
        "not a manifest",
    ),
    "10^18 images": (manifest(lambda m: m.update(num_images=10**18)), "differ"),
    "10^18 rows of a shard": (manifest(lambda m: m["shards"][0].update(rows=10**18)), "differ"),
    "10^30 rows": (manifest(lambda m: m["shards"][0].update(rows=10**30)), "not a number from 0 on"),
    "negative rows": (manifest(lambda m: m["shards"][0].update(rows=-1)), "not a number from 0 on"),
    "true rows": (manifest(lambda m: m["shards"][0].update(rows=True)), "not a number from 0 on"),
    "counts that agree but are wrong": (
        manifest(
            lambda m: (m.update(num_images=10**9), m["index"].update(rows=10**9), m["shards"][0].update(rows=10**9 - 1))
        ),
        "3 rows, and the manifest says",
    ),
    "a hash that is missing": (manifest(lambda m: m["index"].pop("sha256")), "no 'sha256'"),
    "a hash that is none": (manifest(lambda m: m["shards"][0].update(sha256="x")), "not a SHA-256"),
    "another hash": (manifest(lambda m: m["index"].update(sha256="0" * 64)), "does not have the hash"),
    "other counts of segments": (
        manifest(lambda m: m.update(num_segments=m["num_segments"] + 1)),
        "counts other segments",
    ),
    "other counts of things": (manifest(lambda m: m.update(num_things=0)), "counts other things"),
    "an index that is no Parquet": (lambda folder: index_is(b"PAR1" + bytes(100), folder), "cannot be read"),
    "an index of a huge footer": (lambda folder: index_is(b"PAR1\xff\xff\xff\x7fPAR1", folder), "its footer has"),
    "an empty index": (lambda folder: index_is(b"", folder), "cannot be read"),
    "an index of another schema": (table(lambda: pa.table({"a": [1, 2, 3]})), "does not have the schema"),
    "an index nested 1,000 deep": (table(lambda: nested(1000)), "does not have the schema|cannot be read"),
    "an index nested 8,000 deep": (
        table(lambda: nested(8000), store_schema=False),
        "its footer has|does not have the schema|cannot be read",
    ),
    "an index of 60 million values": (index(many_values, compression="zstd"), "declares"),
    "an index of 500,000 equal rows": (many_rows(500_000), "do not ascend"),
    "an index of 1,500 names of 1 MB": (long_names(2**20, 1500), "more than 4,095 bytes"),
    "an index of 200,000 names of 4,000 bytes": (long_names(4000, 200_000), "file names of 800,000,000 bytes"),
    "an index whose page has 300 MB, and its footer says 100 bytes": (large_page(300_000_000), "pages of its column"),
    "an index in a delta encoding": (
        index(lambda rows: None, use_dictionary=False, column_encoding={"file_name": "DELTA_LENGTH_BYTE_ARRAY"}),
        "pages of its column file_name",
    ),
    "an index whose footer says 150 million rows": (footer_says(150_000_000), "other numbers of rows"),
    "height 0": (first(height=0), "an image without a size"),
    "a negative width": (first(width=-32), "an image without a size"),
    "10^18 pixels": (first(height=10**9, width=10**9), "more than 52,000,000 pixels"),
    "another height": (first(height=1000), "cannot be used"),
    "height and width exchanged": (
        index(lambda rows: rows[0].update(height=rows[0]["width"], width=rows[0]["height"])),
        "cannot be used",
    ),
    "a missing height": (first(height=None), "a value that is missing"),
    "a missing class": (index(lambda rows: rows[0]["classes"].__setitem__(0, None)), "a value that is missing"),
    "a missing offset": (part("image", offset=None), "a value that is missing"),
    "a negative image id": (first(image_id=-1), "must not be negative"),
    "an image id twice": (index(lambda rows: rows[1].update(image_id=rows[0]["image_id"])), "do not ascend"),
    "shard 7": (first(shard=7), "lists other images"),
    "shard -1": (first(shard=-1), "lists other images"),
    "another row": (first(row=1), "lists other images"),
    "a negative offset": (part("image", offset=-5), "without a size|follow one another"),
    "an offset beyond the shard": (part("index_map", offset=10**12), "follow one another"),
    "an offset of 2^63 - 1": (part("index_map", offset=2**63 - 1), "follow one another|ends behind"),
    "2^62 bytes": (part("image", bytes=2**62), "follow one another|too large"),
    "no bytes": (part("image", bytes=0), "without a size"),
    "files that overlap": (
        index(lambda rows: rows[0]["image"].update(offset=rows[0]["panoptic"]["offset"])),
        "follow one another",
    ),
    "a file that ends behind its shard": (index(lambda rows: rows[0]["index_map"].update(bytes=10**7)), "ends behind"),
    "class 5,000": (index(lambda rows: rows[0]["classes"].__setitem__(0, 5000)), "a class that is none of"),
    "class -1": (index(lambda rows: rows[0]["classes"].__setitem__(0, -1)), "a class that is none of"),
    "an unknown category": (
        index(lambda rows: rows[0]["segments"][0].update(category_id=9999)),
        "a segment of a category",
    ),
    "more things than segments": (first(num_things=100), "counts other things"),
    "another hash of a row": (part("image", sha256=bytes(32)), "damaged"),
    "numbers beyond the segments": (
        file("index_map", plane(lambda h, w: np.full((h, w), 200, np.uint16), 5)),
        "has the number 200",
    ),
    "an index map of another size": (
        file("index_map", plane(lambda h, w: np.ones((h + 1, w), np.uint16), 5)),
        "index map is not",
    ),
    "an index map that expands to 1 GB": (
        file("index_map", lambda row: pa.Codec("zstd").compress(bytes(2**28), asbytes=True)),
        "index map is not",
    ),
    "an index map that is none": (file("index_map", lambda row: b"no zstd"), "index map is not"),
    "a PNG of another size": (
        file("panoptic", lambda row: encoded(Image.new("RGB", (5, 7)), "PNG")),
        "the PNG is 5 x 7",
    ),
    "an image of another size": (file("image", lambda row: encoded(noise(500, 400), "JPEG")), "has the size"),
    "a map that is a JPEG": (file("panoptic", lambda row: encoded(noise(), "JPEG")), "it is JPEG, not PNG"),
    "gray of 16 bits": (
        file("image", lambda row: encoded(Image.new("I;16", (row["width"], row["height"])), "PNG")),
        "more than 8 bits",
    ),
    **{
        f"{name} as an image": (file("image", lambda row, make=make: make()), "cannot be used")
        for name, make in list(OTHER_FORMATS.items())[:8]
    },
    **{
        f"{name} as a map": (file("panoptic", lambda row, make=make: make()), "cannot be used")
        for name, make in list(BOMBS.items())[:3]
    },
    **{
        f"{kind} as {name}": (lambda folder, make=make, name=name: make(folder / name), "")
        for kind, make in NO_FILES.items()
        for name in ("manifest.json", "index.parquet", "shard-00000.parquet")
        if not (kind == "a sparse file of 20 GB" and name == "shard-00000.parquet")
    },
}

ATTACKS |= {
    f"{source} as {name}": (partial(linked, name, source), "Name a regular file")
    for source in ("/proc/self/pagemap", "/proc/self/status")
    for name in ("manifest.json", "index.parquet")
}

_AT_A_TIME = 15
BATCHES = [list(ATTACKS)[start : start + _AT_A_TIME] for start in range(0, len(ATTACKS), _AT_A_TIME)]


@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_hostile_packs(good: Path, tmp_path: Path, number: int) -> None:
    for place, name in enumerate(BATCHES[number]):
        shutil.copytree(good, tmp_path / str(place))
        ATTACKS[name][0](tmp_path / str(place))
    calls = [(str(tmp_path / str(place)),) for place in range(len(BATCHES[number]))]
    for name, outcome in zip(BATCHES[number], ends_of("use_pack", calls, tmp_path), strict=True):
        require(outcome, "!", name)
        expected = ATTACKS[name][1].split("|")
        assert any(words in outcome.text for words in expected), (name, outcome)


def read_results(file: str, pack_folder: str) -> int:
    return len(_read(locate(file), open_pack(pack_folder), defaultdict(list)).annotations)


def test_results_of_nested_lists_are_read_in_bounded_memory(good: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    entry = '{"image_id": 11, "file_name": "a.png", "segments_info": [], "more": [' + "[],[]," * 10**4 + "[]]}"
    file.write_text('{"info": 1, "annotations": [' + ", ".join([entry] * 300) + "]}")
    outcome = run(read_results, str(file), str(good), refusals=REFUSALS, seconds=60)  # it imports Ray
    assert (outcome.kind, outcome.text) == ("result", "1"), outcome
    assert outcome.memory < MEMORY, outcome
    file.write_text('{"annotations": [' + "[],[]," * 2 * 10**6 + "[]]}")
    outcome = run(read_results, str(file), str(good), refusals=REFUSALS, seconds=60)  # it imports Ray
    assert outcome.kind == "refused", outcome
    assert outcome.memory < MEMORY, outcome
    assert "Entry 0 of them lacks one" in outcome.text


@pytest.mark.parametrize("name", ["a PNG of another size", "a map that is a JPEG"])
def test_a_bad_map_is_named_when_results_are_compared(good: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(good, tmp_path / "packed")
    ATTACKS[name][0](tmp_path / "packed")
    samples = open_pack(str(tmp_path / "packed"))
    entry = samples.index.to_pylist()[0]
    size = entry["height"], entry["width"]
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", size[::-1]), "PNG"))
    with pytest.raises(UserError, match=rf"Row 0 of .*, image {entry['image_id']}, cannot be used: .*Delete the pack"):
        _Compare(samples, str(tmp_path))._compare(0, {"file_name": "a.png", "segments_info": []})
    panoptic, _ = read_files(samples.shards[0], entry, "panoptic", "image")
    row = {"image_id": 5, "panoptic": bytes(panoptic), "original_height": size[0], "original_width": size[1]}
    with pytest.raises(UserError, match=r"Image 5 of the pack cannot be used: .*Delete the pack"):
        _truth(row)


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 30


def test_a_good_pack_is_used(good: Path) -> None:
    outcome = run(use_pack, str(good), refusals=REFUSALS)
    require(outcome, "3 images, 3 resized")
