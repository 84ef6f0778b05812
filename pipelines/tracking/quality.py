"""`quality.json.gz`: how each image of an evaluation contributes to PQ, from which two evaluations are compared."""

import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskformer.panoptic_quality import ClassQuality
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import parse_json

FILE = "quality.json.gz"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Counts of an evaluation, image by image."""

    data_hash: str
    """Hash of the evaluated pack."""
    taxonomy: Taxonomy
    images: Mapping[int, Mapping[int, ClassQuality]]
    """By image id and category id, for the classes that are present or predicted in the image."""

    def to_bytes(self) -> bytes:
        """Return the content of the file; equal counts give equal bytes."""
        images = {
            str(image_id): {str(id): [q.iou, q.tp, q.fp, q.fn] for id, q in sorted(counts.items())}
            for image_id, counts in self.images.items()
        }
        content = {"data_hash": self.data_hash, "categories": self.taxonomy.to_coco(), "images": images}
        return gzip.compress(json.dumps(content).encode(), mtime=0)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Quality":
        """Read the content of the file.

        Raises:
            ValueError: it is damaged.
        """
        try:
            found = parse_json(gzip.decompress(content))
            return cls(
                data_hash=str(found["data_hash"]),
                taxonomy=Taxonomy.from_coco(found["categories"]),
                images={int(id): _counts(counts) for id, counts in found["images"].items()},
            )
        except (OSError, EOFError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"it does not hold the counts of an evaluation ({error})") from error


def _counts(values: Mapping[str, list[Any]]) -> dict[int, ClassQuality]:
    counts = {int(id): ClassQuality(int(id), float(iou), tp, fp, fn) for id, (iou, tp, fp, fn) in values.items()}
    for quality in counts.values():
        whole = all(type(count) is int and count >= 0 for count in (quality.tp, quality.fp, quality.fn))
        if not (whole and math.isfinite(quality.iou) and 0 <= quality.iou <= quality.tp):
            raise ValueError(f"it has impossible counts: {quality}")
    return counts
