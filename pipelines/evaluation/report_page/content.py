"""What the page of an evaluation shows. Numbers are fractions 0..1, and nan if there is none."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from maskformer.analysis.lost_quality import CAUSES, Cause

CAUSE_COLORS: dict[Cause, tuple[int, int, int]] = {
    "missed": (45, 100, 189),
    "wrong_class": (231, 78, 97),
    "split": (16, 155, 160),
    "merged": (158, 30, 239),
    "boundary": (181, 142, 32),
    "false_alarm": (161, 80, 31),
}
"""RGB of each cause, in bars and in error maps: distinct for color-blind people, visible on white and on black."""

Group: TypeAlias = Literal["all", "things", "stuff"]
"""A group of classes."""

Picture: TypeAlias = Literal["input", "truth", "prediction", "errors", "other"]
"""A picture of an image; `other` is the prediction of the run compared with."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """PQ lost, by cause."""

    missed: float = 0.0
    wrong_class: float = 0.0
    split: float = 0.0
    merged: float = 0.0
    boundary: float = 0.0
    false_alarm: float = 0.0

    @property
    def total(self) -> float:
        return math.fsum(self.by_cause.values())

    @property
    def by_cause(self) -> dict[Cause, float]:
        return {cause: getattr(self, cause) for cause in CAUSES}

    @property
    def largest(self) -> Cause:
        """The cause with the largest loss; of equal ones, the first."""
        return max(CAUSES, key=lambda cause: self.by_cause[cause])

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a number lies with this confidence."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A number of the run compared with, and the difference: this run's number minus the other's."""

    other: float
    difference: Interval | None = None
    p_value: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number with what is known about it."""

    value: float = math.nan
    interval: Interval | None = None
    compared: Compared | None = None


@dataclass(frozen=True, kw_only=True)
class Qualities:
    """Panoptic, segmentation and recognition quality of a group of classes."""

    pq: Measure
    sq: Measure
    rq: Measure


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of an evaluation as a whole."""

    all: Qualities
    things: Qualities
    stuff: Qualities
    boundary_pq: Measure = Measure()
    mean_iou: Measure = Measure()
    lrp: Measure = Measure()
    """Localization recall precision error: lower is better, as for its three components."""
    lrp_localization: Measure = Measure()
    lrp_false_positives: Measure = Measure()
    lrp_false_negatives: Measure = Measure()
    ap: Measure = Measure()
    """Mask average precision of things."""
    ap50: Measure = Measure()
    ap75: Measure = Measure()
    ap_small: Measure = Measure()
    ap_medium: Measure = Measure()
    ap_large: Measure = Measure()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """PQ over training of a run."""

    name: str
    points: tuple[tuple[int, float], ...]
    """Step and PQ, by ascending step."""


@dataclass(frozen=True, kw_only=True)
class LossBySize:
    """PQ lost by a group of classes in segments of three sizes; all together add up to 1 - PQ."""

    small: Loss
    medium: Loss
    large: Loss

    @property
    def total(self) -> Loss:
        return self.small + self.medium + self.large


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """The numbers of a class."""

    name: str
    is_thing: bool
    segments: int
    """Number of segments of the ground truth, crowds not counted."""
    pq: float
    sq: float
    rq: float
    lrp: float = math.nan
    iou: float = math.nan
    ap: float = math.nan
    loss: Loss = Loss()
    other_pq: float = math.nan
    """PQ of the run compared with."""


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Predicted segments with scores of a range."""

    lower: float
    upper: float
    count: int
    score: float
    """Mean score."""
    correct: float
    """Share that matches a segment of the ground truth."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How well scores predict which segments are correct."""

    expected_error: float
    maximum_error: float
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, kw_only=True)
class ClassOfImage:
    """A class that an image has, in ground truth or prediction."""

    class_index: int
    """Position in `Content.classes`."""
    pq: float
    causes: tuple[Cause, ...]
    """Why the class loses PQ in this image."""


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """An image with its pictures, which are JPEGs."""

    image_id: int | str
    file_name: str
    height: int
    width: int
    pq: float
    loss: Loss
    classes: tuple[ClassOfImage, ...]
    input: bytes
    truth: bytes
    prediction: bytes
    errors: bytes
    other: bytes | None = None
    """Prediction of the run compared with."""
    other_pq: float = math.nan

    @property
    def pictures(self) -> dict[Picture, bytes]:
        """The pictures that there are, in the order in which they are shown."""
        four: dict[Picture, bytes] = {
            "input": self.input,
            "truth": self.truth,
            "prediction": self.prediction,
            "errors": self.errors,
        }
        return four if self.other is None else {**four, "other": self.other}


@dataclass(frozen=True, kw_only=True)
class Content:
    """An evaluation, complete with what its page shows."""

    title: str
    facts: tuple[tuple[str, str], ...]
    """Names and values: checkpoint, step, data, images, date, thresholds, commit."""
    summary: Summary
    lost: Mapping[Group, LossBySize]
    """Groups without classes are left out."""
    sizes: str = "Small: below 32² pixels; large: above 96² pixels."
    """What the three sizes of segments are."""
    classes: tuple[ClassRow, ...]
    images: tuple[ImageEntry, ...]
    num_images: int
    """Number of images evaluated, of which `images` may be a part."""
    training: tuple[Curve, ...] = ()
    """This run's curve first."""
    calibration: Calibration | None = None
    other: str = ""
    """Name of the run compared with; empty if there is none."""
