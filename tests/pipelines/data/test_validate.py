from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.validate import Fault, validate
from tests.pipelines.data.coco_folder import SPLIT, edit_json, ids_to_rgb, write_coco_folder

IMAGE_ID = 12
STUFF_SEGMENT, THING_SEGMENT, CROWD_SEGMENT = 0, 3, 5


@pytest.fixture
def folder(tmp_path) -> Path:
    write_coco_folder(tmp_path)
    return tmp_path


def faults_of(folder: Path) -> list[Fault]:
    return validate(read_coco(CocoLayout.find(str(folder), SPLIT)), threads=3)


def image_file(folder: Path) -> Path:
    return folder / SPLIT / f"{IMAGE_ID:012d}.jpg"


def png_file(folder: Path) -> Path:
    return folder / "annotations" / f"panoptic_{SPLIT}" / f"{IMAGE_ID:012d}.png"


def edit_segment(folder: Path, index: int, **values) -> int:
    """Change a segment of the image in the JSON; return the id it had."""
    before = []

    def change(document):
        annotation = next(entry for entry in document["annotations"] if entry["image_id"] == IMAGE_ID)
        before.append(annotation["segments_info"][index]["id"])
        annotation["segments_info"][index].update(values)

    edit_json(folder, change)
    return before[0]


def the_fault(folder: Path, file: Path) -> Fault:
    (fault,) = faults_of(folder)
    assert (fault.image_id, fault.file) == (IMAGE_ID, str(file))
    assert fault.message.endswith(".")
    assert "\n" not in str(fault)
    return fault


def test_a_clean_data_set_has_no_fault(folder):
    assert faults_of(folder) == []


@pytest.mark.parametrize("content", [b"", b"hello", "half"])
def test_unreadable_image(folder, content):
    file = image_file(folder)
    complete = file.read_bytes()
    file.write_bytes(complete[: len(complete) // 2] if content == "half" else content)
    fault = the_fault(folder, file)
    assert (fault.code, fault.severity, fault.segment_id) == ("image-unreadable", "error", None)


def test_image_of_another_size(folder):
    image = Image.open(image_file(folder))
    image.resize((image.width + 1, image.height)).save(image_file(folder))
    fault = the_fault(folder, image_file(folder))
    assert (fault.code, fault.severity) == ("image-size", "error")
    assert f"is {image.width + 1} x {image.height}, but {image.width} x {image.height} in the JSON" in fault.message


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_unreadable_png(folder, mode):
    Image.open(png_file(folder)).convert(mode).save(png_file(folder))
    fault = the_fault(folder, png_file(folder))
    assert (fault.code, fault.severity) == ("png-unreadable", "error")
    assert f"of mode {mode}" in fault.message


def test_png_of_another_size(folder):
    png = Image.open(png_file(folder))
    png.crop((0, 0, png.width, png.height - 1)).save(png_file(folder))
    fault = the_fault(folder, png_file(folder))
    assert (fault.code, fault.severity) == ("png-size", "error")


def test_segment_in_the_png_but_not_in_the_json(folder):
    pixels = np.array(Image.open(png_file(folder)))
    pixels[0, 4:6] = ids_to_rgb(np.array([[123456]]))[0, 0]
    Image.fromarray(pixels).save(png_file(folder))
    fault = the_fault(folder, png_file(folder))
    assert (fault.code, fault.severity, fault.segment_id) == ("segment-unlisted", "error", 123456)
    assert "2 pixels" in fault.message


def test_segment_in_the_json_but_not_in_the_png(folder):
    identifier = edit_segment(folder, THING_SEGMENT, id=654321)
    faults = {fault.segment_id: fault.code for fault in faults_of(folder)}
    assert faults == {identifier: "segment-unlisted", 654321: "segment-without-pixels"}


@pytest.mark.parametrize("identifier", [0, -5, 2**24])
def test_segment_id_out_of_range(folder, identifier):
    edit_segment(folder, THING_SEGMENT, id=identifier)
    faults = [(fault.code, fault.severity) for fault in faults_of(folder) if fault.segment_id == identifier]
    assert ("segment-id-range", "error") in faults


def test_segment_id_repeated(folder):
    first = edit_segment(folder, STUFF_SEGMENT)
    edit_segment(folder, THING_SEGMENT, id=first)
    faults = [fault.code for fault in faults_of(folder) if fault.segment_id == first and fault.severity == "error"]
    assert faults == ["segment-id-repeated"]


def test_more_segments_than_an_index_map_can_number(folder, monkeypatch):
    """Of the image's segments, two are things, three are stuff of two classes, and a crowd is not numbered."""
    monkeypatch.setattr("pipelines.data.validate.MAX_SEGMENTS", 4)
    assert faults_of(folder) == []
    edit_segment(folder, CROWD_SEGMENT, iscrowd=0)
    fault = the_fault(folder, png_file(folder))
    assert (fault.code, fault.severity, fault.segment_id) == ("segments-too-many", "error", None)
    assert "has 5 segments to train on, but an index map can number 4;" in fault.message


def test_stuff_marked_as_crowd_is_a_warning(folder):
    identifier = edit_segment(folder, STUFF_SEGMENT, iscrowd=1)
    fault = the_fault(folder, png_file(folder))
    assert (fault.code, fault.severity, fault.segment_id) == ("crowd-stuff", "warning", identifier)


def test_wrong_area_and_box_are_warnings(folder):
    identifier = edit_segment(folder, CROWD_SEGMENT, area=2)
    fault = the_fault(folder, png_file(folder))
    assert (fault.code, fault.severity, fault.segment_id) == ("area", "warning", identifier)
    edit_segment(folder, CROWD_SEGMENT, area=1, bbox=[3, 0, 1, 2])
    fault = the_fault(folder, png_file(folder))
    assert (fault.code, fault.severity, fault.segment_id) == ("bbox", "warning", identifier)
    edit_segment(folder, CROWD_SEGMENT, bbox=[3.0, 0.0, 1.0, 1.0])
    assert faults_of(folder) == []


def test_faults_are_in_the_order_of_the_images(folder):
    for image_id in (15, 11, 13):
        (folder / SPLIT / f"{image_id:012d}.jpg").write_bytes(b"")
    assert [fault.image_id for fault in faults_of(folder)] == [11, 13, 15]
