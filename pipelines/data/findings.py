"""Findings: what is wrong or worth knowing about a data set, each kind with a stable code.

An error is what training or evaluation cannot use or would get wrong. A warning is legal, but suspicious. A note is
legal and common.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from maskformer.untrusted import escaped

Severity = Literal["error", "warning", "note"]

MAX_EXAMPLES = 1000
"""Findings of each code that are kept. All are counted."""

MAX_SEGMENT_ID = 256**3 - 1
MAX_IMAGE_ID = 2**63 - 1  # packs have 64 bits for it, and random generators take no negative seed
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Code:
    """A kind of finding."""

    severity: Severity
    meaning: str
    remedy: str
    """What to do, in the imperative and without a full stop."""


CODES: dict[str, Code] = {
    # The annotation JSON: entries.
    "image-entry": Code(
        "error",
        "an entry of `images` lacks its id, file name or size, or one has another type",
        "add or correct the value",
    ),
    "annotation-entry": Code(
        "error",
        "an entry of `annotations` lacks its image id, file name or segments, or one has another type",
        "add or correct the value",
    ),
    "segment-entry": Code(
        "error",
        "an entry of `segments_info` lacks its id, category or iscrowd, or one has another type",
        "add or correct the value",
    ),
    "image-id-range": Code("error", "an image id is negative or needs more than 63 bits", "renumber the images"),
    "image-id-repeated": Code("error", "several images have one id", "give each image an id of its own"),
    "annotation-repeated": Code("error", "an image has several annotations", "keep one annotation per image"),
    "image-file-repeated": Code(
        "error", "several images name one image file", "give each image its own file, or remove one entry"
    ),
    "png-file-repeated": Code(
        "error", "several annotations name one PNG", "give each annotation its own PNG, or remove one entry"
    ),
    "image-without-annotation": Code(
        "error", "an image has no annotation", "add the annotation, or remove the image's entry"
    ),
    "annotation-without-image": Code(
        "error", "an annotation's image is not listed", "add the image's entry, or remove the annotation"
    ),
    # Categories.
    "category-entry": Code(
        "error",
        "a category has no integer id in 0..2147483647, no name of 1 to 200 printable characters, or a color that is "
        "none",
        "add or correct the value",
    ),
    "category-isthing": Code(
        "error",
        "a category does not say whether it is a thing; those of a detection file do not",
        "set isthing to 1 for things and to 0 for stuff",
    ),
    "category-id-repeated": Code("error", "several categories have one id", "give each category an id of its own"),
    "category-name-repeated": Code("error", "several categories have one name", "rename or merge them"),
    "category-unknown": Code(
        "error", "a segment's category is not among the categories", "add the category, or correct the segment"
    ),
    "class-rare": Code(
        "warning", "few images have a class; --min-images-per-class", "add images, or merge or drop the class"
    ),
    # Segments.
    "segment-id-range": Code(
        "error", "a segment's id is not in 1..16777215; 0 is void", "renumber the segment in JSON and PNG"
    ),
    "segment-id-repeated": Code("error", "several segments of an image have one id", "give each an id of its own"),
    "segment-unlisted": Code(
        "error", "the PNG has an id that the JSON does not list", "add the segment to the JSON, or set its pixels to 0"
    ),
    "segment-without-pixels": Code(
        "error", "the JSON lists a segment that the PNG does not have", "remove it from the JSON, or add its pixels"
    ),
    "segments-too-many": Code(
        "error", "more segments than an index map can number", "merge some, or cut the image into parts"
    ),
    "stuff-repeated": Code(
        "warning", "several segments of an image are of one stuff class", "merge them: training does, PQ does not"
    ),
    "crowd-stuff": Code(
        "warning", "a stuff segment is marked as a crowd, so it is not trained on", "set iscrowd to 0 if it should be"
    ),
    "area": Code("warning", "a segment's area differs from its pixels", "correct the JSON"),
    "bbox": Code("warning", "a segment's box differs from its pixels", "correct the JSON"),
    "no-segment": Code(
        "warning", "all is void or crowd, so there is nothing to learn", "annotate the image, or remove it"
    ),
    "void-share": Code(
        "warning", "a large part of the image is void; --max-void-share", "check whether its annotation is complete"
    ),
    # Files.
    "name-outside": Code(
        "error", "a file name is absolute, has a drive or leaves the folder with ..", "use a path below the folder"
    ),
    "file-outside": Code(
        "error",
        "a link leads to a file outside of the data set's folders",
        "copy the file, or name the folder where it really is with --images or --panoptic; if each file is a link, "
        "give the folder above links and files with --input, and --images, --annotations and --panoptic",
    ),
    "too-large": Code(
        "error",
        "the file has more bytes, or declares more pixels, than are read; --max-megapixels",
        "make it smaller, or raise --max-megapixels up to 52",
    ),
    "image-missing": Code("error", "an image file does not exist", "add the file, or remove the image from the JSON"),
    "image-unreadable": Code(
        "error", "an image file cannot be opened", "replace the file, or remove the image from the JSON"
    ),
    "image-truncated": Code(
        "error",
        "an image's header is readable, its pixels are not",
        "replace the file, or remove the image from the JSON",
    ),
    "image-format": Code("error", "an image is neither JPEG, PNG nor WebP", "convert it to JPEG or PNG"),
    "image-extension": Code(
        "warning", "an image is of another format than its name says", "rename the file, in the JSON too"
    ),
    "image-size": Code(
        "error", "image and JSON differ in size", "correct the JSON, or restore the image that was annotated"
    ),
    "image-16-bit": Code("error", "an image has 16 bits per channel", "convert it to 8 bits per channel"),
    "image-cmyk": Code("warning", "an image is CMYK; colors change when it is read as RGB", "convert it to RGB"),
    "image-palette": Code("warning", "an image has a palette; it is read as RGB", "check that it is no label map"),
    "image-alpha": Code("warning", "an image has an alpha channel, which is dropped", "convert it to RGB"),
    "image-gray": Code("note", "an image is gray; it is read as RGB with equal channels", "nothing need be done"),
    "image-orientation": Code(
        "warning",
        "EXIF asks to rotate or mirror an image, which is not done",
        "check that the PNG fits the stored pixels",
    ),
    "image-repeated": Code("warning", "two image files have the same bytes", "remove one of them"),
    "image-in-other-split": Code(
        "error", "an image is also in the other split; --other-split", "remove it from one of the splits"
    ),
    "png-missing": Code("error", "a panoptic PNG does not exist", "add the file, or remove the image from the JSON"),
    "png-unreadable": Code(
        "error", "a panoptic PNG cannot be opened", "replace the file, or remove the image from the JSON"
    ),
    "png-truncated": Code(
        "error",
        "a panoptic PNG's header is readable, its pixels are not",
        "replace the file, or remove the image from the JSON",
    ),
    "png-format": Code(
        "error",
        "a panoptic map is no PNG with three 8-bit channels",
        "write it as an RGB PNG, id = R + 256 G + 65536 B",
    ),
    "png-too-fine": Code(
        "error",
        "a panoptic map has far more runs of equal ids, or far more ids, than a map of segments",
        "write it without smoothing and without lossy compression",
    ),
    "png-size": Code("error", "PNG and JSON differ in size", "regenerate the PNG at the size of the image"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding about a data set."""

    code: str
    """Key of CODES."""
    file: str
    image_id: int | None = None
    segment_id: int | None = None
    what: str
    """What is wrong, without a full stop."""

    @property
    def severity(self) -> Severity:
        return CODES[self.code].severity

    @property
    def message(self) -> str:
        """What is wrong and what to do, in one sentence."""
        return f"{self.what}; {CODES[self.code].remedy}."

    def __str__(self) -> str:
        image = "" if self.image_id is None else f"image {self.image_id}"
        segment = "" if self.segment_id is None else f"segment {self.segment_id}"
        where = ", ".join(filter(None, (image, segment)))
        return escaped(f"{self.file}{f' ({where})' if where else ''}: {self.message} [{self.code}]")


@dataclass
class Findings:
    """Counts the findings of a data set and keeps the first of each code, so that memory is bounded."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    images: set[int] = field(default_factory=set)
    """Ids of all images with an error."""

    def add(self, code: str, **values: Any) -> None:
        """Add a finding; `values` are the fields of `Finding` other than its code."""
        self.extend([Finding(code=code, **values)])

    def extend(self, found: Iterable[Finding]) -> None:
        """Add findings in the order in which they are to be reported."""
        for finding in found:
            self.counts[finding.code] += 1
            kept = self.examples.setdefault(finding.code, [])
            if len(kept) < MAX_EXAMPLES:
                kept.append(finding)
            if finding.severity == "error" and finding.image_id is not None:
                self.images.add(finding.image_id)

    def copy(self) -> "Findings":
        """Return findings to which others can be added."""
        examples = {code: list(kept) for code, kept in self.examples.items()}
        return Findings(Counter(self.counts), examples, set(self.images))

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(count for code, count in self.counts.items() if CODES[code].severity == severity)

    def codes(self) -> list[str]:
        """Return the codes that occurred, errors first, in the order of CODES."""
        order = ("error", "warning", "note")
        return sorted((code for code in CODES if code in self.counts), key=lambda c: order.index(CODES[c].severity))

    @property
    def of_whole_set(self) -> list[str]:
        """The codes of errors that leaving out images does not remove."""
        return [code for code in self.codes() if code.startswith("category-") and code != "category-unknown"]
