import hashlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from maskformer.taxonomy import Taxonomy
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.manifest import read_index, read_manifest
from pipelines.data.pack import PackConfig, PackReport, open_output, pack
from pipelines.data.pixels import decode_panoptic, decompress_index_map, index_map
from pipelines.data.schema import FILES as ROW_FILES
from pipelines.data.schema import INDEX, PACKED, require
from pipelines.errors import UserError
from pipelines.storage import Location, locate, sha256
from tests.pipelines.data.coco_folder import OTHER_THING, SPLIT, THING, edit_json, json_file, write_coco_folder

FILES = ["index.parquet", "manifest.json", "pack.json", *(f"shard-0000{number}.parquet" for number in range(3))]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_coco_folder(tmp_path / "coco")
    return tmp_path / "coco"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "packed"


def packed(folder: Path | str, output: Path | str, rows: int = 2) -> PackReport:
    return pack(
        read_coco(CocoLayout.find(str(folder), SPLIT)), str(output), PackConfig(rows_per_shard=rows), in_process=True
    )


def contents(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(output.iterdir())}


def test_shards_hold_the_files_as_they_are(tmp_path, output):
    document = write_coco_folder(tmp_path)
    packed(tmp_path, output)
    annotations = {annotation["image_id"]: annotation for annotation in document["annotations"]}
    rows = []
    for number in range(3):
        table = pq.read_table(output / f"shard-0000{number}.parquet")
        require(table, PACKED, "shard")
        rows += table.to_pylist()
    assert [row["image_id"] for row in rows] == [11, 12, 13, 14, 15]
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    for row in rows:
        image = (tmp_path / SPLIT / row["file_name"]).read_bytes()
        annotation = annotations[row["image_id"]]
        panoptic = (tmp_path / "annotations" / f"panoptic_{SPLIT}" / annotation["file_name"]).read_bytes()
        assert (row["image"], row["panoptic"]) == (image, panoptic)
        taxonomy = Taxonomy.from_coco(document["categories"])
        plane, classes = index_map(decode_panoptic(panoptic), annotation["segments_info"], taxonomy)
        assert row["classes"] == classes.tolist()
        size = (row["height"], row["width"])
        np.testing.assert_array_equal(decompress_index_map(row["index_map"], size, len(classes)), plane)
        assert (row["height"], row["width"]) == sizes[row["image_id"]]
        keys = ("id", "category_id", "iscrowd")
        assert row["segments"] == [{key: segment[key] for key in keys} for segment in annotation["segments_info"]]


def test_the_index_says_all_but_the_files_and_where_they_are(folder, output):
    packed(folder, output)
    index = pq.read_table(output / "index.parquet")
    require(index, INDEX, "index")
    rows = [row for shard in sorted(output.glob("shard-*")) for row in pq.read_table(shard).to_pylist()]
    contents = [shard.read_bytes() for shard in sorted(output.glob("shard-*"))]
    for entry, row in zip(index.to_pylist(), rows, strict=True):
        assert {name: entry[name] for name in PACKED.names if name not in ROW_FILES} == {
            name: value for name, value in row.items() if name not in ROW_FILES
        }
        assert (entry["num_things"], entry["num_segments"]) == (2, 5)
        for name in ROW_FILES:
            start, length = entry[name]["offset"], entry[name]["bytes"]
            assert contents[entry["shard"]][start : start + length] == row[name]
            assert entry[name]["sha256"] == hashlib.sha256(row[name]).digest()
        # Evaluation and training each read two files in one piece.
        order = [entry[name]["offset"] for name in ROW_FILES]
        assert order == sorted(order)


def test_one_row_group_holds_one_row_and_no_copy_of_the_bytes(folder, output):
    packed(folder, output)
    metadata = pq.ParquetFile(output / "shard-00000.parquet").metadata
    assert metadata.num_row_groups == metadata.num_rows == 2
    for group in range(2):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            assert chunk.compression == "UNCOMPRESSED"
            assert chunk.statistics is None
            assert not chunk.has_dictionary_page


def test_index_finds_each_row(folder, output):
    report = packed(folder, output)
    location = locate(output)
    index = read_index(location, read_manifest(location)).to_pylist()
    assert [row["image_id"] for row in index] == [11, 12, 13, 14, 15]
    for row in index:
        shard = pq.ParquetFile(output / report.manifest.shards[row["shard"]].file)
        found = shard.read_row_group(row["row"]).to_pylist()[0]
        assert {key: found[key] for key in ("image_id", "file_name", "height", "width")} == {
            key: row[key] for key in ("image_id", "file_name", "height", "width")
        }
        counted = [segment for segment in found["segments"] if not segment["iscrowd"]]
        assert row["num_segments"] == len(counted) == 5
        assert row["num_things"] == sum(s["category_id"] in (THING, OTHER_THING) for s in counted) == 2


def test_the_manifest_describes_the_pack(folder, output):
    report = packed(folder, output)
    assert sorted(contents(output)) == FILES
    manifest = report.manifest
    assert (manifest.num_images, manifest.num_segments, manifest.num_things) == (5, 25, 10)
    assert [shard.rows for shard in manifest.shards] == [2, 2, 1]
    for file in (*manifest.shards, manifest.index):
        content = (output / file.file).read_bytes()
        assert (len(content), sha256(content)) == (file.bytes, file.sha256)
    assert manifest.taxonomy.names == ("car", "train", "banner", "blanket", "rug")
    assert not report.was_complete


def test_packs_are_equal_if_and_only_if_their_inputs_are(folder, tmp_path):
    first = packed(folder, tmp_path / "a").manifest
    second = packed(folder, tmp_path / "b").manifest
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert first == second
    other = packed(folder, tmp_path / "c", rows=3).manifest
    assert other.fingerprint != first.fingerprint
    assert other.data_hash != first.data_hash


def test_a_complete_pack_is_not_changed(folder, output):
    first = packed(folder, output)
    before = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    again = packed(folder, output)
    assert again.was_complete
    assert again.manifest == first.manifest
    assert {file: file.stat().st_mtime_ns for file in output.iterdir()} == before


class Interrupted(BaseException):
    pass


def stop_before_write(monkeypatch, number: int, names: list[str]) -> None:
    """Make the `number`-th write, counted from 0, fail; append the names of all files written to `names`."""
    write = Location.write_bytes

    def write_or_stop(self: Location, data: bytes) -> None:
        if len(names) == number:
            raise Interrupted
        names.append(self.name)
        write(self, data)

    monkeypatch.setattr(Location, "write_bytes", write_or_stop)


@pytest.mark.parametrize("number", range(9))
def test_an_interrupted_pack_resumes_to_the_same_bytes(folder, output, tmp_path, monkeypatch, number):
    packed(folder, tmp_path / "complete")
    with monkeypatch.context() as patch:
        stop_before_write(patch, number, [])
        with pytest.raises(Interrupted):
            packed(folder, output)
    if number:
        with pytest.raises(UserError, match="is not complete"):
            read_manifest(locate(output))
    # A kill during a write leaves the first file; a kill during the test whether the folder can be written, the second.
    output.mkdir(exist_ok=True)
    for name in (f".shard-00001.parquet.{'0' * 32}.tmp", f"..manifest.json.{'0' * 32}.tmp.{'0' * 32}.tmp"):
        (output / name).write_bytes(b"half")

    names: list[str] = []
    with monkeypatch.context() as patch:
        stop_before_write(patch, 100, names)
        assert not packed(folder, output).was_complete
    assert contents(output) == contents(tmp_path / "complete")
    # Writes are pack.json, then each shard and pack.json again, then index and manifest.
    kept = sum(number > write for write in (2, 4, 6))
    assert sum(name.startswith("shard") for name in names) == 3 - kept


def test_a_full_disk_leaves_nothing_half_written(folder, output, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # room for pack.json but not for a shard
    try:
        with pytest.raises(UserError, match="no space is left"):
            packed(folder, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in output.iterdir()] == ["pack.json"]
    packed(folder, output)
    packed(folder, tmp_path / "complete")
    assert contents(output) == contents(tmp_path / "complete")


def test_a_missing_or_damaged_shard_of_a_partial_pack_is_written_again(folder, output, tmp_path):
    packed(folder, tmp_path / "complete")
    packed(folder, output)
    (output / "manifest.json").unlink()
    (output / "shard-00000.parquet").unlink()
    (output / "shard-00001.parquet").write_bytes(b"damaged")
    packed(folder, output)
    assert contents(output) == contents(tmp_path / "complete")


def test_left_out_images_are_part_of_the_input(folder, output, tmp_path):
    dataset, config = read_coco(CocoLayout.find(str(folder), SPLIT)), PackConfig(rows_per_shard=2)
    report = pack(dataset, str(output), config, left_out=[14, 12], in_process=True)
    index = read_index(report.output, report.manifest)
    assert index["image_id"].to_pylist() == [11, 13, 15]
    assert report.manifest.fingerprint != packed(folder, tmp_path / "all").manifest.fingerprint
    assert json.loads((output / "pack.json").read_text())["source"]["left_out"] == [12, 14]
    with pytest.raises(UserError, match=r"another input .*left_out is None, was \[12, 14\]\)"):
        packed(folder, output)
    with pytest.raises(UserError, match=r"another input .*left_out is \[12\], was \[12, 14\]\)"):
        pack(dataset, str(output), config, left_out=[12], in_process=True)
    # A complete pack is found again without the check that decides what is left out.
    found = open_output(dataset, str(output), config, skip_bad=True)
    assert found is not None
    assert found.manifest == report.manifest
    with pytest.raises(UserError, match="another input"):
        open_output(dataset, str(output), config)


@pytest.mark.parametrize("place", ["/proc/packed", "/dev/null/packed"])
def test_a_folder_that_cannot_be_made_is_refused(folder, place):
    dataset = read_coco(CocoLayout.find(str(folder), SPLIT))
    with pytest.raises(UserError, match=rf"Cannot (write|access) {place}.*\. Choose a ") as error:
        open_output(dataset, place, PackConfig())
    assert "\n" not in str(error.value)


def test_opening_an_output_leaves_no_trace(folder, tmp_path):
    dataset = read_coco(CocoLayout.find(str(folder), SPLIT))
    assert open_output(dataset, str(tmp_path / "new" / "packed"), PackConfig()) is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert open_output(dataset, str(tmp_path / "old"), PackConfig()) is None
    assert list((tmp_path / "old").iterdir()) == []


def test_a_pack_of_another_input_is_not_touched(folder, output):
    packed(folder, output)
    before = contents(output)
    with pytest.raises(UserError, match=r"another input \(rows_per_shard is 3, was 2\); give another folder"):
        packed(folder, output, rows=3)
    edit_json(folder, lambda document: document.update(info="new"))
    with pytest.raises(UserError, match=r"another input \(annotations_sha256 is "):
        packed(folder, output)
    assert contents(output) == before


@pytest.mark.parametrize("begun", [False, True])
def test_foreign_files_are_named_and_not_touched(folder, output, begun):
    if begun:
        packed(folder, output)
    output.mkdir(exist_ok=True)
    (output / "thesis.tex").write_text("precious")
    before = contents(output)
    with pytest.raises(UserError, match=r"1 files or folders that are not part of this pack: thesis\.tex; give"):
        packed(folder, output)
    assert contents(output) == before


def test_output_that_is_a_file_is_refused(folder, output):
    output.write_text("precious")
    with pytest.raises(UserError, match="is a file; give"):
        packed(folder, output)
    assert output.read_text() == "precious"


def test_a_foreign_state_file_is_refused(folder, output):
    output.mkdir()
    for text in ("{", "[]", '{"shards": 3, "source": {}}', '{"shards": []}'):
        (output / "pack.json").write_text(text)
        with pytest.raises(UserError, match=r"pack\.json was not written by prepare_data\.py"):
            packed(folder, output)
        assert contents(output) == {"pack.json": text.encode()}


def test_other_folders_are_not_packs(folder, output):
    location = locate(output)
    with pytest.raises(UserError, match="no pack at"):
        read_manifest(location)
    packed(folder, output)
    manifest = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="has version 99, and this program reads version 3; pack the data set again"):
        read_manifest(location)
    for text in ("{", "[]", json.dumps({"version": 3})):
        (output / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"is not a manifest of prepare_data\.py"):
            read_manifest(location)


def test_another_index_is_refused(folder, output):
    packed(folder, output)
    location = locate(output)
    manifest = read_manifest(location)
    (output / "index.parquet").write_bytes(b"other")
    with pytest.raises(UserError, match=r"index\.parquet is damaged"):
        read_index(location, manifest)
    (output / "index.parquet").unlink()
    with pytest.raises(UserError, match=r"index\.parquet is missing"):
        read_index(location, manifest)


def test_no_rows_per_shard_is_refused():
    with pytest.raises(UserError, match="rows-per-shard must be at least 1, got 0"):
        PackConfig(rows_per_shard=0)


def test_the_json_may_be_moved(folder, output, tmp_path):
    packed(folder, output)
    json_file(folder).rename(tmp_path / "table.json")
    layout = CocoLayout.find(str(folder), SPLIT, annotations=str(tmp_path / "table.json"))
    assert pack(read_coco(layout), str(output), PackConfig(rows_per_shard=2)).was_complete


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()


def test_from_s3_to_s3(folder, output, bucket):
    for file in (file for file in folder.rglob("*") if file.is_file()):
        (locate(bucket) / "coco" / str(file.relative_to(folder))).write_bytes(file.read_bytes())
    assert packed(f"{bucket}/coco", f"{bucket}/packed").manifest == packed(folder, output).manifest
    remote = locate(f"{bucket}/packed")
    assert {name: (remote / name).read_bytes() for name in remote.names()} == contents(output)
    (remote / "manifest.json").delete()
    assert not packed(f"{bucket}/coco", f"{bucket}/packed").was_complete
    assert packed(f"{bucket}/coco", f"{bucket}/packed").was_complete
