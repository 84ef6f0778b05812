"""What one image contributes to every number of an evaluation.

All of it is small and plain, so it can be computed anywhere, kept on disk, and added up in any order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from maskformer.analysis.boundary import boundary_quality
from maskformer.analysis.lost_quality import Losses, losses
from maskformer.analysis.mask_ap import encode_things
from maskformer.panoptic_quality import ClassQuality, count_segments
from maskformer.segment_matching import Matching, PanopticMap, match_segments
from maskformer.taxonomy import Taxonomy


class ClassPixels(NamedTuple):
    """Pixels of one class. Void and crowd of the ground truth do not count."""

    intersection: int
    truth: int
    prediction: int


class ScoredSegment(NamedTuple):
    """A predicted segment that counts as a true or false positive."""

    category_id: int
    score: float
    correct: bool


@dataclass(frozen=True, kw_only=True)
class ImageAnalysis:
    """What one image contributes. Dictionaries are by category id and have the classes that occur."""

    image_id: int
    size: tuple[int, int]
    """Height and width."""
    quality: dict[int, ClassQuality]
    boundary: dict[int, ClassQuality]
    """As `quality`, for boundary PQ."""
    losses: Losses
    pixels: dict[int, ClassPixels]
    scored: tuple[ScoredSegment, ...]
    """The predicted segments that have a score."""
    predicted_things: list[dict[str, Any]]
    """As `encode_things` returns them."""
    true_things: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dictionaries; `from_json` reads them back unchanged."""
        return {
            "image_id": self.image_id,
            "size": list(self.size),
            "quality": {str(key): list(value)[1:] for key, value in self.quality.items()},
            "boundary": {str(key): list(value)[1:] for key, value in self.boundary.items()},
            "losses": {str(key): value.tolist() for key, value in self.losses.items()},
            "pixels": {str(key): list(value) for key, value in self.pixels.items()},
            "scored": [list(segment) for segment in self.scored],
            "predicted_things": self.predicted_things,
            "true_things": self.true_things,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ImageAnalysis":
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            image_id=int(found["image_id"]),
            size=(int(found["size"][0]), int(found["size"][1])),
            quality={int(key): ClassQuality(int(key), *value) for key, value in found["quality"].items()},
            boundary={int(key): ClassQuality(int(key), *value) for key, value in found["boundary"].items()},
            losses={int(key): np.array(value, np.float64) for key, value in found["losses"].items()},
            pixels={int(key): ClassPixels(*value) for key, value in found["pixels"].items()},
            scored=tuple(ScoredSegment(*segment) for segment in found["scored"]),
            predicted_things=found["predicted_things"],
            true_things=found["true_things"],
        )


def analyze_image(prediction: PanopticMap, truth: PanopticMap, taxonomy: Taxonomy, image_id: int) -> ImageAnalysis:
    """Compare the prediction for an image with its ground truth.

    Raises:
        ValueError: as `match_segments`.
    """
    matching = match_segments(prediction, truth, taxonomy, image_id)
    return ImageAnalysis(
        image_id=image_id,
        size=matching.size,
        quality=count_segments(matching, taxonomy),
        boundary=boundary_quality(matching, taxonomy),
        losses=losses(matching, taxonomy),
        pixels=count_pixels(matching, taxonomy),
        scored=_scored(matching),
        predicted_things=encode_things(*prediction, taxonomy),
        true_things=encode_things(*truth, taxonomy),
    )


def count_pixels(matching: Matching, taxonomy: Taxonomy) -> dict[int, ClassPixels]:
    """Count the pixels of each class in the ground truth, in the prediction, and in both, outside of void and crowd."""
    true, predicted = matching.true.classes, matching.predicted.classes
    counted = matching.overlap[1:] * ~matching.true.crowd[:, None]
    found: dict[int, ClassPixels] = {}
    for class_index in sorted({*true.tolist(), *predicted.tolist()}):
        rows, columns = true == class_index, np.concatenate([[False], predicted == class_index])
        pixels = ClassPixels(
            intersection=int(counted[rows][:, columns].sum()),
            truth=int(counted[rows].sum()),
            prediction=int(counted[:, columns].sum()),
        )
        if any(pixels):
            found[taxonomy.category_id(class_index)] = pixels
    return found


def _scored(matching: Matching) -> tuple[ScoredSegment, ...]:
    correct: set[int] = set(matching.matches[1].tolist())
    found: list[ScoredSegment] = []
    counted: list[int] = sorted({*correct, *matching.false.tolist()})
    for column in counted:
        info = matching.predicted.infos[column]
        score = info.get("score")
        if score is None:
            continue
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ValueError(
                f"The score of a segment is a number in 0..1, got {score!r} for segment {info['id']} in "
                f"{matching.predicted.label}; leave it out or correct it."
            )
        found.append(ScoredSegment(int(info["category_id"]), float(score), column in correct))
    return tuple(found)
