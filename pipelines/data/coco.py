"""COCO's panoptic format on disk (cocodataset.org/#format-data, 4): one JSON, and one PNG for each image.

Finds the files, reads the JSON and checks all that needs no pixels; no image is opened and nothing is written.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from maskformer.taxonomy import Taxonomy
from pipelines.errors import UserError
from pipelines.storage import Location, locate, sha256

_MAX_IMAGE_ID = 2**63 - 1  # packs have 64 bits for it, and random generators take no negative seed


@dataclass(frozen=True, kw_only=True)
class CocoLayout:
    """Locations of the files of one split of a data set."""

    split: str
    images: Location
    annotations: Location
    panoptic: Location

    @classmethod
    def find(
        cls,
        folder: str,
        split: str,
        images: str | None = None,
        annotations: str | None = None,
        panoptic: str | None = None,
    ) -> "CocoLayout":
        """Find the images, the annotation JSON and the panoptic PNGs of a split.

        Args:
            folder: the data set's folder.
            split: name of the split, such as train2017.
            images: folder of the images, `{split}/` by default.
            annotations: the panoptic JSON, `annotations/panoptic_{split}.json` by default.
            panoptic: folder of the PNGs, by default `annotations/panoptic_{split}/` or `panoptic_{split}/`.

        Raises:
            UserError: one of them does not exist.
        """
        root = locate(folder)
        if not root.is_dir():
            raise UserError(
                f"There is no folder {root}; give the data set's folder, which contains {split}/ and annotations/."
            )
        default = root / "annotations"
        file = locate(annotations) if annotations is not None else default / f"panoptic_{split}.json"
        if not file.exists() or file.is_dir():
            raise UserError(f"There is no annotation file {file}; check --split, or name the file with --annotations.")
        return cls(
            split=split,
            images=_folder(images, [root / split], "images", "--images"),
            annotations=file,
            panoptic=_folder(
                panoptic,
                [default / f"panoptic_{split}", root / f"panoptic_{split}"],
                "panoptic PNGs",
                "--panoptic",
            ),
        )


class Segment(TypedDict):
    """A segment as stored in packed rows."""

    id: int
    category_id: int
    iscrowd: bool


class AnnotatedSegment(Segment, total=False):
    """A segment as in the JSON. What is derived from the pixels is optional, and is checked but not used."""

    area: int
    bbox: list[float]


@dataclass(frozen=True)
class Record:
    """One annotated image. File names are relative to the layout's folders; sizes are in pixels."""

    image_id: int
    image_file: str
    panoptic_file: str
    height: int
    width: int
    segments: tuple[AnnotatedSegment, ...]


@dataclass(frozen=True)
class CocoDataset:
    """The content of the annotation JSON. Records are in ascending image id, and every file they name exists."""

    layout: CocoLayout
    taxonomy: Taxonomy
    records: tuple[Record, ...]
    annotations_sha256: str


def read_coco(layout: CocoLayout) -> CocoDataset:
    """Read the annotation JSON and check all that needs no pixels.

    Raises:
        UserError: it is not a COCO panoptic JSON, has no images, is inconsistent, or names a missing file.
    """
    try:
        content = layout.annotations.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {layout.annotations}: {error}. Make it readable and run this again.") from error
    document = _parse(content, layout.annotations)
    images, annotations = document["images"], document["annotations"]
    if not images:
        raise UserError(f"{layout.annotations} holds no images; give the annotations of another split.")
    try:
        taxonomy = Taxonomy.from_coco(document["categories"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{layout.annotations} has unusable categories. {error}") from error

    records = _join(
        _by_image(images, "id", "images", layout), _by_image(annotations, "image_id", "annotations", layout), layout
    )
    _require_categories(records, taxonomy, layout)
    _require_files(layout.images, {record.image_file: record.image_id for record in records}, "images", "--images")
    _require_files(layout.panoptic, {record.panoptic_file: record.image_id for record in records}, "PNGs", "--panoptic")
    return CocoDataset(layout, taxonomy, records, sha256(content))


def _folder(given: str | None, candidates: list[Location], what: str, flag: str) -> Location:
    if given is not None:
        candidates = [locate(given)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    for folder in candidates:
        parent, archive = folder.uri.removesuffix(f"/{folder.name}"), f"{folder.uri}.zip"
        if locate(archive).exists():
            raise UserError(
                f"There is no folder {folder}, but the {what} are in {archive}; unpack them with "
                f"`unzip -q {archive} -d {parent}` and run this again."
            )
    locations = " or ".join(map(str, candidates))
    raise UserError(f"There is no folder of {what} at {locations}; create it, or name the folder with {flag}.")


def _parse(content: bytes, file: Location) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            f"it may be truncated, so download or write it again."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a JSON text ({error.reason}); give a COCO panoptic JSON file.") from error
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(document, dict) or not isinstance(document.get(key), list)]
    if missing:
        found = sorted(document) if isinstance(document, dict) else f"a {type(document).__name__}"
        raise UserError(
            f"{file} is not a COCO panoptic JSON: it has no list {', '.join(missing)}, got {found}; "
            f"give a file such as panoptic_val2017.json."
        )
    annotations = document["annotations"]
    if annotations and isinstance(annotations[0], dict) and "segments_info" not in annotations[0]:
        kind = "instances (detection)" if "segmentation" in annotations[0] else "other"
        raise UserError(
            f"{file} has {kind} annotations, without segments_info; give the panoptic file of the same split, "
            f"such as panoptic_val2017.json, with --annotations."
        )
    return document


def _by_image(entries: list[Any], key: str, part: str, layout: CocoLayout) -> dict[int, dict[str, Any]]:
    where = f"{part} of {layout.annotations}"
    entry_of = {_value(entry, key, int, where): entry for entry in entries}
    outside = [image_id for image_id in entry_of if not 0 <= image_id <= _MAX_IMAGE_ID]
    if outside:
        raise UserError(
            f"The image id {outside[0]} in the {where} does not lie in 0..{_MAX_IMAGE_ID} ({len(outside)} such ids in "
            f"total); renumber the images."
        )
    if len(entry_of) < len(entries):
        repeated = [image_id for image_id, count in Counter(entry[key] for entry in entries).items() if count > 1]
        raise UserError(
            f"The image id {repeated[0]} occurs more than once in the {where} ({len(repeated)} such ids in total); "
            f"give each image a unique id and one annotation."
        )
    return entry_of


def _join(
    images: Mapping[int, dict[str, Any]], annotations: Mapping[int, dict[str, Any]], layout: CocoLayout
) -> tuple[Record, ...]:
    for image_id, entry in annotations.items():
        if image_id not in images:
            raise UserError(
                f"The annotation {entry.get('file_name')} of image {image_id} has no entry in the images of "
                f"{layout.annotations} ({len(annotations.keys() - images.keys())} such annotations in total); "
                f"add the image entries or remove the annotations."
            )
    for image_id, entry in images.items():
        if image_id not in annotations:
            raise UserError(
                f"The image {entry.get('file_name')}, id {image_id}, has no annotation in {layout.annotations} "
                f"({len(images.keys() - annotations.keys())} such images in total); add the annotations or remove the "
                f"image entries."
            )
    return tuple(_record(images[image_id], annotations[image_id], image_id, layout) for image_id in sorted(images))


def _record(image: dict[str, Any], annotation: dict[str, Any], image_id: int, layout: CocoLayout) -> Record:
    of_image = f"entry of image {image_id} in the images of {layout.annotations}"
    of_annotation = f"annotation of image {image_id} in {layout.annotations}"
    return Record(
        image_id=image_id,
        image_file=_value(image, "file_name", str, of_image),
        panoptic_file=_value(annotation, "file_name", str, of_annotation),
        height=_value(image, "height", int, of_image),
        width=_value(image, "width", int, of_image),
        segments=tuple(
            _segment(segment, f"segments_info in the {of_annotation}")
            for segment in _value(annotation, "segments_info", list, of_annotation)
        ),
    )


def _segment(entry: Any, where: str) -> AnnotatedSegment:
    segment = AnnotatedSegment(
        id=_value(entry, "id", int, where),
        category_id=_value(entry, "category_id", int, where),
        iscrowd=bool(_value(entry, "iscrowd", int, where)),
    )
    if "area" in entry:
        segment["area"] = entry["area"]
    if "bbox" in entry:
        segment["bbox"] = entry["bbox"]
    return segment


def _value(entry: Any, key: str, kind: type[Any], where: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        got = json.dumps(entry)[:200]
        raise UserError(f"The {where} has no {key} of type {kind.__name__}, got {got}; add or correct it.")
    return entry[key]


def _require_categories(records: Sequence[Record], taxonomy: Taxonomy, layout: CocoLayout) -> None:
    unknown = [
        (record, segment) for record in records for segment in record.segments if segment["category_id"] not in taxonomy
    ]
    if unknown:
        record, segment = unknown[0]
        raise UserError(
            f"Segment {segment['id']} of {record.panoptic_file}, image {record.image_id}, has category "
            f"{segment['category_id']}, which is not among the categories of {layout.annotations} ({len(unknown)} such "
            f"segments in total); add the category or correct the segment."
        )


def _require_files(folder: Location, image_of: Mapping[str, int], what: str, flag: str) -> None:
    existing = set(folder.names())
    missing = [name for name in image_of if name not in existing]
    if missing:
        raise UserError(
            f"{folder / missing[0]}, for image {image_of[missing[0]]}, does not exist ({len(missing)} of "
            f"{len(image_of)} {what} are missing in total); add the files, or name their folder with {flag}."
        )
