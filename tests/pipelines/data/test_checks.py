"""The checks of one image and of the JSON: each kind of damage is planted, and found with exactly its own code."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data import checks
from pipelines.data.checks import CheckConfig, check_record
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.findings import CODES, Findings
from pipelines.data.synthetic import SyntheticConfig, draw_dataset
from pipelines.errors import UserError
from tests.pipelines.data.coco_folder import (
    OTHER_STUFF,
    SPLIT,
    STUFF,
    THING,
    edit_json,
    ids_to_rgb,
    json_file,
    measured,
    write_coco_folder,
)

IMAGE_ID = 12
FIRST_STUFF, SECOND_STUFF, FIRST_THING, CROWD = 0, 1, 3, 5  # segments of each image, see `write_coco_folder`


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_coco_folder(tmp_path)
    return tmp_path


def found_in(folder: Path, split: str = SPLIT, **limits: Any) -> Findings:
    """Return what `validate` finds in single images, without Ray."""
    dataset = read_coco(CocoLayout.find(str(folder), split))
    layout, config = dataset.layout, CheckConfig(**limits)
    findings = dataset.findings
    for record in dataset.records.to_pylist():
        findings.extend(
            check_record(record, layout.images, layout.panoptic, dataset.taxonomy, config, layout.roots).findings
        )
    return findings


def image_file(folder: Path, image_id: int = IMAGE_ID) -> Path:
    return folder / SPLIT / f"{image_id:012d}.jpg"


def png_file(folder: Path, image_id: int = IMAGE_ID) -> Path:
    return folder / "annotations" / f"panoptic_{SPLIT}" / f"{image_id:012d}.png"


def edit(part: str, change: Callable[[dict[str, Any]], object], key: str = "image_id") -> Callable[[Path], None]:
    """Return a damage that changes the image's entry in a list of the JSON."""

    def damage(folder: Path) -> None:
        edit_json(folder, lambda document: change(next(e for e in document[part] if e[key] == IMAGE_ID)))

    return damage


def in_image(**values: Any) -> Callable[[Path], None]:
    return edit("images", lambda entry: entry.update(values), "id")


def in_annotation(**values: Any) -> Callable[[Path], None]:
    return edit("annotations", lambda entry: entry.update(values))


def in_segment(index: int, **values: Any) -> Callable[[Path], None]:
    return edit("annotations", lambda entry: entry["segments_info"][index].update(values))


def in_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, change)


def write(file: Callable[[Path], Path], change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: void(file(folder).write_bytes(change(file(folder).read_bytes())))


def void(_: object) -> None:
    return None


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def converted(mode: str, kind: str = "JPEG", **options: Any) -> Callable[[bytes], bytes]:
    return lambda content: encode(Image.open(io.BytesIO(content)).convert(mode), kind, **options)


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """Return a PNG that Pillow cannot write, such as one with 16 bits for each of three channels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sixteen_bits(content: bytes) -> bytes:
    width, height = Image.open(io.BytesIO(content)).size
    return png(width, height, 16, 2, (b"\0" + bytes(6 * width)) * height)


def huge(content: bytes) -> bytes:
    return png(30_000, 30_000, 8, 2, b"")


def named_png(folder: Path) -> None:
    image_file(folder).rename(image_file(folder).with_suffix(".png"))
    in_image(file_name=image_file(folder).with_suffix(".png").name)(folder)


def as_png(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        named_png(folder)
        write(lambda folder: image_file(folder).with_suffix(".png"), change)(folder)

    return damage


def rotated(content: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.open(io.BytesIO(content)), "JPEG", exif=exif)


def add_pixels(content: bytes) -> bytes:
    pixels = np.array(Image.open(io.BytesIO(content)))
    pixels[0, 4:6] = ids_to_rgb(np.array([[123456]]))[0, 0]
    return encode(Image.fromarray(pixels), "PNG")


def crop(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content))
    return encode(image.crop((0, 0, image.width, image.height - 1)), "PNG")


def widen(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content))
    return encode(image.resize((image.width + 1, image.height)), "JPEG")


def cut(content: bytes) -> bytes:
    """Cut a file behind its header."""
    return content[: len(content) * 9 // 10]


def mostly_void(folder: Path) -> None:
    """Remove the second stuff segment, which covers two thirds of the image, from PNG and JSON."""
    removed = []
    edit("annotations", lambda entry: removed.append(entry["segments_info"].pop(SECOND_STUFF)))(folder)

    def erase(content: bytes) -> bytes:
        pixels = np.array(Image.open(io.BytesIO(content)))
        ids = pixels @ np.array([1, 256, 65536])
        return encode(Image.fromarray(np.where((ids == removed[0]["id"])[..., None], 0, pixels).astype("uint8")), "PNG")

    write(png_file, erase)(folder)


def all_crowd(entry: dict[str, Any]) -> None:
    for segment in entry["segments_info"]:
        segment.update(category_id=THING, iscrowd=1)


def merge_id(folder: Path) -> None:
    """Give the first thing the id of the first stuff segment, in JSON and PNG."""

    def change(entry: dict[str, Any]) -> None:
        first, thing = (entry["segments_info"][index] for index in (FIRST_STUFF, FIRST_THING))
        pixels = np.array(Image.open(png_file(folder)))
        ids = pixels @ np.array([1, 256, 65536])
        ids[ids == thing["id"]] = first["id"]
        Image.fromarray(ids_to_rgb(ids)).save(png_file(folder))
        for segment in (first, thing):
            segment.update(id=first["id"], **measured(ids == first["id"]))

    edit("annotations", change)(folder)


def share(part: str, key: str, file: Callable[..., Path]) -> Callable[[Path], None]:
    """Return a damage that gives another image everything of this one except its id."""

    def change(document: dict[str, Any]) -> None:
        for entries, name in ((document["images"], "id"), (document["annotations"], "image_id")):
            mine, other = ({e[name]: e for e in entries}[image_id] for image_id in (IMAGE_ID, 13))
            kept = {name: 13, "file_name": mine["file_name"] if entries is document[part] else other["file_name"]}
            other.update({**mine, **kept})

    def damage(folder: Path) -> None:
        edit_json(folder, change)
        other = png_file if file is image_file else image_file
        other(folder, 13).write_bytes(other(folder).read_bytes())

    return damage


def elsewhere(folder: Path) -> None:
    """Move the image out of the data set, and leave a link."""
    target = folder.with_name(f"{folder.name}-elsewhere.jpg")
    image_file(folder).rename(target)
    image_file(folder).symlink_to(target)


def without_unsafe_names(name: str) -> Callable[[Path], None]:
    return in_image(file_name=name)


# What is damaged, the code it is found with, and a part of its message.
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "image without width": (in_image(width="640"), "image-entry", "has no width of type int in 1"),
    "image of no height": (in_image(height=0), "image-entry", "has no height"),
    "image without file name": (in_image(file_name=None), "image-entry", "has no file_name of type str"),
    "file name with half a character": (in_image(file_name="\ud800.jpg"), "image-entry", r"\ud800"),
    "annotation without segments": (in_annotation(segments_info=None), "annotation-entry", "no segments_info of type"),
    "annotation without file name": (in_annotation(file_name=7), "annotation-entry", "no file_name of type str"),
    "segment without category": (in_segment(1, category_id="rug"), "segment-entry", "no category_id of type int"),
    "boolean segment id": (in_segment(1, id=True), "segment-entry", "a segment has no id of type int"),
    "crowd of 2": (in_segment(1, iscrowd=2), "segment-entry", "no iscrowd of 0 or 1"),
    "segment that is a number": (
        edit("annotations", lambda entry: entry["segments_info"].append(5)),
        "segment-entry",
        "is no object, got 5",
    ),
    "category without isthing": (
        in_json(lambda document: document["categories"][1].pop("isthing")),
        "category-isthing",
        "category 7, 'train', has no isthing of 0 or 1",
    ),
    "category without id": (
        in_json(lambda document: document["categories"].append({"name": "x", "isthing": 1})),
        "category-entry",
        "entry 5 of categories has no id",
    ),
    "category without name": (
        in_json(lambda document: document["categories"][1].update(name="")),
        "category-entry",
        "category 7 has no name",
    ),
    "category of a wrong color": (
        in_json(lambda document: document["categories"][1].update(color=[1, 2])),
        "category-entry",
        "the color of category 7",
    ),
    "category id beyond 32 bits": (
        in_json(lambda document: document["categories"].append({"id": 2**31, "name": "x", "isthing": 1})),
        "category-entry",
        "in 0..2147483647",
    ),
    "category id twice": (
        in_json(lambda document: document["categories"].append({**document["categories"][0], "name": "x"})),
        "category-id-repeated",
        f"the category id {STUFF} occurs more than once",
    ),
    "category name twice": (
        in_json(lambda document: document["categories"][0].update(name="car")),
        "category-name-repeated",
        "the category name 'car' occurs more than once",
    ),
    "unknown category": (in_segment(1, category_id=999), "category-unknown", "the category 999 of the segment"),
    "category beyond 64 bits": (in_segment(1, category_id=2**70), "category-unknown", str(2**70)),
    "segment id 0": (in_segment(CROWD, id=0), "segment-id-range", "id 0 (void) does not lie in 1..16777215"),
    "negative segment id": (in_segment(CROWD, id=-5), "segment-id-range", "id -5 does not"),
    "segment id of 25 bits": (in_segment(CROWD, id=2**24), "segment-id-range", "id 16777216 does not"),
    "segment id beyond 64 bits": (in_segment(CROWD, id=2**64), "segment-id-range", f"id {2**64} does not"),
    "segment id twice": (merge_id, "segment-id-repeated", "lists the segment 2 times"),
    "pixels of no segment": (write(png_file, add_pixels), "segment-unlisted", "has 2 pixels of a segment"),
    "segment without pixels": (
        edit(
            "annotations",
            lambda entry: entry["segments_info"].append({"id": 654321, "category_id": THING, "iscrowd": 0}),
        ),
        "segment-without-pixels",
        "without pixels in the PNG",
    ),
    "one stuff class twice": (
        in_segment(SECOND_STUFF, category_id=STUFF),
        "stuff-repeated",
        "has 2 segments of the stuff class 'rug'",
    ),
    "crowd of stuff": (in_segment(FIRST_STUFF, iscrowd=1), "crowd-stuff", "a stuff segment is marked as a crowd"),
    "wrong area": (in_segment(CROWD, area=2), "area", "the area is 2 pixels in the JSON, but 1 in the PNG"),
    "area that is no number": (in_segment(CROWD, area="1"), "area", 'the area is "1", not a number'),
    "wrong box": (in_segment(CROWD, bbox=[3, 0, 1, 2]), "bbox", "is [3, 0, 1, 2] in the JSON, but [3, 0, 1, 1] in"),
    "box of three numbers": (in_segment(CROWD, bbox=[3, 0, 1]), "bbox", "not a list x, y, width, height"),
    "box that is not finite": (in_segment(CROWD, bbox=[3, 0, 1, float("nan")]), "bbox", "NaN"),
    "only crowds": (edit("annotations", all_crowd), "no-segment", "has no segment to learn from"),
    "mostly void": (mostly_void, "void-share", "% of the image is void"),
    "absolute file name": (in_image(file_name="/etc/passwd"), "name-outside", "'/etc/passwd' leaves"),
    "file name with ..": (in_image(file_name="a/../../b.jpg"), "name-outside", "'a/../../b.jpg' leaves"),
    "file name with .. of Windows": (in_annotation(file_name="..\\b.png"), "name-outside", "leaves the folder"),
    "image elsewhere": (elsewhere, "file-outside", "a link leads out of the data set's folders"),
    "no image file": (lambda folder: image_file(folder).unlink(), "image-missing", "does not exist"),
    "no PNG": (lambda folder: png_file(folder).unlink(), "png-missing", "does not exist"),
    "empty image": (write(image_file, lambda _: b""), "image-unreadable", "the file is empty"),
    "text as image": (write(image_file, lambda _: b"hello"), "image-unreadable", "is not that of a JPEG or a PNG or"),
    "folder as image": (
        lambda folder: (image_file(folder).unlink(), image_file(folder).mkdir()),
        "image-unreadable",
        "it cannot be read",
    ),
    "truncated image": (write(image_file, cut), "image-truncated", "cannot be decoded (image file is truncated"),
    "truncated PNG image": (
        as_png(lambda content: cut(converted("RGB", "PNG")(content))),
        "image-truncated",
        "its last chunk, IEND, is missing",
    ),
    "answer of a failed download": (write(image_file, lambda _: b"<html>"), "image-format", "an HTML or XML text"),
    "GIF": (write(image_file, converted("P", "GIF")), "image-format", "it is a GIF"),
    "JPEG named .png": (named_png, "image-extension", "it is a JPEG, and its name ends in '.png'"),
    "image of another size": (write(image_file, widen), "image-size", "in the JSON"),
    "image of 16 bits per channel": (as_png(sixteen_bits), "image-16-bit", "16 bits"),
    "gray image of 16 bits": (as_png(converted("I;16", "PNG")), "image-16-bit", "16 bits"),
    "CMYK image": (write(image_file, converted("CMYK")), "image-cmyk", "it is CMYK"),
    "image with a palette": (as_png(converted("P", "PNG")), "image-palette", "has a palette"),
    "image with alpha": (as_png(converted("RGBA", "PNG")), "image-alpha", "has an alpha channel"),
    "gray image": (write(image_file, converted("L")), "image-gray", "it is gray"),
    "rotated image": (write(image_file, rotated), "image-orientation", "EXIF orientation is 6"),
    "huge image": (as_png(huge), "too-large", "declares too many pixels"),
    "huge PNG": (write(png_file, huge), "too-large", "declares too many pixels"),
    "empty PNG": (write(png_file, lambda _: b""), "png-unreadable", "the file is empty"),
    "truncated PNG": (write(png_file, cut), "png-truncated", "its last chunk, IEND, is missing"),
    "gray PNG": (write(png_file, converted("L", "PNG")), "png-format", "a PNG of mode L with 8 bits"),
    "PNG with alpha": (write(png_file, converted("RGBA", "PNG")), "png-format", "a PNG of mode RGBA with 8 bits"),
    "PNG of 16 bits per channel": (write(png_file, sixteen_bits), "png-format", "a PNG of mode RGB with 16 bits"),
    "JPEG as PNG": (write(png_file, converted("RGB")), "png-format", "it is a JPEG"),
    "PNG of another size": (write(png_file, crop), "png-size", "the PNG is "),
    "negative image id": (
        in_json(lambda document: document["images"].append({**document["images"][0], "id": -3})),
        "image-id-range",
        "the image id -3 does not lie in 0..9223372036854775807",
    ),
    "image id beyond 63 bits": (
        in_json(lambda document: document["annotations"].append({**document["annotations"][0], "image_id": 2**63})),
        "image-id-range",
        f"{2**63} does not",
    ),
    "boolean image id": (
        in_json(lambda document: document["images"].append({**document["images"][0], "id": True})),
        "image-entry",
        "entry 5 of images has no id of type int, got",
    ),
    "entry that is a text": (
        in_json(lambda document: document["annotations"].append("text")),
        "annotation-entry",
        'entry 5 of annotations has no image_id of type int, got "text"',
    ),
    "image twice": (
        in_json(lambda document: document["images"].append(document["images"][0])),
        "image-id-repeated",
        "has 2 entries in images",
    ),
    "annotation twice": (
        in_json(lambda document: document["annotations"].extend(document["annotations"][:1] * 2)),
        "annotation-repeated",
        "has 3 annotations",
    ),
    "image without annotation": (
        in_json(lambda document: document["images"].append({**document["images"][0], "id": 99})),
        "image-without-annotation",
        ".jpg', id 99, has no annotation",
    ),
    "annotation without image": (
        in_json(lambda document: document["annotations"].append({**document["annotations"][0], "image_id": 99})),
        "annotation-without-image",
        "id 99, is not listed",
    ),
    "image file twice": (share("images", "id", image_file), "image-file-repeated", "also belongs to image 12"),
    "PNG twice": (share("annotations", "image_id", png_file), "png-file-repeated", "also belongs to image 12"),
}

FOUND_IN_THE_WHOLE_SET = {"class-rare", "image-repeated", "image-in-other-split"}  # see test_validate.py


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_with_its_own_code(folder: Path, name: str) -> None:
    damage, code, message = DAMAGE[name]
    damage(folder)
    findings = found_in(folder)
    assert findings.counts == {code: 1}
    (finding,) = findings.examples[code]
    assert message in finding.message
    assert finding.message.endswith(f"; {CODES[code].remedy}.")
    assert "\n" not in str(finding)
    if finding.file != str(json_file(folder)):
        assert finding.image_id == (13 if "file-repeated" in code else IMAGE_ID)


def test_every_code_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {code for _, code, _ in DAMAGE.values()} | FOUND_IN_THE_WHOLE_SET | {"segments-too-many", "png-too-fine"}
    assert planted == CODES.keys()


def test_more_segments_than_an_index_map_can_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each image's segments, two are things, three are stuff, and a crowd is not numbered."""
    monkeypatch.setattr(checks, "MAX_SEGMENTS", 5)
    assert found_in(folder) == Findings()
    in_segment(CROWD, iscrowd=0)(folder)
    findings = found_in(folder)
    assert findings.counts == {"segments-too-many": 1}
    assert (
        "has 6 segments to train on, but an index map can number 5;"
        in findings.examples["segments-too-many"][0].message
    )


def test_a_map_of_too_many_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each map has six segments and void."""
    monkeypatch.setattr(checks, "_MAX_IDS", 7)
    assert found_in(folder) == Findings()
    monkeypatch.setattr(checks, "_MAX_IDS", 6)
    findings = found_in(folder)
    assert findings.counts == {"png-too-fine": 5}
    assert "it has 7 ids, more than 6" in findings.examples["png-too-fine"][0].message


def test_limits(folder: Path) -> None:
    mostly_void(folder)
    assert found_in(folder, max_void_share=1.0) == Findings()
    assert found_in(folder, max_megapixels=1e-4).counts == {"too-large": 10}
    wrong: dict[str, Any]
    for wrong in (
        {"max_void_share": 2.0},
        {"min_images_per_class": -1},
        {"max_megapixels": 0.0},
        {"max_megapixels": 52.1},
    ):
        with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')} must"):
            CheckConfig(**wrong)


def test_what_is_legal_is_no_fault(folder: Path) -> None:
    """Several crowds of one class, whole numbers as floats, no area, files in subfolders, progressive JPEG, WebP."""
    in_segment(CROWD, bbox=[3.0, 0.0, 1.0, 1.0], area=1.0)(folder)
    in_segment(FIRST_THING, iscrowd=1, category_id=THING, area=None)(folder)
    write(image_file, lambda content: encode(Image.open(io.BytesIO(content)), "JPEG", progressive=True))(folder)
    (folder / SPLIT / "a..b").mkdir()
    image = Image.open(image_file(folder))
    image.save(folder / SPLIT / "a..b" / "12.webp", lossless=True)
    in_image(file_name="a..b/12.webp")(folder)
    assert found_in(folder) == Findings()


def test_a_box_is_that_of_the_pixels(folder: Path) -> None:
    """`_measure` against a definition by masks."""
    ids = np.random.default_rng(0).integers(0, 4, (7, 9)).astype(np.int32)
    areas, boxes = checks._measure(ids)
    for identifier in range(4):
        expected = measured(ids == identifier)
        assert (areas[identifier], boxes[identifier]) == (expected["area"], expected["bbox"])


def test_names_are_escaped(folder: Path) -> None:
    in_image(file_name="a\n\x1b[31m.jpg")(folder)
    (finding,) = found_in(folder).examples["image-missing"]
    assert r"a\n\x1b[31m.jpg (image 12): " in str(finding)


def test_the_synthetic_set_has_no_fault(tmp_path: Path) -> None:
    draw_dataset(tmp_path, SyntheticConfig(split="val", num_images=60))
    assert found_in(tmp_path, "val") == Findings()


def test_real_images_have_no_fault() -> None:
    sample = os.environ.get("COCO_PANOPTIC_SAMPLE")
    if not sample:
        pytest.skip("COCO_PANOPTIC_SAMPLE does not name the folder with two real COCO images")
    assert found_in(Path(sample)) == Findings()


def test_a_missing_isthing_does_not_hide_other_faults(folder: Path) -> None:
    edit_json(folder, lambda document: [category.pop("isthing") for category in document["categories"]])
    in_segment(SECOND_STUFF, category_id=999)(folder)
    image_file(folder).unlink()
    findings = found_in(folder)
    assert findings.counts == {"category-isthing": 5, "category-unknown": 1, "image-missing": 1}
    assert json.loads(json_file(folder).read_text())["categories"][2]["id"] == OTHER_STUFF


@pytest.mark.parametrize(("kind", "file"), [("image", image_file), ("png", png_file)])
def test_every_truncation_is_found(folder: Path, kind: str, file: Callable[[Path], Path]) -> None:
    """Wherever the file ends. The last bytes hold no pixels."""
    whole = file(folder).read_bytes()
    for end in range(0, len(whole) - 12, 23):
        file(folder).write_bytes(whole[:end])
        findings = found_in(folder)
        assert sum(findings.counts.values()) == 1, end
        assert set(findings.counts) <= {f"{kind}-unreadable", f"{kind}-truncated"}
