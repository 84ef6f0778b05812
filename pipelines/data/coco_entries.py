"""The entries of a COCO panoptic JSON: the type of each value is checked, and what is usable becomes a row.

A row has null where a value is missing or has another type, so that its image is still checked for other faults.
"""

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

from maskformer.taxonomy import MAX_NAME, Category, Taxonomy, is_name
from pipelines.data.findings import MAX_IMAGE_ID, MAX_INT32, MAX_SEGMENT_ID, Findings
from pipelines.errors import UserError

MAX_LISTED_SEGMENTS = 2**17
"""Segments that an annotation may list, twice as many as an index map can number. More are not read."""

MAX_CATEGORIES = 10_000

_INT64 = range(-(2**63), 2**63)
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes of a file's name and of a path, on Linux

Report = Callable[..., None]
"""`Findings.add` with the file, and possibly the code and the image, given."""


def image_row(entry: Any, number: int, report: Report) -> dict[str, Any] | None:
    """Return image id, file name and size of an entry of `images`; None if it has no usable id.

    Args:
        number: of the entry, from 0 on, for messages.
        report: called with each finding.
    """
    image_id = _image_id(entry, "id", f"entry {number} of images", "image-entry", report)
    if image_id is None:
        return None
    report = partial(report, image_id=image_id)
    row = {
        "image_id": image_id,
        "image_file": _file_name(entry, f"entry {number} of images", "image-entry", report),
        "height": None,
        "width": None,
    }
    for side in ("height", "width"):
        value = entry.get(side)
        if _is_int(value) and 1 <= value <= MAX_INT32:
            row[side] = value
        else:
            what = f"entry {number} of images has no {side} of type int in 1..{MAX_INT32}, got {_short(entry)}"
            report("image-entry", what=what)
    return row


def annotation_row(entry: Any, number: int, report: Report) -> dict[str, Any] | None:
    """Return image id, file name and segments of an entry of `annotations`; None if it has no usable id.

    Args:
        number: of the entry, from 0 on, for messages.
        report: called with each finding.
    """
    name = f"entry {number} of annotations"
    image_id = _image_id(entry, "image_id", name, "annotation-entry", report)
    if image_id is None:
        return None
    report = partial(report, image_id=image_id)
    row: dict[str, Any] = {
        "image_id": image_id,
        "panoptic_file": _file_name(entry, name, "annotation-entry", report),
        "segments": None,
    }
    segments = entry.get("segments_info")
    if isinstance(segments, list) and len(segments) > MAX_LISTED_SEGMENTS:
        what = f"{name} lists {len(segments):,} segments, of which at most {MAX_LISTED_SEGMENTS:,} are read"
        report("segments-too-many", what=what)
    elif isinstance(segments, list):
        row["segments"] = [_segment_row(segment, report) for segment in segments]
    else:
        report("annotation-entry", what=f"{name} has no segments_info of type list, got {_short(entry)}")
    return row


def _segment_row(entry: Any, report: Report) -> dict[str, Any]:
    row: dict[str, Any] = {"id": None, "category_id": None, "iscrowd": None, "area": None, "bbox": None}
    if not isinstance(entry, dict):
        report("segment-entry", what=f"an entry of segments_info is no object, got {_short(entry)}")
        return row
    get = entry.get
    identifier, category, crowd, area, bbox = get("id"), get("category_id"), get("iscrowd"), get("area"), get("bbox")
    segment_id = identifier if _is_int(identifier) else None
    if segment_id is None:
        report("segment-entry", what=f"a segment has no id of type int, got {_short(entry)}")
    elif 1 <= segment_id <= MAX_SEGMENT_ID:
        row["id"] = segment_id
    else:
        void = " (void)" if segment_id == 0 else ""
        what = f"the segment id {_digits(segment_id)}{void} does not lie in 1..{MAX_SEGMENT_ID}"
        segment_id = segment_id if segment_id in _INT64 else None
        report("segment-id-range", segment_id=segment_id, what=what)
    if not _is_int(category):
        what = f"the segment has no category_id of type int, got {_short(entry)}"
        report("segment-entry", segment_id=segment_id, what=what)
    elif category not in _INT64:
        what = f"the category {_digits(category)} of the segment is not among the categories"
        report("category-unknown", segment_id=segment_id, what=what)
    else:
        row["category_id"] = category
    if isinstance(crowd, int) and crowd in (0, 1):
        row["iscrowd"] = bool(crowd)
    else:
        what = f"the segment has no iscrowd of 0 or 1, got {_short(entry)}"
        report("segment-entry", segment_id=segment_id, what=what)
    if area is not None:
        row["area"] = _whole(area)
        if row["area"] is None:
            report("area", segment_id=segment_id, what=f"the area is {_short(area)}, not a number of pixels")
    if bbox is not None:
        if _is_box(bbox):
            row["bbox"] = bbox
        else:
            what = f"the bbox is {_short(bbox)}, not a list x, y, width, height"
            report("bbox", segment_id=segment_id, what=what)
    return row


def category_entry(entry: Any) -> Any:
    """Return what is used of an entry of `categories`, so that the rest of it takes no memory."""
    if not isinstance(entry, dict):
        return _pruned(entry, 1, 4)
    used = ("id", "name", "isthing", "color", "supercategory")
    return {key: _pruned(entry[key], 1, 4) for key in used if key in entry}


def read_categories(entries: list[Any], file: str, findings: Findings) -> Taxonomy:
    """Return the usable categories. Without a finding they are all categories, as they are.

    Otherwise the taxonomy serves to check the rest only: what is not known to be stuff is taken for a thing.

    Raises:
        UserError: none of them is usable.
    """
    report = partial(findings.add, file=file)
    found: dict[int, Category] = {}
    given = {entry["name"] for entry in entries if isinstance(entry, dict) and _is_text(entry.get("name"))}
    names: set[str] = set()
    for number, entry in enumerate(entries):
        identifier = entry.get("id") if isinstance(entry, dict) else None
        if not _is_int(identifier) or not 0 <= identifier <= MAX_INT32:
            what = f"entry {number} of categories has no id of type int in 0..{MAX_INT32}, got {_short(entry)}"
            report("category-entry", what=what)
            continue
        if identifier in found:
            report("category-id-repeated", what=f"the category id {identifier} occurs more than once")
            continue
        name, isthing = entry.get("name"), entry.get("isthing")
        if not _is_text(name):
            report("category-entry", what=f"category {identifier} has no name of type str, got {_short(entry)}")
            name = _other_name(identifier, given)
        elif not is_name(name):
            what = f"category {identifier} has no name of 1 to {MAX_NAME} printable characters, got {_short(entry)}"
            report("category-entry", what=what)
            name = _other_name(identifier, given)
        elif name in names:
            report("category-name-repeated", what=f"the category name {name!r} occurs more than once")
            name = _other_name(identifier, given)
        if not isinstance(isthing, int) or isthing not in (0, 1):
            what = f"category {identifier}, {name!r}, has no isthing of 0 or 1, got {_short(entry)}"
            report("category-isthing", what=what)
            isthing = 1
        usable = {"id": identifier, "name": name, "isthing": isthing}
        try:
            (category,) = Taxonomy.from_coco([{**usable, "color": entry.get("color")}]).categories
        except ValueError:
            what = f"the color of category {identifier}, {name!r}, is not three integers in 0..255, got {_short(entry)}"
            report("category-entry", what=what)
            (category,) = Taxonomy.from_coco([usable]).categories
        found[identifier] = category
        names.add(name)
    if not found:
        raise UserError(f"{file} has no usable category, got {_short(entries)}; give id, name and isthing of each.")
    return Taxonomy(tuple(sorted(found.values(), key=lambda category: (not category.isthing, category.id))))


def _other_name(identifier: int, names: set[str]) -> str:
    """Return a name for a category that is none of `names`; it differs for each identifier."""
    name, number = f"category {identifier}", 1
    while name in names:
        number += 1
        name = f"category {identifier} ({number})"
    return name


def _image_id(entry: Any, key: str, name: str, code: str, report: Report) -> int | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not _is_int(value):
        report(code, what=f"{name} has no {key} of type int, got {_short(entry)}")
    elif not 0 <= value <= MAX_IMAGE_ID:
        known = value if value in _INT64 else None
        report(
            "image-id-range", image_id=known, what=f"the image id {_digits(value)} does not lie in 0..{MAX_IMAGE_ID}"
        )
    else:
        return value
    return None


def _file_name(entry: dict[str, Any], name: str, code: str, report: Report) -> str | None:
    value = entry.get("file_name")
    if _is_text(value) and "\0" not in value:
        if len(path := value.encode()) <= _LONGEST_PATH and all(
            len(part) <= _LONGEST_NAME for part in path.split(b"/")
        ):
            return value
        report(code, what=f"{name} has a file_name that is too long for a file, got {_short(entry)}")
        return None
    report(code, what=f"{name} has no file_name of type str, got {_short(entry)}")
    return None


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> TypeGuard[str]:
    """Return whether `value` is a text that is not empty and can be written as UTF-8."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can express
        return False
    return True


def _whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if _is_int(value) and value in _INT64 else None


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    for side in value:  # noqa: SIM110  (half the time of `all`; NaN fails the comparison)
        if type(side) not in (int, float) or not abs(side) < 2**53:
            return False
    return True


def _digits(value: int) -> str:
    return str(value) if abs(value) < 10**30 else f"{str(value)[:30]}..."


def _short(value: Any) -> str:
    return json.dumps(_pruned(value, 6))[:200]


def _pruned(value: Any, depth: int, most: int = 20) -> Any:
    """Return the beginning of a value that may be huge: `most` items of each list and object, to this depth."""
    match value:
        case str():
            return value[: MAX_NAME + 1]  # a name that is too long stays too long
        case list():
            return [_pruned(each, depth - 1, most) for each in value[:most]] if depth else []
        case dict():
            some = itertools.islice(value.items(), most)
            return {key[:200]: _pruned(each, depth - 1, most) for key, each in some} if depth else {}
        case _:
            return value
