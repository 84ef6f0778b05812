import json
import os
from pathlib import Path

import pytest

from pipelines.data.coco import CocoLayout, read_coco
from pipelines.errors import UserError
from tests.pipelines.data.coco_folder import CATEGORIES, SPLIT, THING, edit_json, json_file, write_coco_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    write_coco_folder(tmp_path / "coco")
    return tmp_path / "coco"


def read(folder):
    return read_coco(CocoLayout.find(str(folder), SPLIT))


def test_records_equal_the_json(tmp_path):
    document = write_coco_folder(tmp_path)
    dataset = read(tmp_path)
    images = {image["id"]: image for image in document["images"]}
    annotations = {annotation["image_id"]: annotation for annotation in document["annotations"]}
    assert [record.image_id for record in dataset.records] == sorted(images)
    for record in dataset.records:
        image, annotation = images[record.image_id], annotations[record.image_id]
        assert (record.image_file, record.height, record.width) == (image["file_name"], image["height"], image["width"])
        assert record.panoptic_file == annotation["file_name"]
        assert list(record.segments) == annotation["segments_info"]
    assert {category.id for category in dataset.taxonomy.categories} == {entry["id"] for entry in CATEGORIES}


def test_area_and_box_may_be_absent(folder):
    def strip(document):
        for segment in document["annotations"][0]["segments_info"]:
            del segment["area"], segment["bbox"]

    edit_json(folder, strip)
    assert any(set(record.segments[0]) == {"id", "category_id", "iscrowd"} for record in read(folder).records)


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


def first_annotation(document):
    return document["annotations"][0]


FAULTY = {
    "is not a COCO panoptic JSON: it has no list categories": lambda document: document.pop("categories"),
    "it has no list images": lambda document: document.update(images={}),
    "holds no images; give": lambda document: document.update(images=[], annotations=[]),
    "unusable categories.*isthing": lambda document: document["categories"][0].pop("isthing"),
    "unusable categories.*more than once": lambda document: document["categories"][0].update(id=THING),
    "The images of .* has no id of type int": lambda document: document["images"][2].pop("id"),
    "entry of image .* has no width of type int": lambda document: document["images"][2].update(width="640"),
    "annotation of image .* has no segments_info of type list": lambda document: document["annotations"][2].pop(
        "segments_info"
    ),
    "segments_info in the annotation of image .* has no category_id of type int": lambda document: first_annotation(
        document
    )["segments_info"][1].pop("category_id"),
    r"image id \d+ occurs more than once in the images .*\(2 such": lambda document: document["images"].extend(
        document["images"][:2]
    ),
    r"image id \d+ occurs more than once in the annotations .*\(1 such": lambda document: document[
        "annotations"
    ].append(first_annotation(document)),
    r"The image id -3 in the images of .*val2017\.json does not lie in 0\.\.9223372036854775807 \(1 such.*; renumber": (
        lambda document: document["images"][1].update(id=-3)
    ),
    r"The image id 9223372036854775808 in the images of .*\(2 such": lambda document: [
        image.update(id=2**63 + number) for number, image in enumerate(document["images"][:2])
    ],
    r"The image id -1 in the annotations of": lambda document: first_annotation(document).update(image_id=-1),
    r"The annotation 0\d+\.png of image \d+ has no entry .*\(2 such": lambda document: document.update(
        images=document["images"][2:]
    ),
    r"The image 0\d+\.jpg, id \d+, has no annotation .*\(2 such": lambda document: document.update(
        annotations=document["annotations"][2:]
    ),
    r"Segment \d+ of 0\d+\.png, image \d+, has category 999, .*\(1 such": lambda document: first_annotation(document)[
        "segments_info"
    ][1].update(category_id=999),
    r"val2017/gone\.jpg, for image \d+, does not exist \(1 of 5 images": lambda document: document["images"][1].update(
        file_name="gone.jpg"
    ),
    r"panoptic_val2017/gone\.png, for image \d+, does not exist \(1 of 5 PNGs": lambda document: first_annotation(
        document
    ).update(file_name="gone.png"),
}


@pytest.mark.parametrize("message", FAULTY)
def test_faulty_json_is_explained(message, folder):
    edit_json(folder, FAULTY[message])
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_instances_json_is_recognized(folder):
    def become_instances(document):
        document["annotations"] = [{"id": 1, "image_id": 11, "category_id": 1, "segmentation": []}]

    edit_json(folder, become_instances)
    with pytest.raises(UserError, match=r"instances \(detection\) annotations, without segments_info; give"):
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


def test_missing_files_are_counted(folder):
    for name in sorted(os.listdir(folder / SPLIT))[:3]:
        (folder / SPLIT / name).unlink()
    with pytest.raises(UserError, match=r"\(3 of 5 images are missing in total\); add the files.*--images"):
        read(folder)
