"""The checks of one image: its file, its panoptic PNG and its entry in the JSON must agree.

Everything here is a function of one RECORD row and the two files.
"""

import posixpath
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from maskformer.image_files import MAX_PIXELS, OtherFormatError, TooLargeError, load_image, open_image
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped
from pipelines.data.files import FileOutsideError, NameOutsideError, read_file
from pipelines.data.findings import CODES, Finding
from pipelines.data.pixels import FORMATS, MAX_SEGMENTS, panoptic_ids, pixel_runs, png_depth
from pipelines.errors import StorageRefusedError, UserError
from pipelines.storage import Location, sha256

_EXTENSIONS = {"JPEG": (".jpg", ".jpeg", ".jpe"), "PNG": (".png",), "WEBP": (".webp",)}
_TEXTS = {  # how files begin that are no images
    b"<": "an HTML or XML text, perhaps the answer of a failed download",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
}
_MAX_IDS = 2 * MAX_SEGMENTS
_MAX_FINDINGS = 1000
"""Findings of each code about one file, so that a file with millions of faults does not fill the memory."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Limits of the checks."""

    max_void_share: float = 0.5
    """Warn of images of which a larger share is void."""
    min_images_per_class: int = 0
    """Warn of classes that fewer images have, not counting crowds. 0: of none."""
    max_megapixels: float = MAX_PIXELS / 1e6
    """Refuse files that declare more pixels, in millions, before they are decoded."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_void_share <= 1:
            raise UserError(f"--max-void-share must lie in 0..1, got {self.max_void_share}; use 0.5.")
        if self.min_images_per_class < 0:
            raise UserError(f"--min-images-per-class must be at least 0, got {self.min_images_per_class}; 0 is off.")
        most = MAX_PIXELS / 1e6
        if not 0 < self.max_megapixels <= most:
            raise UserError(
                f"--max-megapixels must be above 0 and at most {most:g}, got {self.max_megapixels:g}; larger images "
                f"are not decoded anywhere in this program."
            )


@dataclass(frozen=True)
class Checked:
    """What the files of one image are like."""

    sha256: str = ""
    """Of the image file's bytes; empty if it cannot be read."""
    bytes: int = 0
    """Length of the image file."""
    findings: list[Finding] = field(default_factory=list)


def check_record(
    record: Mapping[str, Any],
    images: Location,
    panoptic: Location,
    taxonomy: Taxonomy,
    config: CheckConfig,
    roots: tuple[str, ...],
) -> Checked:
    """Return all findings about one image. A file that is missing or unreadable is a finding.

    Args:
        record: a row of RECORD.
        images: folder of the images.
        panoptic: folder of the PNGs.
        roots: folders in which the files must really be, see `CocoLayout.roots`.

    Raises:
        StorageUnavailableError: the storage does not answer.
    """
    size = (record["width"], record["height"])
    image = _File(images, record["image_file"], record["image_id"], "image", roots)
    png = _File(panoptic, record["panoptic_file"], record["image_id"], "png", roots)
    content = image.read()
    digest = sha256(content) if content is not None else ""
    if content is not None:
        _check_image(image, content, size, config)
    _check_listed(png, record["segments"], taxonomy)
    if (map_content := png.read()) is not None:
        ids = _check_png(png, map_content, size, config)
        if ids is not None:
            _check_pixels(png, ids, record["segments"], taxonomy, config)
    return Checked(digest, len(content or b""), [*image.findings, *png.findings])


class _File:
    """A file of an image, and the findings about it."""

    def __init__(self, folder: Location, name: str, image_id: int, kind: str, roots: tuple[str, ...]) -> None:
        self.name, self.folder, self._kind, self._roots = name, folder, kind, roots
        self._at = partial(Finding, file=str(folder / name), image_id=image_id)
        self._count: Counter[str] = Counter()
        self.findings: list[Finding] = []

    def add(self, code: str, what: str, segment_id: int | None = None) -> None:
        """Add a finding; "-size" stands for "image-size" or "png-size"."""
        code = f"{self._kind}{code}" if code.startswith("-") else code
        self._count[code] += 1
        if self._count[code] <= _MAX_FINDINGS:
            self.findings.append(self._at(code=code, segment_id=segment_id, what=what))

    def read(self) -> bytes | None:
        """Return the bytes of the file, or None and a finding."""
        try:
            return read_file(self.folder, self.name, self._roots)
        except NameOutsideError:
            self.add("name-outside", f"the file name {self.name!r} leaves the folder")
        except FileOutsideError:
            self.add("file-outside", "a link leads out of the data set's folders")
        except FileNotFoundError:
            self.add("-missing", "the file does not exist")
        except (StorageRefusedError, OSError) as error:
            self.add("-unreadable", f"it cannot be read ({_one_line(error)})")
        return None

    def open(self, content: bytes, formats: tuple[str, ...], config: CheckConfig) -> Image.Image | None:
        """Read the header; return None and a finding if that fails or it declares too many pixels."""
        try:
            return open_image(content, formats, int(config.max_megapixels * 1e6))
        except TooLargeError as error:
            self.add("too-large", f"the file {error}")
        except OtherFormatError as error:
            text = next((kind for start, kind in _TEXTS.items() if content.startswith(start)), "")
            if not content:
                self.add("-unreadable", "the file is empty")
            elif text or (error.kind and error.kind not in formats):
                self.add("-format", f"it is {text or _article(error.kind)}")
            else:
                self.add("-unreadable", f"its header is not that of {' or '.join(map(_article, formats))}")
        except ValueError as error:
            self.add("-unreadable", f"its header cannot be read ({_one_line(error)})")
        return None

    def load(self, image: Image.Image, content: bytes) -> bool:
        """Decode the pixels; return False and a finding if that fails."""
        if image.format == "PNG" and b"IEND" not in content:  # Pillow is content if the pixels are there
            self.add("-truncated", "its last chunk, IEND, is missing")
            return False
        try:
            load_image(image)
        except ValueError as error:
            self.add("-truncated", f"it cannot be decoded ({error})")
            return False
        return True


def _check_image(file: _File, content: bytes, size: tuple[int, int], config: CheckConfig) -> None:
    image = file.open(content, FORMATS, config)
    if image is None:
        return
    if image.size != size:
        (width, height), (listed_width, listed_height) = image.size, size
        what = f"the image is {width} x {height}, but {listed_width} x {listed_height} in the JSON"
        file.add("-size", what)
    # A JPEG with several pictures, as some phones write it, is a JPEG too.
    kind = "JPEG" if image.format == "MPO" else image.format or ""
    extension = posixpath.splitext(file.name)[1].lower()
    if extension not in _EXTENSIONS[kind]:
        file.add("-extension", f"it is {_article(kind)}, and its name ends in {extension!r}")
    mode = image.mode
    if mode.startswith(("I", "F")) or (kind == "PNG" and png_depth(image) == 16):
        file.add("-16-bit", "it has 16 bits per channel")
    elif mode == "CMYK":
        file.add("-cmyk", "it is CMYK")
    elif mode in ("P", "PA"):
        file.add("-palette", "it has a palette")
    elif mode in ("RGBA", "LA") or "transparency" in image.info:
        file.add("-alpha", "it has an alpha channel")
    elif mode in ("1", "L"):
        file.add("-gray", "it is gray")
    with suppress(Exception):  # a damaged JPEG, which loading explains
        image.draft("L", (1, 1))  # a JPEG is then read to its end without computing its colors, in a third of the time
    if file.load(image, content):
        orientation = None
        with suppress(Exception):  # damaged EXIF, which nothing reads, makes Pillow raise errors of many kinds
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        if orientation in range(2, 9):
            file.add("-orientation", f"its EXIF orientation is {orientation}")


def _check_listed(file: _File, segments: list[dict[str, Any]], taxonomy: Taxonomy) -> None:
    """Check the segments of the JSON, without pixels."""
    for identifier, count in Counter(s["id"] for s in segments if s["id"] is not None).items():
        if count > 1:
            file.add("segment-id-repeated", f"the JSON lists the segment {count} times", identifier)
    stuff: Counter[int] = Counter()
    num_things = 0
    for segment in segments:
        category = segment["category_id"]
        if category is None:
            continue
        if category not in taxonomy:
            what = f"the category {category} of the segment is not among the categories"
            file.add("category-unknown", what, segment["id"])
        elif taxonomy.is_thing(taxonomy.class_index(category)):
            num_things += not segment["iscrowd"]
        elif segment["iscrowd"]:
            file.add("crowd-stuff", "a stuff segment is marked as a crowd", segment["id"])
        else:
            stuff[category] += 1
    for category, count in stuff.items():
        if count > 1:
            name = taxonomy.names[taxonomy.class_index(category)]
            file.add("stuff-repeated", f"the image has {count} segments of the stuff class {name!r}")
    numbered = num_things + len(stuff)  # what `index_map` numbers
    if numbered > MAX_SEGMENTS:
        what = f"the image has {numbered} segments to train on, but an index map can number {MAX_SEGMENTS}"
        file.add("segments-too-many", what)


def _check_png(file: _File, content: bytes, size: tuple[int, int], config: CheckConfig) -> npt.NDArray[np.int32] | None:
    """Return the segment ids [H, W]; None if they are not usable."""
    image = file.open(content, ("PNG",), config)
    if image is None:
        return None
    depth = png_depth(image)
    if image.mode != "RGB" or depth != 8:
        file.add("-format", f"it is a PNG of mode {image.mode} with {depth} bits per channel")
        return None
    if image.size != size:
        what = f"the PNG is {image.width} x {image.height}, but the image {size[0]} x {size[1]} in the JSON"
        file.add("-size", what)
        return None
    return panoptic_ids(image) if file.load(image, content) else None


def _check_pixels(
    file: _File,
    ids: npt.NDArray[np.int32],
    segments: list[dict[str, Any]],
    taxonomy: Taxonomy,
    config: CheckConfig,
) -> None:
    try:
        areas, boxes = _measure(ids)
    except ValueError as error:
        file.add("-too-fine", str(error))
        return
    listed = {segment["id"] for segment in segments}
    if None not in listed:  # otherwise the pixels may be those of a segment whose id is reported already
        for identifier in sorted(areas.keys() - listed - {0}):
            what = f"the PNG has {areas[identifier]} pixels of a segment that is not in the JSON"
            file.add("segment-unlisted", what, identifier)
    usable = False
    for segment in segments:
        identifier = segment["id"]
        if identifier is None:
            continue
        if identifier not in areas:
            file.add("segment-without-pixels", "the JSON lists a segment without pixels in the PNG", identifier)
            continue
        usable = usable or (not segment["iscrowd"] and segment["category_id"] in taxonomy)
        area, box = areas[identifier], boxes[identifier]
        if segment["area"] not in (None, area):
            file.add("area", f"the area is {segment['area']} pixels in the JSON, but {area} in the PNG", identifier)
        if segment["bbox"] not in (None, box):
            file.add("bbox", f"the bbox is {_numbers(segment['bbox'])} in the JSON, but {box} in the PNG", identifier)
    errors = any(CODES[finding.code].severity == "error" for finding in file.findings)
    if errors or any(segment[key] is None for segment in segments for key in ("id", "category_id", "iscrowd")):
        return  # what follows may be their consequence
    void = areas.get(0, 0) / ids.size
    if not usable:
        file.add("no-segment", f"the image has no segment to learn from ({void:.0%} void)")
    elif void > config.max_void_share:
        file.add("void-share", f"{void:.0%} of the image is void")


def _measure(ids: npt.NDArray[np.int32]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Return the area in pixels and the bounding box [x, y, width, height] of each id.

    Raises:
        ValueError: there are more runs or ids than in a map of segments.
    """
    values, which, runs = pixel_runs(ids)
    count = len(values)
    if count > _MAX_IDS:
        raise ValueError(f"it has {count:,} ids, more than {_MAX_IDS:,}, so it is no map of segments")
    left, top = np.full(count, ids.shape[1]), np.full(count, ids.shape[0])
    right, bottom, area = np.zeros(count, int), np.zeros(count, int), np.zeros(count, int)
    np.minimum.at(left, which, runs.x)
    np.minimum.at(top, which, runs.y)
    np.maximum.at(right, which, runs.x + runs.length)
    np.maximum.at(bottom, which, runs.y + 1)
    np.add.at(area, which, runs.length)
    boxes = np.stack([left, top, right - left, bottom - top], axis=1)
    return dict(zip(values.tolist(), area.tolist(), strict=True)), dict(
        zip(values.tolist(), boxes.tolist(), strict=True)
    )


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'AEI' else 'a'} {'WebP' if kind == 'WEBP' else kind}"


def _numbers(box: list[float]) -> list[float]:
    return [int(side) if side.is_integer() else side for side in box]


def _one_line(error: BaseException) -> str:
    return escaped(" ".join(str(error).split()).rstrip("."), 300)
