"""Packing on Ray Data, the division into shards, and changed classes, against slow definitions."""

import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskformer.taxonomy import Taxonomy
from pipelines.data.classes import ClassMap
from pipelines.data.coco import CocoLayout, Segment, read_coco
from pipelines.data.manifest import open_pack
from pipelines.data.pack import PackConfig, cut, pack
from pipelines.data.pixels import decode_panoptic, decompress_index_map
from pipelines.data.shards import _relabeled
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.pipelines.data.coco_folder import SPLIT, write_coco_folder


def packed(folder: Path, output: Path, classes: str | None = None, rows: int = 2, in_process: bool = True) -> Path:
    file = None
    if classes is not None:
        (folder / "classes.yaml").write_text(classes)
        file = locate(str(folder / "classes.yaml"))
    dataset = read_coco(CocoLayout.find(str(folder), SPLIT), file)
    pack(dataset, str(output), PackConfig(rows_per_shard=rows), in_process=in_process)
    return output


def contents(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.iterdir()}


def rows_of(output: Path) -> list[dict]:
    return [row for shard in sorted(output.glob("shard-*")) for row in pq.read_table(shard).to_pylist()]


def test_shards_are_cut_by_size() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 3_000_000, rng.integers(1, 60))
        config = PackConfig(shard_megabytes=int(rng.integers(1, 9)), rows_per_shard=int(rng.integers(1, 20)))
        bounds = cut(sizes, config)
        assert [row for start, end in bounds for row in range(start, end)] == list(range(len(sizes)))
        limit = config.shard_megabytes * 1_000_000
        for start, end in bounds:
            total = sizes[start:end].sum()
            assert end - start <= config.rows_per_shard
            assert end - start == 1 or total <= limit
            full = end == len(sizes) or end - start == config.rows_per_shard or total + sizes[end] > limit
            assert full, "a shard ends early"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_writes_the_same_pack(tmp_path: Path) -> None:
    """Also where some shards are there already, or damaged."""
    write_coco_folder(tmp_path / "coco", 9)
    expected = contents(packed(tmp_path / "coco", tmp_path / "alone"))
    assert contents(packed(tmp_path / "coco", tmp_path / "ray", in_process=False)) == expected
    (tmp_path / "ray" / "manifest.json").unlink()
    (tmp_path / "ray" / "shard-00001.parquet").unlink()
    (tmp_path / "ray" / "shard-00002.parquet").write_bytes(b"damaged")
    kept = (tmp_path / "ray" / "shard-00000.parquet").stat().st_mtime_ns
    assert contents(packed(tmp_path / "coco", tmp_path / "ray", in_process=False)) == expected
    assert (tmp_path / "ray" / "shard-00000.parquet").stat().st_mtime_ns == kept


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_file_that_changed_after_the_check_is_named(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "coco", 5)
    dataset = read_coco(CocoLayout.find(str(tmp_path / "coco"), SPLIT))
    name = dataset.records["panoptic_file"][3].as_py()
    file = tmp_path / "coco" / "annotations" / f"panoptic_{SPLIT}" / name
    good = file.read_bytes()
    file.write_bytes(b"\0" * len(good))
    with pytest.raises(UserError, match=rf"^A file of image 14, .*{name}.* changed since it was checked: "):
        pack(dataset, str(tmp_path / "pack"), PackConfig(rows_per_shard=2))
    assert not (tmp_path / "pack" / "manifest.json").exists()
    file.write_bytes(good)
    packed(tmp_path / "coco", tmp_path / "pack", in_process=False)
    assert contents(tmp_path / "pack") == contents(packed(tmp_path / "coco", tmp_path / "alone"))


@pytest.mark.parametrize(
    ("classes", "of_name"),
    [
        ("things: {vehicle: [train, car]}", {"train": "vehicle", "car": "vehicle"}),
        ("stuff: {ground: [rug, banner]}", {"rug": "ground", "banner": "ground"}),
        ("drop: [rug, car]", {"rug": None, "car": None}),
        ("stuff: {all: [train, rug, banner]}", {"train": "all", "rug": "all", "banner": "all"}),
        ("things: {cloth: rug}", {"rug": "cloth"}),
    ],
)
def test_changed_classes_are_packed_as_if_annotated(
    tmp_path: Path, classes: str, of_name: dict[str, str | None]
) -> None:
    document = write_coco_folder(tmp_path / "coco", 4)
    samples = open_pack(str(packed(tmp_path / "coco", tmp_path / "pack", classes)))
    taxonomy = samples.taxonomy
    source = {category["id"]: category["name"] for category in document["categories"]}
    annotations = {annotation["image_id"]: annotation for annotation in document["annotations"]}
    for row in rows_of(tmp_path / "pack"):
        annotation = annotations[row["image_id"]]
        folder = tmp_path / "coco" / "annotations" / f"panoptic_{SPLIT}"
        ids = decode_panoptic((folder / annotation["file_name"]).read_bytes())
        found = decode_panoptic(row["panoptic"])
        segments = {segment["id"]: segment for segment in row["segments"]}
        assert set(np.unique(found).tolist()) - {0} == segments.keys()
        plane = decompress_index_map(row["index_map"], ids.shape, len(row["classes"]))
        # The class of every pixel; void and crowds have none.
        expected = np.full(ids.shape, -1)
        for segment in annotation["segments_info"]:
            name = source[segment["category_id"]]
            name = of_name.get(name, name)
            if name is None:
                continue
            index = taxonomy.names.index(name)
            if not (segment["iscrowd"] and taxonomy.is_thing(index)):
                expected[ids == segment["id"]] = index
            assert taxonomy.class_index(segments[int(found[ids == segment["id"]][0])]["category_id"]) == index
        trained = np.array([-1, *row["classes"]])[plane]
        np.testing.assert_array_equal(trained, expected)
        # COCO's format has one segment for each class of stuff.
        stuff = [
            s["category_id"] for s in row["segments"] if not taxonomy.is_thing(taxonomy.class_index(s["category_id"]))
        ]
        assert len(stuff) == len(set(stuff))


def test_a_new_name_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "coco", 3)
    before = rows_of(packed(tmp_path / "coco", tmp_path / "pack"))
    after = rows_of(packed(tmp_path / "coco", tmp_path / "renamed", "things: {lorry: car}"))
    assert [row["panoptic"] for row in after] == [row["panoptic"] for row in before]
    assert "lorry" in open_pack(str(tmp_path / "renamed")).taxonomy.names
    sources = [json.loads((tmp_path / name / "pack.json").read_text())["source"] for name in ("pack", "renamed")]
    assert "classes" not in sources[0]
    assert "classes" in sources[1]


def test_images_of_the_pack_are_those_of_the_folder(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "coco", 3)
    for row in rows_of(packed(tmp_path / "coco", tmp_path / "pack", "drop: [car]")):
        file = tmp_path / "coco" / SPLIT / row["file_name"]
        assert row["image"] == file.read_bytes()
        assert Image.open(io.BytesIO(row["panoptic"])).size == Image.open(file).size


def test_changed_classes_of_a_large_map_take_little_memory() -> None:
    taxonomy = Taxonomy.from_coco([{"id": 1, "name": "cat", "isthing": 1}])
    ids = np.repeat(np.arange(8, dtype=np.int32), 2**18).reshape(2**10, 2**11)
    segments = [Segment(id=number, category_id=1 + number % 2, iscrowd=False) for number in range(1, 8)]
    tracemalloc.start()
    changed, kept = _relabeled(ids, segments, ClassMap(taxonomy, {1: 1, 2: None}, True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(changed, np.where(ids % 2, 0, ids))
    assert [segment["id"] for segment in kept] == [2, 4, 6]
    assert peak < 2 * ids.nbytes
