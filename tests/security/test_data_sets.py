"""Data sets and pictures of a stranger: each is refused in one paragraph, found with a code, or used correctly.

Each runs in a process of its own with limits on time and memory, see `isolated`.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.pack import PackConfig, pack
from pipelines.errors import UserError
from tests.pipelines.data.coco_folder import (
    CATEGORIES,
    SPLIT,
    THING,
    edit_json,
    ids_to_rgb,
    json_file,
    write_coco_folder,
)
from tests.security import hostile_files
from tests.security.hostile_files import BOMBS, NO_FILES, OTHER_BOMBS, OTHER_FORMATS, chunk, encoded, png
from tests.security.hostile_use import REFUSALS, use_data_set, use_each, use_inputs
from tests.security.isolated import Outcome, run

Change = Callable[[Path], object]
IMAGE_ID = 12
HUGE = "9" * 4000  # as long as Python reads
SECRET = b"\x89PNG the secret of this user"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_coco_folder(folder, 3)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "set"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Return a folder with a program `gs` that leaves a trace when it is started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    return tmp_path / "bin"


def image_file(folder: Path, image_id: int = IMAGE_ID) -> Path:
    return folder / SPLIT / f"{image_id:012d}.jpg"


def png_file(folder: Path, image_id: int = IMAGE_ID) -> Path:
    return folder / "annotations" / f"panoptic_{SPLIT}" / f"{image_id:012d}.png"


def text(make: Callable[[str], str | bytes]) -> Change:
    """Return a change of the text of the JSON."""

    def change(folder: Path) -> None:
        made = make(json_file(folder).read_text())
        json_file(folder).write_bytes(made if isinstance(made, bytes) else made.encode())

    return change


def entry(part: str, key: str = "image_id", **values: Any) -> Change:
    """Return a change of the image's entry in a list of the JSON. A value may be a text of JSON, after `=`."""

    def change(folder: Path) -> None:
        document = json.loads(json_file(folder).read_text())
        raw = {}
        for found in document[part]:
            if found.get(key) == IMAGE_ID:
                for name, value in values.items():
                    is_text = isinstance(value, str) and value.startswith("=")
                    found[name] = f"raw {name}" if is_text else value
                    if is_text:
                        raw[f'"raw {name}"'] = value[1:]
        made = json.dumps(document)
        for name, value in raw.items():
            made = made.replace(name, value)
        json_file(folder).write_text(made)

    return change


def image(**values: Any) -> Change:
    return entry("images", "id", **values)


def annotation(**values: Any) -> Change:
    return entry("annotations", **values)


def segment(**values: Any) -> Change:
    """Return a change of the last segment of the image, a crowd."""

    def change(folder: Path) -> None:
        document = json.loads(json_file(folder).read_text())
        (found,) = (each for each in document["annotations"] if each["image_id"] == IMAGE_ID)
        found["segments_info"][-1].update(values)
        made = json.dumps(document)
        for value in values.values():
            if isinstance(value, str) and value.startswith("="):
                made = made.replace(json.dumps(value), value[1:])
        json_file(folder).write_text(made)

    return change


def category(**values: Any) -> Change:
    return lambda folder: edit_json(folder, lambda document: document["categories"][1].update(values))


def categories_named(*names: str) -> Change:
    """Return a change that adds categories with ascending ids."""
    return more("categories", lambda: [{"id": n, "name": name, "isthing": 1} for n, name in enumerate(names, 301)])


def more(part: str, entries: Callable[[], list[Any]]) -> Change:
    return lambda folder: edit_json(folder, lambda document: document[part].extend(entries()))


def in_images(entries: str) -> Change:
    return text(lambda whole: whole.replace('"images": [', f'"images": [{entries}'))


def image_is(make: Callable[[], bytes]) -> Change:
    return lambda folder: image_file(folder).write_bytes(make())


def png_is(make: Callable[[], bytes]) -> Change:
    return lambda folder: png_file(folder).write_bytes(make())


def outside(file: Callable[[Path], Path]) -> Change:
    """Move a file out of the data set and leave a link."""

    def change(folder: Path) -> None:
        target = folder.parent / "elsewhere" / file(folder).name
        file(folder).rename(target)
        file(folder).symlink_to(target)

    return change


def subfolder_outside(folder: Path) -> None:
    image_file(folder).rename(folder.parent / "elsewhere" / "a.jpg")
    (folder / SPLIT / "sub").symlink_to(folder.parent / "elsewhere")
    image(file_name="sub/a.jpg")(folder)


def inside(folder: Path) -> None:
    """Move a file to another folder of the data set and leave a link, as people do."""
    (folder / "all").mkdir()
    image_file(folder).rename(folder / "all" / "a.jpg")
    image_file(folder).symlink_to("../all/a.jpg")


def loops(folder: Path) -> None:
    """Add links to the folder itself, of which listing each in each would never end."""
    for name in "abcdef":
        (folder / SPLIT / name).symlink_to(".")


def folder_outside(path: str) -> Change:
    def change(folder: Path) -> None:
        target = folder.parent / "elsewhere" / "moved"
        (folder / path).rename(target)
        (folder / path).symlink_to(target)

    return change


def of_size(width: int, height: int, make: Callable[[int, int], bytes]) -> Change:
    """Return a change that gives the image another size in the JSON, and a PNG of this size."""

    def change(folder: Path) -> None:
        image(width=width, height=height)(folder)
        png_file(folder).write_bytes(make(width, height))

    return change


def many_ids(width: int, height: int) -> bytes:
    return encoded(Image.fromarray(ids_to_rgb(np.arange(1, width * height + 1).reshape(height, width))), "PNG")


def fine(width: int, height: int) -> bytes:
    checker = np.indices((height, width)).sum(axis=0) % 2
    return encoded(Image.fromarray(ids_to_rgb(checker)), "PNG", compress_level=1)


HEADER = png(32, 24)[8:33]


def png_after(first: bytes) -> bytes:
    """Return a PNG of 16 bits with a chunk before its header."""
    whole = png(32, 24, depth=16)
    return whole[:8] + first + whole[8:]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# What is done to the data set, and the code of the finding, or a part of the refusal after "!", or "ok".
ATTACKS: dict[str, tuple[Change, str]] = {
    # The text of the JSON.
    "lists nested 5,000 deep in an entry": (image(file_name=f"={nested(5000)}"), "!nested too deeply"),
    "lists nested 500 deep in an entry": (image(file_name=f"={nested(500)}"), "image-entry"),
    "lists nested 900 deep in a segment": (segment(id=f"={nested(900)}"), "segment-entry"),
    "lists nested 100,000 deep": (text(lambda _: nested(100_000)), "!nested too deeply"),
    "objects nested 5,000 deep": (text(lambda t: t[:-1] + ', "x": ' + '{"a":' * 5000), "!nested too deeply"),
    "a number of 5,000 digits": (image(id=f"={'1' * 5000}"), "!Exceeds the limit"),
    "an image id of 4,000 digits": (image(id=f"={HUGE}"), "image-id-range"),
    "a segment id of 4,000 digits": (segment(id=f"={HUGE}"), "segment-id-range"),
    "a category id of 4,000 digits": (segment(category_id=f"={HUGE}"), "category-unknown"),
    "a category whose id has 4,000 digits": (category(id=int(HUGE)), "category-entry"),
    "a height of 4,000 digits": (image(height=f"={HUGE}"), "image-entry"),
    "an area of 4,000 digits": (segment(area=f"={HUGE}"), "area"),
    "a box of 4,000 digits": (segment(bbox=[1, 2, 3, int(HUGE)]), "bbox"),
    "a crowd of 4,000 digits": (segment(iscrowd=f"={HUGE}"), "segment-entry"),
    "a height that is no number": (image(height=float("nan")), "image-entry"),
    "an infinite width": (image(width="=Infinity"), "image-entry"),
    "a width of 1e999": (image(width="=1e999"), "image-entry"),
    "an area that is no number": (segment(area=float("nan")), "area"),
    "an infinite area": (segment(area="=-Infinity"), "area"),
    "an image id beyond 63 bits": (image(id=2**63), "image-id-range"),
    "the largest image id": (
        lambda folder: (image(id=2**63 - 1)(folder), annotation(image_id=2**63 - 1)(folder)),
        "no fault",
    ),
    "a negative image id": (image(id=-1), "image-id-range"),
    "a boolean image id": (image(id=True), "image-entry"),
    "a boolean segment id": (segment(id=True), "segment-entry"),
    "a boolean category": (segment(category_id=False), "segment-entry"),
    "a boolean id of a category": (category(id=True), "category-entry"),
    "a category beyond 63 bits": (category(id=2**63), "category-entry"),
    "a category beyond 31 bits": (category(id=2**31), "category-entry"),
    "a negative category": (category(id=-1), "category-entry"),
    "a category of a segment beyond 31 bits": (segment(category_id=2**40), "category-unknown"),
    "a negative height": (image(height=-24), "image-entry"),
    "no height": (image(height=0), "image-entry"),
    "2^31 rows": (image(height=2**31), "image-entry"),
    "2^62 pixels": (image(height=2**31 - 1, width=2**31 - 1), "image-size"),
    "a key twice": (text(lambda t: t[:-1] + ', "images": []}'), "!has the key 'images' twice"),
    "a key twice in an entry": (text(lambda t: t.replace('"width"', '"height": 5, "width"')), "no fault"),
    "text that is not UTF-8": (text(lambda t: t.replace("val", "v").encode() + b"\xff\xfe"), "!not a JSON text"),
    "UTF-16": (text(lambda t: t.encode("utf-16")), "!not a JSON text"),
    "gzip": (text(lambda t: b"\x1f\x8b" + t.encode()), "!not a JSON text"),
    "half a character in a file name": (image(file_name="\ud800.jpg"), "image-entry"),
    "half a character in a name": (category(name="\udfff"), "category-entry"),
    "a no-break space in a name": (category(name="big\u00a0train"), "category-entry"),
    "a tab in a name": (category(name="big\ttrain"), "category-entry"),
    "a terminal's commands as a name": (category(name="\x1b[31m\n"), "category-entry"),
    "a name of 201 characters": (category(name="x" * 201), "category-entry"),
    "a name of 200 characters": (category(name="x" * 200), "no fault"),
    "a name of 200 characters twice": (categories_named("x" * 200, "x" * 200), "category-name-repeated"),
    "names like those of repeated ones": (categories_named("a (303)", "a", "a"), "category-name-repeated"),
    "names like those of unusable ones": (
        categories_named("category 303", "category 303 (2)", "\t", "\t"),
        "category-entry",
    ),
    "NUL in a file name": (annotation(file_name="a\0b.png"), "annotation-entry"),
    "a file name of 300 bytes": (image(file_name="a" * 300 + ".jpg"), "image-entry"),
    "a file name of 1 MB": (image(file_name="a/" * 500_000 + ".jpg"), "image-entry"),
    "an absolute file name": (image(file_name="/etc/passwd"), "name-outside"),
    "a file name with ..": (image(file_name="../../../../etc/passwd"), "name-outside"),
    "a file name with a drive": (annotation(file_name="C:\\secret.png"), "name-outside"),
    "a file name of a server": (image(file_name="\\\\server\\share\\a.jpg"), "name-outside"),
    "a file name with .. of Windows": (image(file_name="a\\..\\..\\b.jpg"), "name-outside"),
    "the folder as a file": (image(file_name="."), "image-unreadable"),
    "a URI as a file name": (image(file_name="http://127.0.0.1:1/a.jpg"), "image-missing"),
    "a terminal's commands as a file name": (image(file_name="\x1b]0;x\x07\n\x1b[2J.jpg"), "image-missing"),
    "a terminal's commands as a list": (text(lambda t: t.replace('"images"', '"im\\u001bages"', 1)), "!no list images"),
    "an entry of 20 MB": (image(file_name=f'="{"a" * 20_000_000}"'), "!more than 8,388,608 characters"),
    "an entry of many lists": (image(file_name=f"=[{'[],' * 1_500_000}1]"), "image-entry"),
    "a list of many segments": (annotation(segments_info=[{}] * 200_000), "segments-too-many"),
    "many bad segments": (
        more("annotations", lambda: [{"image_id": 11, "file_name": "a.png", "segments_info": [{}] * 50_000}] * 4),
        "annotation-repeated",
    ),
    "many unknown segments": (
        annotation(segments_info=[{"id": n, "category_id": 5, "iscrowd": 0} for n in range(1, 100_000)]),
        "category-unknown",
    ),
    "a million keys": (
        text(lambda t: t[:-1] + "," + ",".join(f'"{n}":0' for n in range(1_000_000)) + "}"),
        "!more than 1000 keys",
    ),
    "100,000 categories": (
        more("categories", lambda: [{"id": n, "name": str(n), "isthing": 1} for n in range(1000, 101_000)]),
        "!more than 10,000 categories",
    ),
    "a category of 4 MB": (category(name="car", supercategory=[[]] * 1_000_000), "category-name-repeated"),
    "200,000 empty entries": (in_images("{}," * 200_000), "image-entry"),
    "a name with a terminal's commands": (image(file_name="a\x9b31m.jpg"), "image-missing"),
    "half a JSON": (text(lambda t: t[: len(t) // 2]), "!not valid JSON"),
    "more after the JSON": (text(lambda t: t + "{}"), "!Extra data"),
    "an empty JSON": (text(lambda _: ""), "!not valid JSON"),
    "a list as JSON": (text(lambda _: "[1, 2]"), "!got a list"),
    "a text as JSON": (text(lambda _: '"\\u001b[31m"'), "!got a str"),
    "entries that are no objects": (in_images('null, [], 1e5, "a",'), "image-entry"),
    "a list of lists": (text(lambda t: t.replace('"categories": [', '"categories": [[], [[]], ')), "category-entry"),
    "another task's annotations": (annotation(segments_info={"a": 1}), "annotation-entry"),
    "one file of all images": (
        lambda folder: edit_json(
            folder, lambda d: [each.update(file_name=d["images"][0]["file_name"]) for each in d["images"]]
        ),
        "image-file-repeated",
    ),
    # The JSON as a file.
    **{f"{name} as JSON": (lambda folder, make=make: make(json_file(folder)), "!") for name, make in NO_FILES.items()},
    "a JSON elsewhere": (outside(json_file), "!add --annotations"),
    # Files.
    "an image elsewhere": (outside(image_file), "file-outside"),
    "a PNG elsewhere": (outside(png_file), "file-outside"),
    "an image in a linked folder elsewhere": (subfolder_outside, "file-outside"),
    "an image elsewhere in the data set": (inside, "no fault"),
    "links in a circle": (loops, "no fault"),
    "a folder of images elsewhere": (folder_outside(SPLIT), "!add --images"),
    "a folder of PNGs elsewhere": (folder_outside(f"annotations/panoptic_{SPLIT}"), "!add --panoptic"),
    "a name that is not UTF-8": (lambda folder: hostile_files.unreadable_name(image_file(folder)), "no fault"),
    # Content of images.
    "a PNG of 16 bits": (png_is(lambda: png(32, 24, depth=16)), "png-format"),
    **{
        f"a PNG of 16 bits after {name}": (png_is(lambda first=first: png_after(first)), "png-format")
        for name, first in {"a header of 8 bits": HEADER, "another chunk": chunk(b"abCd", bytes([8] * 13))}.items()
    },
    "a map of 50 million pixels": (of_size(7200, 7000, png), "image-size"),
    "a map of more pixels than are read": (of_size(7300, 7300, png), "too-large"),
    "a map of 5 million runs": (of_size(2500, 2000, fine), "png-too-fine"),
    "a map of 200,000 ids": (of_size(500, 400, many_ids), "png-too-fine"),
    "a map of 100,000 ids": (of_size(400, 250, many_ids), "segment-unlisted"),
}  # fmt: skip


SLOW = {  # each takes more than a second, so it has a process of its own
    *("an entry of many lists", "a list of many segments", "many bad segments", "many unknown segments"),
    *("a million keys", "100,000 categories", "a category of 4 MB", "200,000 empty entries", "an entry of 20 MB"),
    *("a map of 50 million pixels", "a map of 5 million runs", "a map of 200,000 ids", "a map of 100,000 ids"),
}
_AT_A_TIME = 12
_quick = [name for name in ATTACKS if name not in SLOW]
BATCHES = [_quick[start : start + _AT_A_TIME] for start in range(0, len(_quick), _AT_A_TIME)] + [
    [n] for n in sorted(SLOW)
]


def ends_of(function: str, calls: list[tuple[Any, ...]], tmp_path: Path, programs: Path | str = "") -> list[Outcome]:
    """Return how each of some calls ended, in one process; its limits must hold for all of them together."""
    output = tmp_path / "ends.json"
    outcome = run(use_each, function, calls, str(output), str(programs), refusals=REFUSALS)
    outcome.require_clean()
    assert outcome.kind == "result", outcome
    ends = json.loads(output.read_text())
    return [Outcome(kind, text, seconds, outcome.memory) for kind, text, seconds in ends]


def require(outcome: Outcome, expected: str, name: str = "") -> None:
    """Fail unless a call ended as expected: with one of some codes, "no fault", or a refusal after "!"."""
    outcome.require_clean()
    if expected.startswith("!"):
        assert outcome.kind == "refused", (name, outcome)
        assert expected[1:] in outcome.text, (name, outcome)
    elif expected:
        assert outcome.kind == "result", (name, outcome)
        assert any(code in outcome.text for code in expected.split("|")), (name, outcome)


@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_hostile_data_sets(original: Path, tmp_path: Path, number: int) -> None:
    calls = []
    for place, name in enumerate(BATCHES[number]):
        (tmp_path / str(place) / "elsewhere").mkdir(parents=True)
        shutil.copytree(original, tmp_path / str(place) / "set")
        ATTACKS[name][0](tmp_path / str(place) / "set")
        calls.append((str(tmp_path / str(place) / "set"),))
    for name, outcome in zip(BATCHES[number], ends_of("use_data_set", calls, tmp_path), strict=True):
        require(outcome, ATTACKS[name][1], name)


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) + 2 * len({**OTHER_FORMATS, **BOMBS, **NO_FILES}) >= 80
    assert ATTACKS.keys() >= SLOW


# Bombs that are images all the same: what is too much of them is not read.
HARMLESS = {
    *("PNG of a broken text", "PNG of much data", "PNG of many frames", "JPEG of CMYK"),
    *("JPEG of several pictures", "WebP of many frames"),
}


@pytest.mark.parametrize("kind", ["image", "png"])
@pytest.mark.parametrize("files", [OTHER_FORMATS, BOMBS, NO_FILES], ids=["other formats", "bombs", "no files"])
def test_a_data_set_of_hostile_files(tmp_path: Path, programs: Path, kind: str, files: dict[str, Any]) -> None:
    """One file of each image is replaced, and each image has a finding about it."""
    (tmp_path / "set").mkdir()
    write_coco_folder(tmp_path / "set", len(files) + 1)
    for image_id, (name, make) in enumerate(files.items(), 12):
        path = (image_file if kind == "image" else png_file)(tmp_path / "set", image_id)
        if files is NO_FILES:
            (path.parent / "pipe").unlink(missing_ok=True)
            make(path)
        else:
            path.write_bytes(make())
            edit_json(tmp_path / "set", partial(_resize, path, image_id)) if name in HARMLESS else None
    (outcome,) = ends_of("use_data_set", [(str(tmp_path / "set"),)], tmp_path, programs)
    outcome.require_clean()
    left_out = json.loads((tmp_path / "set" / "packed" / "pack.json").read_text())["source"]["left_out"]
    harmless = [image_id for image_id, name in enumerate(files, 12) if name in HARMLESS and kind == "image"]
    assert left_out == [image_id for image_id in range(12, 12 + len(files)) if image_id not in harmless]
    assert not (tmp_path / "started").exists()


def _resize(path: Path, image_id: int, document: dict[str, Any]) -> None:
    """Give the image the size of its file, in the JSON and of its PNG."""
    width, height = Image.open(path).size
    (found,) = (each for each in document["images"] if each["id"] == image_id)
    found.update(width=width, height=height)
    (found,) = (each for each in document["annotations"] if each["image_id"] == image_id)
    found["segments_info"] = [{"id": 1, "category_id": THING, "iscrowd": 0}]
    if path.suffix == ".jpg":
        target = path.parent.parent / "annotations" / f"panoptic_{SPLIT}" / f"{image_id:012d}.png"
        Image.new("RGB", (width, height), (1, 0, 0)).save(target)


def test_the_trace_of_ghostscript_would_be_seen(tmp_path: Path, programs: Path) -> None:
    run(use_each, "use_other_decoders", [(OTHER_FORMATS["EPS"](),)], str(tmp_path / "x"), str(programs))
    assert (tmp_path / "started").exists()


def test_a_good_data_set_is_used(folder: Path) -> None:
    require(run(use_data_set, str(folder), refusals=REFUSALS), "no fault")


def test_what_lies_elsewhere_can_be_named(folder: Path) -> None:
    """The remedy of the refusals works: a folder that is named may lie anywhere, and may be a link."""
    for path in (SPLIT, f"annotations/panoptic_{SPLIT}"):
        folder_outside(path)(folder)
        (folder.parent / "elsewhere" / "moved").rename(folder.parent / "elsewhere" / Path(path).name)
        (folder / path).unlink()
        (folder / path).symlink_to(folder.parent / "elsewhere" / Path(path).name)
    named = {"images": str(folder / SPLIT), "panoptic": str(folder.parent / "elsewhere" / f"panoptic_{SPLIT}")}
    dataset = read_coco(CocoLayout.find(str(folder), SPLIT, **named))
    pack(dataset, str(folder.parent / "packed"), PackConfig(), in_process=True)
    (folder.parent / "linked").symlink_to(folder)
    read_coco(CocoLayout.find(str(folder.parent / "linked"), SPLIT, **named))


def test_files_that_are_links_to_another_folder_can_be_read(folder: Path) -> None:
    """The remedy of `file-outside` works: Hugging Face's cache, git-annex and DVC keep the content in such a folder."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in [*(folder / SPLIT).iterdir(), *(folder / "annotations" / f"panoptic_{SPLIT}").iterdir()]:
        target = path.rename(blobs / path.name)
        path.symlink_to(os.path.relpath(target, path.parent))
    require(run(use_data_set, str(folder), refusals=REFUSALS), "file-outside")
    named = {
        "images": str(folder / SPLIT),
        "annotations": str(json_file(folder)),
        "panoptic": str(folder / "annotations" / f"panoptic_{SPLIT}"),
    }
    require(run(partial(use_data_set, **named), str(folder.parent), refusals=REFUSALS), "no fault")


def test_a_corrected_input_is_no_other_input(folder: Path, tmp_path: Path) -> None:
    """Packing fails after pack.json is written and before a shard is; the corrected input is packed into the folder."""
    content, output = png_file(folder).read_bytes(), tmp_path / "packed"
    before = read_coco(CocoLayout.find(str(folder), SPLIT))
    png_file(folder).write_bytes(encoded(Image.new("RGB", (5, 7)), "PNG"))
    for _ in range(2):
        with pytest.raises(UserError, match="changed since it was checked: the PNG is 5 x 7"):
            pack(before, str(output), PackConfig(rows_per_shard=1), left_out=[11], in_process=True)
    assert (output / "pack.json").exists()
    (output / "shard-00007.parquet").write_bytes(b"of the larger pack that failed")
    png_file(folder).write_bytes(content)
    edit_json(folder, lambda document: document.update(corrected=True))
    report = pack(read_coco(CocoLayout.find(str(folder), SPLIT)), str(output), PackConfig(), in_process=True)
    assert report.manifest.num_images == 3
    assert sorted(path.name for path in output.iterdir()) == [
        "index.parquet", "manifest.json", "pack.json", "shard-00000.parquet",
    ]  # fmt: skip


CLASSES = {
    "aliases": "things: &a [train]\nstuff: *a\n",
    "a tag": "things: !!python/object/apply:os.system [true]\n",
    "lists nested 100,000 deep": "[" * 100_000,
    "a billion laughs": "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\n",
    "100,000 names": "drop: [" + "x," * 100_000 + "]",
    "2 MB": "#" * 2_000_000,
    "a terminal's commands": "things: {\"\\e[31m\\n\": train}\n",
    "a no-break space": "things: {big\u00a0train: train}\n",
    "a name of 201 characters": f"things: {{{'x' * 201}: train}}",
    "a name of no characters": "things: {'': train}\n",
    "not UTF-8": "things: {\ud800: }".encode("utf-8", "surrogatepass").decode("latin1"),
    "a name of 100,000 characters": f"things: {{{'x' * 100_000}: train}}",
    "a number as a section": "1e999: 5\n",
    "a key that is a list": "? [a, b]\n: c\n",
    "an unfinished text": "things: {\"a",
    "documents": "---\nthings: [train]\n---\ndrop: [car]\n",
}  # fmt: skip


def test_hostile_classes(original: Path, tmp_path: Path) -> None:
    calls = []
    for place, name in enumerate([*CLASSES, *NO_FILES]):
        folder = tmp_path / str(place)
        shutil.copytree(original, folder)
        if name in NO_FILES:
            NO_FILES[name](folder / "classes.yaml")
        calls.append((str(folder), CLASSES.get(name, "")))
    ends = ends_of("use_data_set_with_classes", calls, tmp_path)
    for name, outcome in zip([*CLASSES, *NO_FILES], ends, strict=True):
        require(outcome, "!", name)


PICTURES = {**OTHER_FORMATS, **BOMBS, **OTHER_BOMBS}


@pytest.mark.parametrize("function", ["use_picture", "use_image"])
@pytest.mark.parametrize("files", [OTHER_FORMATS, BOMBS, OTHER_BOMBS], ids=["other formats", "bombs", "other bombs"])
def test_hostile_pictures(tmp_path: Path, programs: Path, function: str, files: dict[str, Any]) -> None:
    """As the registered model and `predict.py` read them, and as packed images and maps are decoded."""
    ends = ends_of(function, [(make(),) for make in files.values()], tmp_path, programs)
    for name, outcome in zip(files, ends, strict=True):
        outcome.require_clean()
        assert "good" not in outcome.text or name in HARMLESS or files is BOMBS, (name, outcome)
        if function == "use_picture" and files is OTHER_FORMATS:
            assert "no picture of a known format" in outcome.text, (name, outcome)
    assert not (tmp_path / "started").exists()


def test_pictures_that_are_no_files(tmp_path: Path) -> None:
    """Named one by one, in a folder, and in a list; and lists that are no files."""
    calls = []
    for place, (name, make) in enumerate(NO_FILES.items()):
        folder = tmp_path / str(place)
        folder.mkdir()
        make(folder / "x.jpg")
        (folder / "list.txt").write_bytes(b"x.jpg\n")
        (folder / "good.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
        calls += [(name, str(folder), given) for given in ("x.jpg", "@list.txt", "@x.jpg", str(folder))]
    ends = ends_of("use_inputs", [(folder, given) for _, folder, given in calls], tmp_path)
    for (name, folder, given), outcome in zip(calls, ends, strict=True):
        outcome.require_clean()
        if given != folder and (name, given) != ("a folder", "x.jpg"):
            require(outcome, "!", f"{name} {given}")


VIDEOS = {
    "a playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "a list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "a description of a session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n",
    "a manifest of DASH": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    "a picture": encoded(Image.new("RGB", (64, 48)), "GIF"),
    "nothing": b"",
}


def test_hostile_videos(tmp_path: Path) -> None:
    for number, content in enumerate(VIDEOS.values()):
        (tmp_path / f"{number}.mp4").write_bytes(content)
    calls = [(str(tmp_path), f"{number}.mp4") for number in range(len(VIDEOS))]
    for name, outcome in zip(VIDEOS, ends_of("use_inputs", calls, tmp_path), strict=True):
        require(outcome, "!.mp4 cannot be decoded", name)


def test_names_in_a_list(tmp_path: Path) -> None:
    names = [
        b"a\0b.jpg",
        b"\xff\xfe.jpg",
        b"a" * 300,
        b"../../../etc/passwd",
        b"\x1b[31m.jpg",
        b"/dev/zero",
        b"~root/x",
    ]
    (tmp_path / "list.txt").write_bytes(b"\n".join(names))
    require(run(use_inputs, str(tmp_path), "@list.txt", refusals=REFUSALS), "!")


def test_a_secret_is_not_packed(folder: Path) -> None:
    """The figures of the attack: without the check of links, the file would be in the shard."""
    secret = encoded(Image.open(image_file(folder)), "JPEG", comment=SECRET)
    (folder.parent / "elsewhere" / "secret.jpg").write_bytes(secret)
    image_file(folder).unlink()
    image_file(folder).symlink_to(folder.parent / "elsewhere" / "secret.jpg")
    require(run(use_data_set, str(folder), refusals=REFUSALS), "file-outside")
    packed = [path.read_bytes() for path in (folder / "packed").iterdir()]
    assert packed
    assert not any(SECRET in content for content in packed)
    assert THING in {entry["id"] for entry in CATEGORIES}
