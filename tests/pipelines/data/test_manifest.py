"""The images of an opened pack: all of them, those with things, an even subset."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.manifest import INDEX_FILE, MANIFEST_FILE, PackedSet, open_pack
from pipelines.data.pack import PackConfig, pack
from pipelines.errors import UserError
from pipelines.storage import sha256
from tests.pipelines.data.coco_folder import OTHER_THING, SPLIT, STUFF, THING, edit_json, write_coco_folder


def opened(folder: Path) -> PackedSet:
    pack(
        read_coco(CocoLayout.find(str(folder / "coco"), SPLIT)),
        str(folder / "packed"),
        PackConfig(rows_per_shard=2),
        in_process=True,
    )
    return open_pack(str(folder / "packed"))


def without_things(*image_ids: int) -> Any:
    """Return an edit of the JSON: in half of the images things become crowds, in the others stuff."""

    def edit(document: dict[str, Any]) -> None:
        segments = {entry["image_id"]: entry["segments_info"] for entry in document["annotations"]}
        for number, image_id in enumerate(image_ids):
            for segment in segments[image_id]:
                if number % 2:
                    segment.update(category_id=STUFF, iscrowd=0)
                else:
                    segment["iscrowd"] = int(segment["category_id"] in (THING, OTHER_THING))

    return edit


def test_images_without_things_are_removed(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "coco")
    edit_json(tmp_path / "coco", without_things(12, 14))
    samples = opened(tmp_path)
    kept = samples.with_things()
    assert (samples.image_ids.tolist(), samples.num_left_out) == ([11, 12, 13, 14, 15], 0)
    assert samples.num_things.tolist() == [2, 0, 2, 0, 2]
    assert (kept.image_ids.tolist(), kept.num_left_out, len(kept)) == ([11, 13, 15], 2, 3)
    assert kept.num_things.tolist() == [2, 2, 2]
    # Shard and row still belong to the image.
    for image_id, shard, row in zip(kept.image_ids, kept.shard, kept.row, strict=True):
        assert pq.read_table(kept.shards[shard])["image_id"][int(row)].as_py() == image_id
    assert (kept.data_hash, kept.uri, kept.taxonomy) == (samples.data_hash, samples.uri, samples.taxonomy)


def test_a_set_with_only_things_stays_complete(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "coco")
    kept = opened(tmp_path).with_things()
    assert (kept.image_ids.tolist(), kept.num_left_out) == ([11, 12, 13, 14, 15], 0)


def test_a_set_without_things_is_refused(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "coco")
    edit_json(tmp_path / "coco", without_things(11, 12, 13, 14, 15))
    samples = opened(tmp_path)
    with pytest.raises(UserError, match=rf"{samples.uri} can be used: none of its 5 .*--data\.no-require-thing"):
        samples.with_things()


def test_a_pack_with_a_negative_image_id_is_refused(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "coco")
    opened(tmp_path)
    folder = tmp_path / "packed"
    index = pq.read_table(folder / INDEX_FILE)
    ids = pa.array([-7, *index["image_id"].to_pylist()[1:]])
    pq.write_table(index.set_column(0, index.schema.field(0), ids), folder / INDEX_FILE)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["index"]["sha256"] = sha256((folder / INDEX_FILE).read_bytes())
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"{folder / INDEX_FILE} has the image id -7, but ids must not be negative\."):
        open_pack(str(folder))


def test_a_subset_is_evenly_spaced(packs: dict[str, str]) -> None:
    samples = open_pack(packs["train"])
    assert samples.subset(3).image_ids.tolist() == samples.image_ids[[0, 40, 79]].tolist()
    assert samples.subset(1000).image_ids.tolist() == samples.image_ids.tolist()


def test_images_are_taken_in_the_given_order(packs: dict[str, str]) -> None:
    samples = open_pack(packs["val"])
    taken = samples.take(np.array([7, 2]))
    for name in ("image_ids", "shard", "row", "num_things"):
        assert getattr(taken, name).tolist() == getattr(samples, name)[[7, 2]].tolist()
