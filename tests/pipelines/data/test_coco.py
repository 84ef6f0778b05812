import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.data import coco
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.coco_entries import category_entry
from pipelines.data.findings import Findings
from pipelines.data.schema import RECORD, require
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.pipelines.data.coco_folder import CATEGORIES, SPLIT, edit_json, json_file, write_coco_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    write_coco_folder(tmp_path / "coco")
    return tmp_path / "coco"


def read(folder):
    return read_coco(CocoLayout.find(str(folder), SPLIT))


def test_records_equal_the_json(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "_ROWS_PER_BATCH", 2)
    document = write_coco_folder(tmp_path)
    dataset = read(tmp_path)
    images = {image["id"]: image for image in document["images"]}
    annotations = {annotation["image_id"]: annotation for annotation in document["annotations"]}
    require(dataset.records, RECORD, "records")
    records = dataset.records.to_pylist()
    assert [record["image_id"] for record in records] == sorted(images)
    for record in records:
        image, annotation = images[record["image_id"]], annotations[record["image_id"]]
        keys = ("image_file", "height", "width", "panoptic_file")
        expected = (image["file_name"], image["height"], image["width"], annotation["file_name"])
        assert tuple(record[key] for key in keys) == expected
        assert record["segments"] == annotation["segments_info"]
    assert {category.id for category in dataset.taxonomy.categories} == {entry["id"] for entry in CATEGORIES}
    assert dataset.annotations_sha256 == hashlib.sha256(json_file(tmp_path).read_bytes()).hexdigest()
    assert dataset.findings == Findings()
    assert dataset.without([12, 99]).records["image_id"].to_pylist() == [11, 13, 14, 15]


def test_area_and_box_may_be_absent(folder):
    def strip(document):
        for segment in document["annotations"][0]["segments_info"]:
            del segment["area"], segment["bbox"]

    edit_json(folder, strip)
    first = [record["segments"][0] for record in read(folder).records.to_pylist()]
    assert [(segment["area"] is None, segment["bbox"] is None) for segment in first].count((True, True)) == 1
    assert read(folder).findings == Findings()


def test_pngs_may_be_beside_the_annotations(folder):
    (folder / "annotations" / f"panoptic_{SPLIT}").rename(folder / f"panoptic_{SPLIT}")
    assert len(read(folder).records) == 5


def test_each_part_may_be_given(folder, tmp_path, monkeypatch):
    (folder / SPLIT).rename(tmp_path / "photos")
    (folder / "annotations" / f"panoptic_{SPLIT}").rename(tmp_path / "pngs")
    json_file(folder).rename(tmp_path / "table.json")
    monkeypatch.chdir(tmp_path)
    layout = CocoLayout.find(str(folder), "mine", images="photos", annotations="table.json", panoptic="pngs")
    assert len(read_coco(layout).records) == 5


def test_missing_parts_are_named(folder):
    with pytest.raises(UserError, match=r"no folder .*nowhere; give"):
        CocoLayout.find(str(folder / "nowhere"), SPLIT)
    with pytest.raises(UserError, match=r"no annotation file .*panoptic_train2017\.json; check --split"):
        CocoLayout.find(str(folder), "train2017")
    (folder / SPLIT).rename(folder / "other")
    with pytest.raises(UserError, match=rf"no folder of images at .*{SPLIT}; .*--images"):
        CocoLayout.find(str(folder), SPLIT)
    with pytest.raises(UserError, match=r"no folder of images at .*gone; .*--images"):
        CocoLayout.find(str(folder), SPLIT, images=str(folder / "gone"))


def test_zipped_pngs_come_with_the_command(folder):
    pngs = folder / "annotations" / f"panoptic_{SPLIT}"
    pngs.rename(folder / "elsewhere")
    pngs.with_suffix(".zip").touch()
    with pytest.raises(UserError) as error:
        CocoLayout.find(str(folder), SPLIT)
    assert f"`unzip -q {pngs}.zip -d {folder}/annotations`" in str(error.value)


UNUSABLE = {
    "is not a COCO panoptic JSON: it has no list categories": lambda document: document.pop("categories"),
    r"it has no list images, got \['annotations', 'categories', 'images'\]": lambda d: d.update(images={}),
    "holds no images; give": lambda document: document.update(images=[], annotations=[]),
    "has no usable category, got .*; give id, name and isthing": lambda document: document.update(categories=[]),
    r"No image of .*json can be used\. First: .*image-without-annotation": lambda document: document.update(
        annotations=[]
    ),
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_a_json_without_anything_to_check_is_refused(message, folder):
    edit_json(folder, UNUSABLE[message])
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_instances_json_is_recognized(folder):
    def become_instances(document):
        document["annotations"] = [{"id": 1, "image_id": 11, "category_id": 1, "segmentation": []}]

    edit_json(folder, become_instances)
    with pytest.raises(UserError, match=r"instances \(detection\) annotations, without segments_info; give"):
        read(folder)
    edit_json(folder, lambda document: document.update(annotations=[{"id": 1, "image_id": 11, "caption": "A cat."}]))
    with pytest.raises(UserError, match="captions annotations"):
        read(folder)


def test_broken_json_is_named_with_its_line(folder):
    text = json.dumps(json.loads(json_file(folder).read_text()), indent=1)
    json_file(folder).write_text("\n".join(text.split("\n")[:30]))
    with pytest.raises(UserError, match=r"not valid JSON: .* at line 30, column"):
        read(folder)
    json_file(folder).write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match="not a JSON text"):
        read(folder)
    json_file(folder).write_text("[1]")
    with pytest.raises(UserError, match="got a list; give"):
        read(folder)


def test_folders_without_any_of_the_files_are_refused(folder):
    for name in os.listdir(folder / SPLIT)[1:]:
        (folder / SPLIT / name).unlink()
    assert len(read(folder).records) == 5  # the missing files are found when they are opened
    (folder / SPLIT).rename(folder / "photos")
    (folder / SPLIT).mkdir()
    with pytest.raises(UserError, match=r"does not exist, nor do 4 others of the 5 images .*--images"):
        read(folder)


def test_every_fault_of_the_json_is_found_at_once(folder):
    """Two repeated images, three foreign annotations and a category without isthing."""

    def edit(document):
        document["images"] += document["images"][:2]
        document["annotations"] += [{**document["annotations"][0], "image_id": 100 + n} for n in range(3)]
        del document["categories"][0]["isthing"]

    edit_json(folder, edit)
    findings = read(folder).findings
    assert findings.counts == {"image-id-repeated": 2, "annotation-without-image": 3, "category-isthing": 1}
    assert {100, 101, 102} < findings.images
    assert len(findings.images) == 5
    assert findings.of_whole_set == ["category-isthing"]


def test_changes_of_classes_are_never_left_out(folder):
    """Either the classes are changed, or the file is refused, or the categories have a finding."""
    file = folder / "classes.yaml"

    def read_changed():
        return read_coco(CocoLayout.find(str(folder), SPLIT), locate(file))

    file.write_text("things: {big train: train}")
    assert "big train" in read_changed().classes.taxonomy.names
    file.write_text("things: {big\u00a0train: train}")
    with pytest.raises(UserError, match="a name is 1 to 200 printable characters"):
        read_changed()
    file.write_text("things: {big train: train}")
    edit_json(folder, lambda document: document["categories"][0].update(name="a\u00a0rug"))
    assert read_changed().findings.of_whole_set == ["category-entry"]


def test_names_that_no_category_can_have_are_replaced_by_unique_ones(folder):
    names = ["category 303", "x" * 200, "category 304", "category 304 (2)", "a\tb", "x" * 200, "x" * 201, "a (302)"]

    def edit(document):
        entries = [{"id": 300 + n, "name": name, "isthing": 1} for n, name in enumerate(names)]
        document["categories"] += entries

    edit_json(folder, edit)
    found = read(folder)
    assert found.findings.counts == {"category-entry": 2, "category-name-repeated": 1}
    name_of = {category.id: category.name for category in found.taxonomy.categories}
    assert [name_of[300 + n] for n in range(len(names))] == [
        *names[:4], "category 304 (3)", "category 305", "category 306", names[7],
    ]  # fmt: skip


# VmHWM is the most memory of a process. Its ru_maxrss would be at least that of the tests, which started it.
SIZE = """
import json, re, sys
from pipelines.data.coco import CocoLayout, read_coco
layout = CocoLayout.find(sys.argv[1], "val2017")
if len(sys.argv) > 2:
    records = read_coco(layout).records
    assert len(records) == int(sys.argv[2])
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def test_memory_of_a_large_json(folder, monkeypatch):
    """20,000 images with 11 segments each: 28 MB of JSON. Measured: 104 MB; 196 with all of it as Python objects."""
    document = json.loads(json_file(folder).read_text())
    image, annotation = document["images"][0], document["annotations"][0]
    annotation["segments_info"] = (annotation["segments_info"] * 2)[:11]
    count = 20_000
    document["images"] = [{**image, "id": number} for number in range(count)]
    document["annotations"] = [{**annotation, "image_id": number} for number in range(count)]
    json_file(folder).write_text(json.dumps(document))

    def peak(*arguments: str) -> int:
        command = [sys.executable, "-c", SIZE, str(folder), *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)

    assert peak(str(count)) - peak() < 140


def test_little_is_kept_of_a_category() -> None:
    entry = {"id": 1, "name": "cat", "isthing": 1, "supercategory": "animal", "color": [1, 2, 3]}
    assert category_entry({**entry, "more": [1]}) == entry
    huge = {key: [[["x" * 300] * 30] * 30] * 30 for key in entry}
    assert category_entry(huge) == {key: [[]] * 4 for key in entry}
    assert category_entry([huge] * 9) == [{}] * 4
