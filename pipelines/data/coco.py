"""COCO's panoptic format on disk (cocodataset.org/#format-data, 4): one JSON, and one PNG for each image.

Finds the files and reads the JSON. No image is opened and nothing is written.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped
from pipelines.data.classes import ClassMap
from pipelines.data.coco_entries import (
    MAX_CATEGORIES,
    Report,
    annotation_row,
    category_entry,
    image_row,
    read_categories,
)
from pipelines.data.files import is_inside, is_name_inside, resolved
from pipelines.data.findings import Findings
from pipelines.data.json_stream import JsonLists
from pipelines.data.schema import RECORD
from pipelines.errors import UserError
from pipelines.storage import Location, locate

_IMAGE = pa.schema([RECORD.field(name) for name in ("image_id", "image_file", "height", "width")])
_ANNOTATION = pa.schema([RECORD.field(name) for name in ("image_id", "panoptic_file", "segments")])
_ROWS_PER_BATCH, _SEGMENTS_PER_BATCH = 1024, 2**17
_FILES_TO_LOOK_FOR = 16


@dataclass(frozen=True, kw_only=True)
class CocoLayout:
    """Locations of the files of one split of a data set."""

    split: str
    images: Location
    annotations: Location
    panoptic: Location
    roots: tuple[str, ...]
    """Folders in which images and PNGs must really be: the data set's and those of the images and PNGs, all without
    links."""

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
            UserError: one of them does not exist, or a link leads out of the folder to one that is not named.
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
        image_folder = _folder(images, [root / split], "images", "--images")
        png_folder = _folder(
            panoptic, [default / f"panoptic_{split}", root / f"panoptic_{split}"], "panoptic PNGs", "--panoptic"
        )
        for given, found, flag in (
            (images, image_folder, "--images"),
            (annotations, file, "--annotations"),
            (panoptic, png_folder, "--panoptic"),
        ):
            if given is None and not is_inside(real := resolved(found), (resolved(root),)):
                raise UserError(
                    f"{escaped(found)} is a link that leads out of the data set's folder, to {escaped(real)}. If that "
                    f"is what you want to read, add {flag} {escaped(real)}."
                )
        return cls(
            split=split,
            images=image_folder,
            annotations=file,
            panoptic=png_folder,
            roots=tuple(resolved(folder) for folder in (root, image_folder, png_folder)),
        )


class Segment(TypedDict):
    """A segment as in packed rows."""

    id: int
    category_id: int
    iscrowd: bool


@dataclass(frozen=True, kw_only=True)
class CocoDataset:
    """The content of the annotation JSON."""

    layout: CocoLayout
    taxonomy: Taxonomy
    """The categories of the JSON."""
    classes: ClassMap
    """The classes to train on."""
    records: pa.Table
    """RECORD: images with one annotation, in ascending image id. Their files need not exist."""
    annotations_sha256: str
    findings: Findings
    """What is wrong with the JSON by itself."""

    def without(self, image_ids: Iterable[int]) -> "CocoDataset":
        """Return the data set without the records of some images."""
        left_out = np.array(list(image_ids), np.int64)
        return replace(self, records=self.records.filter(~np.isin(self.records["image_id"].to_numpy(), left_out)))


def read_coco(layout: CocoLayout, classes: Location | None = None) -> CocoDataset:
    """Read the annotation JSON entry by entry, and check all that needs no other file.

    Args:
        classes: a YAML file that changes the classes, see `ClassMap`.

    Raises:
        UserError: it is not a COCO panoptic JSON, or has no images, or no category is usable, or no image file exists,
            or the classes cannot be changed as the file says.
    """
    findings = Findings()
    report = partial(findings.add, file=str(layout.annotations))
    document = JsonLists(layout.annotations)
    images, annotations = _Rows(_IMAGE), _Rows(_ANNOTATION)
    categories: list[Any] = []
    for part, number, entry in document:
        if part == "images":
            images.append(image_row(entry, number, report))
        elif part == "annotations":
            if number == 0:
                _refuse_other_kinds(entry, layout)
            annotations.append(annotation_row(entry, number, report))
        elif part == "categories":
            if number == MAX_CATEGORIES:
                raise UserError(
                    f"{escaped(layout.annotations)} has more than {MAX_CATEGORIES:,} categories; merge or remove some."
                )
            categories.append(category_entry(entry))
    _require_lists(document, layout)
    class_map = _changed_classes(classes, categories) if classes is not None else None
    taxonomy = read_categories(categories, str(layout.annotations), findings)
    if class_map is None:
        class_map = ClassMap.from_coco(taxonomy.to_coco())
    # Rows with a null are joined too, so that their partner does not count as alone.
    records = _join(
        _one_each(images.table(), "image-id-repeated", "entries in images", report),
        _one_each(annotations.table(), "annotation-repeated", "annotations", report),
        report,
    )
    if not len(records):
        first = next(iter(findings.examples.values()))[0]
        raise UserError(f"No image of {layout.annotations} can be used. First: {first}")
    _find_repeated_files(records, "image_file", "image-file-repeated", layout.images, findings)
    _find_repeated_files(records, "panoptic_file", "png-file-repeated", layout.panoptic, findings)
    _require_files(layout.images, records["image_file"], "images", "--images")
    _require_files(layout.panoptic, records["panoptic_file"], "PNGs", "--panoptic")
    return CocoDataset(
        layout=layout,
        taxonomy=taxonomy,
        classes=class_map,
        records=records,
        annotations_sha256=document.sha256,
        findings=findings,
    )


def _changed_classes(file: Location, categories: list[Any]) -> ClassMap | None:
    """Return the map, and add what it says to categories without `isthing`; None if the categories are unusable."""
    try:
        Taxonomy.from_coco([{"isthing": 0, **entry} for entry in categories])
    except (TypeError, ValueError):
        return None  # reading the categories one by one says why
    classes = ClassMap.read(file, categories)
    for number, entry in enumerate(categories):
        category = classes.category_of[entry["id"]]
        isthing = category is None or classes.taxonomy.is_thing(classes.taxonomy.class_index(category))
        categories[number] = {"isthing": int(isthing), **entry}
    return classes


class _Rows:
    """Rows of a table, held as Arrow columns: a tenth of the memory of Python objects."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[dict[str, Any]] = []
        self._segments = 0

    def append(self, row: dict[str, Any] | None) -> None:
        if row is not None:
            self._rows.append(row)
            self._segments += len(row.get("segments") or ())
        if len(self._rows) == _ROWS_PER_BATCH or self._segments >= _SEGMENTS_PER_BATCH:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self._batches, self._schema)

    def _flush(self) -> None:
        self._batches.append(pa.RecordBatch.from_pylist(self._rows, self._schema))
        self._rows, self._segments = [], 0


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


def _refuse_other_kinds(annotation: Any, layout: CocoLayout) -> None:
    for key, kind in (("segmentation", "instances (detection)"), ("caption", "captions")):
        if isinstance(annotation, dict) and "segments_info" not in annotation and key in annotation:
            raise UserError(
                f"{layout.annotations} has {kind} annotations, without segments_info; give the panoptic file of the "
                f"same split, such as panoptic_val2017.json, with --annotations."
            )


def _require_lists(document: JsonLists, layout: CocoLayout) -> None:
    missing = [key for key in ("images", "annotations", "categories") if key not in document.lists]
    if missing:
        keys = sorted([*document.lists, *document.others])
        found = escaped(str(keys), 200) if document.kind == "dict" else f"a {document.kind}"
        raise UserError(
            f"{escaped(layout.annotations)} is not a COCO panoptic JSON: it has no list {', '.join(missing)}, got "
            f"{found}; give a file such as panoptic_val2017.json."
        )
    if not document.lists["images"]:
        raise UserError(f"{layout.annotations} holds no images; give the annotations of another split.")


def _one_each(table: pa.Table, code: str, what: str, report: Report) -> pa.Table:
    """Return the first row of each image, in ascending image id."""
    ids, first, counts = np.unique(table["image_id"].to_numpy(), return_index=True, return_counts=True)
    for image_id, count in zip(ids[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        report(code, image_id=image_id, what=f"the image id {image_id} has {count} {what}")
    in_order = len(first) == len(table) and bool(np.all(first == np.arange(len(table))))
    return table if in_order else table.take(first)


def _join(images: pa.Table, annotations: pa.Table, report: Report) -> pa.Table:
    listed, annotated = images["image_id"].to_numpy(), annotations["image_id"].to_numpy()
    both = np.intersect1d(listed, annotated, assume_unique=True)
    for table, ids, column, code, what in (
        (images, listed, "image_file", "image-without-annotation", "the image {!r}, id {}, has no annotation"),
        (
            annotations,
            annotated,
            "panoptic_file",
            "annotation-without-image",
            "the image of {!r}, id {}, is not listed",
        ),
    ):
        alone = np.flatnonzero(~np.isin(ids, both, assume_unique=True))
        for row in alone.tolist():
            image_id = int(ids[row])
            report(code, image_id=image_id, what=what.format(table[column][row].as_py(), image_id))
    images, annotations = _only(images, listed, both), _only(annotations, annotated, both)
    columns = [(images if name in images.column_names else annotations)[name] for name in RECORD.names]
    records = pa.table(columns, schema=RECORD)
    return records.drop_null() if any(column.null_count for column in columns) else records  # which copies


def _only(table: pa.Table, ids: np.ndarray, wanted: np.ndarray) -> pa.Table:
    return table if len(wanted) == len(ids) else table.filter(np.isin(ids, wanted, assume_unique=True))


def _find_repeated_files(records: pa.Table, column: str, code: str, folder: Location, findings: Findings) -> None:
    numbers = records[column].combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    first = first[which]  # for each row the first with the same file
    for row in np.flatnonzero(first != np.arange(len(records))).tolist():
        other = records["image_id"][int(first[row])].as_py()
        findings.add(
            code,
            file=str(folder / records[column][row].as_py()),
            image_id=records["image_id"][row].as_py(),
            what=f"the file also belongs to image {other}",
        )


def _require_files(folder: Location, names: pa.ChunkedArray, what: str, flag: str) -> None:
    """Look for a few of the files; if none exists, the folder is another one."""
    places = np.unique(np.linspace(0, len(names) - 1, _FILES_TO_LOOK_FOR, dtype=int)) if len(names) else []
    sought = [name for name in (names[int(place)].as_py() for place in places) if is_name_inside(name)]
    if sought and not any((folder / name).exists() for name in sought):
        raise UserError(
            f"{folder / escaped(sought[0])} does not exist, nor do {len(sought) - 1} others of the {len(names)} {what} "
            f"that were looked for; add the files, or name their folder with {flag}."
        )
