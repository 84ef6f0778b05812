"""Validation of a whole data set on Ray Data, and its report."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data import findings as findings_module
from pipelines.data import validate as validate_module
from pipelines.data.check_report import CheckReport
from pipelines.data.checks import CheckConfig
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.findings import CODES, Finding, Findings
from pipelines.data.validate import validate
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.pipelines.data.coco_folder import SPLIT, edit_json, write_coco_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_coco_folder(tmp_path, num_images=9)
    return tmp_path


def image_file(folder: Path, image_id: int) -> Path:
    return folder / SPLIT / f"{image_id:012d}.jpg"


def copy_image(folder: Path) -> None:
    """Give image 14 size, pixels and annotation of image 12, under names of its own."""

    def change(document: dict[str, Any]) -> None:
        for entries, name in ((document["images"], "id"), (document["annotations"], "image_id")):
            mine, other = ({e[name]: e for e in entries}[image_id] for image_id in (12, 14))
            other.update({**mine, name: 14, "file_name": other["file_name"]})

    edit_json(folder, change)
    for place, kind in ((folder / SPLIT, "jpg"), (folder / "annotations" / f"panoptic_{SPLIT}", "png")):
        (place / f"{14:012d}.{kind}").write_bytes((place / f"{12:012d}.{kind}").read_bytes())


def wrong_area(document: dict[str, Any]) -> None:
    for annotation in document["annotations"]:
        annotation["segments_info"][0]["area"] = 1


def checked(folder: Path | str, other: Path | None = None, **limits: Any) -> CheckReport:
    dataset = read_coco(CocoLayout.find(str(folder), SPLIT))
    return validate(dataset, CheckConfig(**limits), locate(other) if other else None)


@pytest.mark.ray
def test_everything_is_found_in_one_run(
    ray_session: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults of the JSON, of files, of pixels, of several images together and of two splits, in several tasks."""
    monkeypatch.setattr(validate_module, "_IMAGES_PER_TASK", 2)
    copy_image(folder)
    edit_json(folder, wrong_area)
    edit_json(folder, lambda document: document["images"].append({**document["images"][0], "id": 99}))
    image_file(folder, 11).unlink()
    image_file(folder, 18).write_bytes(b"")
    for image_id in (15, 19):
        Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(image_file(folder, image_id))
    other = tmp_path / "other"
    other.mkdir()
    (other / "same.jpg").write_bytes(image_file(folder, 16).read_bytes())
    (other / "as long.jpg").write_bytes(image_file(folder, 16).read_bytes()[:-1] + b"x")
    (other / "empty.jpg").write_bytes(b"")
    report = checked(folder, other)
    findings = report.findings
    assert findings.counts == {
        "image-without-annotation": 1,
        "area": 9,
        "image-missing": 1,
        "image-unreadable": 1,
        "image-size": 2,
        "image-repeated": 2,
        "image-in-other-split": 1,
    }
    assert [finding.image_id for finding in findings.examples["area"]] == list(range(11, 20))
    assert {(f.image_id, f.what) for f in findings.examples["image-repeated"]} == {
        (14, f"the file has the bytes of '{12:012d}.jpg'"),
        (19, f"the file has the bytes of '{15:012d}.jpg'"),
    }
    (shared,) = findings.examples["image-in-other-split"]
    assert (shared.image_id, "'same.jpg'" in shared.message) == (16, True)
    assert report.images_with_errors == [11, 15, 16, 18, 19, 99]
    assert report.has_errors
    assert report.dataset.findings.counts == {"image-without-annotation": 1}  # not changed by the check


@pytest.mark.ray
def test_rare_classes(ray_session: str, folder: Path) -> None:
    def turn_to_crowds(document: dict[str, Any]) -> None:
        for annotation in document["annotations"][:6]:
            for segment in annotation["segments_info"]:
                segment["iscrowd"] |= segment["category_id"] == 3

    edit_json(folder, lambda document: document["categories"].append({"id": 1, "name": "cat", "isthing": 1}))
    edit_json(folder, turn_to_crowds)
    found = checked(folder, min_images_per_class=4).findings
    assert [finding.what for finding in found.examples["class-rare"]] == [
        "the class 'cat', id 1, is in 0 images",
        "the class 'car', id 3, is in 3 images",
    ]
    assert checked(folder).findings == Findings()


@pytest.mark.ray
def test_a_data_set_in_an_object_store(ray_session: str, folder: Path, bucket: str) -> None:
    image_file(folder, 13).unlink()
    for file in (file for file in folder.rglob("*") if file.is_file()):
        (locate(bucket) / str(file.relative_to(folder))).write_bytes(file.read_bytes())
    findings = checked(bucket).findings
    assert findings.counts == {"image-missing": 1}
    assert findings.examples["image-missing"][0].file == f"{bucket}/{SPLIT}/{13:012d}.jpg"


@pytest.mark.ray
def test_another_split_without_images_is_refused(ray_session: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"no images in .*nowhere; check --other-split"):
        checked(folder, folder / "nowhere")


def report_of(folder: Path, *findings: Finding) -> CheckReport:
    collected = Findings()
    collected.extend(findings)
    return CheckReport(dataset=read_coco(CocoLayout.find(str(folder), SPLIT)), findings=collected)


def some(code: str, image_id: int | None = 12) -> Finding:
    return Finding(code=code, file="a.png", image_id=image_id, segment_id=5, what="it is wrong")


def test_memory_is_bounded_by_the_number_of_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_module, "MAX_EXAMPLES", 10)
    report = report_of(folder, *(some("area", image_id) for image_id in range(10_000)))
    assert report.findings.counts["area"] == 10_000
    assert [finding.image_id for finding in report.findings.examples["area"]] == list(range(10))
    assert report.summary().splitlines()[-1] == "  ... and 9997 more"
    assert len(json.loads(report.to_json())["codes"]["area"]["examples"]) == 10


def test_the_report_lists_errors_first(folder: Path) -> None:
    report = report_of(folder, some("image-gray"), some("area"), some("image-missing", 15), some("area"))
    lines = report.summary().splitlines()
    assert lines[0] == "9 images checked: 1 errors, 2 warnings, 1 notes; 1 images have an error"
    assert [line.split(", ")[0] for line in lines if not line.startswith(" ")][1:] == [
        "error: image-missing",
        "warning: area",
        "note: image-gray",
    ]
    content = json.loads(report.to_json())
    assert {key: content[key] for key in ("version", "split", "images_checked", "errors", "warnings", "notes")} == {
        "version": 1,
        "split": SPLIT,
        "images_checked": 9,
        "errors": 1,
        "warnings": 2,
        "notes": 1,
    }
    assert content["images_with_errors"] == [15]
    missing = content["codes"]["image-missing"]
    assert (missing["severity"], missing["count"]) == ("error", 1)
    assert missing["examples"] == [
        {
            "file": "a.png",
            "image_id": 15,
            "segment_id": 5,
            "message": f"it is wrong; {CODES['image-missing'].remedy}.",
        }
    ]


@pytest.mark.parametrize(
    ("findings", "with_bad", "without_bad"),
    [
        ([some("area")], None, None),
        ([some("png-size")], "leave out the 1 images with errors with --skip-bad", None),
        ([some("image-entry", None)], "leave out the 0 images", None),
        ([some("category-isthing", None)], r"Correct the categories first \(category-isthing\)", "Correct the cat"),
        ([some("png-size", image_id) for image_id in range(11, 20)], "leave out the 9", "All images have errors"),
    ],
)
def test_what_is_refused(folder: Path, findings: list[Finding], with_bad: str | None, without_bad: str | None) -> None:
    report = report_of(folder, *findings)
    for skip_bad, expected in ((False, with_bad), (True, without_bad)):
        refusal = report.refusal(skip_bad)
        if expected is None:
            assert refusal is None
        else:
            assert re.search(expected, refusal or "")


def test_every_code_is_documented() -> None:
    """The table of codes in docs/data.md has each code with its severity, meaning and remedy."""
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    documented = {row[0].strip("|` "): tuple(cell.strip(" |") for cell in row[1:]) for row in rows if len(row) == 4}
    assert documented == {code: (known.severity, known.meaning, known.remedy) for code, known in CODES.items()}


def test_other_images_whose_names_are_not_utf_8_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in ((b"a.jpg", b"1"), (b"\xff.jpg", b"22"), (b"sub/b.jpg", b"333")):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(content)
    (tmp_path / "c.jpg").symlink_to("a.jpg")
    (tmp_path / "d.jpg").symlink_to("nothing")
    assert validate_module._sizes(locate(tmp_path)) == {"a.jpg": 1, "c.jpg": 1}
    with pytest.raises(UserError, match=r"There are no images in .*--other-split"):
        validate_module._sizes(locate(tmp_path / "absent"))
