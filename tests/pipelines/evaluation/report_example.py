"""An evaluation of synthetic images whose predictions are the ground truth with known errors."""

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from maskformer.draw import outlines, overlay, segment_numbers
from maskformer.panoptic_quality import ClassQuality, PanopticQuality
from maskformer.taxonomy import Taxonomy
from pipelines.data.synthetic import CATEGORIES, Scene, SyntheticConfig, draw_scene
from pipelines.evaluation.report_page.content import (
    CAUSE_COLORS,
    CAUSES,
    Calibration,
    CalibrationBin,
    Cause,
    ClassOfImage,
    ClassRow,
    Compared,
    Content,
    Curve,
    Group,
    ImageEntry,
    Interval,
    Loss,
    LossBySize,
    Measure,
    Qualities,
    Summary,
)

TAXONOMY = Taxonomy.from_coco(CATEGORIES)
_CHANCES: dict[str, float] = {"missed": 0.12, "wrong_class": 0.1, "split": 0.08, "merged": 0.12, "boundary": 0.58}


_MISSED: tuple[Cause, ...] = ("missed",)
_FALSE_ALARM: tuple[Cause, ...] = ("false_alarm",)


@dataclass
class Prediction:
    """A prediction, and the cause of the error that was made in each segment of it or of the ground truth."""

    ids: npt.NDArray[np.int32]
    segments: list[dict[str, Any]]
    causes: dict[int, Cause]


def perturbed(scene: Scene, rng: np.random.Generator, skill: float = 1.0) -> Prediction:
    """Return the ground truth with errors, fewer with more skill."""
    ids, segments, causes = np.zeros_like(scene.ids), [], {}
    true = [segment for segment in scene.segments if not segment["iscrowd"]]

    def add(mask: npt.NDArray[np.bool_], category: int, cause: Cause) -> None:
        if mask.any():
            number = len(segments) + 1
            segments.append({"id": number, "category_id": category, "iscrowd": 0})
            causes[-number] = cause
            ids[mask] = number

    for segment in sorted(true, key=lambda each: -each["area"]):
        mask, category = scene.ids == segment["id"], segment["category_id"]
        shift = tuple(int(part) for part in np.rint(rng.normal(0, 1.2 / skill, 2)))
        mask = np.roll(mask, shift, (0, 1))
        cause: Cause = rng.choice(list(_CHANCES), p=list(_CHANCES.values()))
        if rng.random() < 1 - 1 / skill:
            cause = "boundary"
        others = [each for each in true if each["category_id"] == category and each is not segment]
        if cause == "merged" and not others:
            cause = "boundary"
        causes[segment["id"]] = cause
        if cause == "wrong_class":
            add(mask, int(rng.choice([c["id"] for c in CATEGORIES if c["id"] != category])), cause)
        elif cause == "split":
            middle = np.median(np.nonzero(mask)[1]) if mask.any() else 0
            left = np.arange(mask.shape[1])[None] < middle
            add(mask & left, category, cause)
            add(mask & ~left, category, cause)
        elif cause == "merged":
            add(mask | (scene.ids == others[0]["id"]), category, cause)
        elif cause == "boundary":
            add(mask, category, cause)
    if rng.random() < 0.25 / skill:
        y, x = (int(rng.integers(0, side - 8)) for side in ids.shape)
        mask = np.zeros(ids.shape, bool)
        mask[y : y + 8, x : x + 8] = True
        add(mask, 21, "false_alarm")
    present = [segment for segment in segments if (ids == segment["id"]).any()]
    return Prediction(ids, present, causes)


def losses(quality: ClassQuality, missed: Sequence[Cause], alarms: Sequence[Cause]) -> Loss:
    """Return the lost PQ of a class: 1 - PQ is (sum of 1 - IoU of the true positives + FN/2 + FP/2) / denominator."""
    parts: defaultdict[str, float] = defaultdict(float)
    whole = quality.tp + (quality.fp + quality.fn) / 2
    parts["boundary"] = (quality.tp - quality.iou) / whole
    for cause in missed:
        parts["missed" if cause == "boundary" else cause] += 0.5 / whole
    for cause in alarms:
        parts["false_alarm" if cause == "boundary" else cause] += 0.5 / whole
    return Loss(**parts)


def example(
    num_images: int = 24, *, compared: bool = False, seed: int = 0, enlarge: int = 6, quality: int = 80
) -> Content:
    """Return the content of a page."""
    scorer, images = PanopticQuality(TAXONOMY), []
    missed: defaultdict[int, list[Cause]] = defaultdict(list)
    alarms: defaultdict[int, list[Cause]] = defaultdict(list)
    counts: defaultdict[int, int] = defaultdict(int)
    other_scorer = PanopticQuality(TAXONOMY)
    for number in range(num_images):
        rng = np.random.default_rng((seed, number))
        scene = draw_scene(rng, SyntheticConfig())
        prediction, other = perturbed(scene, rng, 1.6), perturbed(scene, rng)
        contribution = scorer.update((prediction.ids, prediction.segments), (scene.ids, scene.segments), number)
        other_contribution = other_scorer.update((other.ids, other.segments), (scene.ids, scene.segments), number)
        here_missed, here_alarms = _unmatched(scene, prediction)
        for group, found in ((missed, here_missed), (alarms, here_alarms)):
            for category, causes in found.items():
                group[category] += causes
        for segment in scene.segments:
            counts[segment["category_id"]] += not segment["iscrowd"]
        by_class = {
            category: _reconciled(each, here_missed[category], here_alarms[category])
            for category, each in contribution.items()
        }
        image = scene.image.repeat(enlarge, 0).repeat(enlarge, 1)
        entry = ImageEntry(
            image_id=100_000 + 37 * number,
            file_name=f"{100_000 + 37 * number:012d}.jpg",
            height=scene.ids.shape[0],
            width=scene.ids.shape[1],
            pq=_mean([each.pq for each in contribution.values()]),
            loss=_average_loss(list(by_class.values())),
            classes=tuple(
                ClassOfImage(
                    class_index=TAXONOMY.class_index(category),
                    pq=each.pq,
                    causes=tuple(cause for cause in CAUSES if by_class[category].by_cause[cause] > 0),
                )
                for category, each in contribution.items()
            ),
            input=jpeg(image, quality),
            truth=drawn(image, scene.ids, scene.segments, enlarge, quality),
            prediction=drawn(image, prediction.ids, prediction.segments, enlarge, quality),
            errors=error_map(scene, prediction, enlarge, quality),
        )
        if compared:
            entry = replace(
                entry,
                other=drawn(image, other.ids, other.segments, enlarge, quality),
                other_pq=_mean([each.pq for each in other_contribution.values()]),
            )
        images.append(entry)
    result, other_result = scorer.result(), other_scorer.result()
    classes = tuple(
        ClassRow(
            name=category.name,
            is_thing=category.isthing,
            segments=counts[category.id],
            pq=found.pq,
            sq=found.sq,
            rq=found.rq,
            lrp=1 - 0.9 * found.pq,
            iou=0.5 + found.pq / 2.2,
            ap=found.pq * 0.8 if category.isthing else math.nan,
            loss=_reconciled(found, missed[category.id], alarms[category.id]),
            other_pq=other_result.per_class[category.name].pq if compared else math.nan,
        )
        for category in TAXONOMY.categories
        for found in [result.per_class[category.name]]
    )

    def measure(value: float, other: float, width: float = 0.02, *, interval: bool = True) -> Measure:
        if math.isnan(value):
            return Measure()
        low, high = value - other - width, value - other + width
        return Measure(
            value=value,
            interval=Interval(low=value - width, high=value + 0.9 * width, confidence=0.95) if interval else None,
            compared=Compared(
                other=other,
                difference=Interval(low=low, high=high, confidence=0.95) if interval else None,
                p_value=math.exp(-abs(value - other) / width * 2) if interval else math.nan,
            )
            if compared
            else None,
        )

    groups = {
        name: Qualities(pq=measure(ours.pq, theirs.pq), sq=measure(ours.sq, theirs.sq), rq=measure(ours.rq, theirs.rq))
        for name, ours, theirs in (
            ("all", result.all, other_result.all),
            ("things", result.things, other_result.things),
            ("stuff", result.stuff, other_result.stuff),
        )
    }
    pq, other_pq = result.pq, other_result.pq
    kinds: dict[Group, tuple[bool, ...]] = {"all": (True, False), "things": (True,), "stuff": (False,)}
    lost: dict[Group, LossBySize] = {
        name: _by_size(_average_loss([row.loss for row in classes if row.is_thing in kept]))
        for name, kept in kinds.items()
    }
    steps = range(100, 1701, 100)
    curve = tuple((step, pq * (1 - math.exp(-step / 420)) + 0.01 * math.sin(step)) for step in steps)
    return Content(
        title="Evaluation of demo",
        facts=(
            ("checkpoint", "runs/demo/checkpoints/step_00001700"),
            ("step", "1,700"),
            ("data", "runs/demo-data/val, sha256 5f3c9a…"),
            ("images", f"{num_images:,}"),
            ("date", "2026-11-30 10:00 UTC"),
            ("thresholds", "score 0.8, overlap 0.8"),
            ("commit", "171c470"),
        ),
        summary=Summary(
            all=groups["all"],
            things=groups["things"],
            stuff=groups["stuff"],
            boundary_pq=measure(pq * 0.8, other_pq * 0.8, interval=False),
            mean_iou=measure(0.71, 0.69, interval=False),
            lrp=measure(1 - 0.9 * pq, 1 - 0.9 * other_pq),
            lrp_localization=measure(0.16, 0.17, interval=False),
            lrp_false_positives=measure(0.21, 0.2, interval=False),
            lrp_false_negatives=measure(0.29, 0.33, interval=False),
            ap=measure(0.281, 0.25, interval=False),
            ap50=measure(0.49, 0.45, interval=False),
            ap75=measure(0.27, 0.22, interval=False),
            ap_small=measure(0.18, 0.17, interval=False),
            ap_medium=measure(0.36, 0.33, interval=False),
        ),
        training=(
            Curve(name="demo", points=curve),
            *(
                [Curve(name="demo-before", points=tuple((step, 0.85 * each) for step, each in curve))]
                if compared
                else []
            ),
        ),
        lost=lost,
        classes=classes,
        calibration=_calibration(),
        images=tuple(images),
        num_images=num_images,
        other="runs/demo-before, step 1,500" if compared else "",
    )


def many_classes(content: Content, count: int) -> Content:
    """Return the content with further classes, which no image has."""
    rng = np.random.default_rng(3)
    more = []
    for number in range(count):
        sq, rq = rng.uniform(0.6, 0.9), rng.uniform(0.05, 0.9)
        parts = rng.dirichlet(np.full(6, 0.6)) * (1 - sq * rq)
        more.append(
            ClassRow(
                name=f"class {number} of many",
                is_thing=bool(number % 5 < 3),
                segments=int(rng.integers(0, 4000)),
                pq=sq * rq,
                sq=sq,
                rq=rq,
                lrp=1 - 0.9 * sq * rq,
                iou=rng.uniform(0.2, 0.9),
                ap=rng.uniform(0.1, 0.6) if number % 5 < 3 else math.nan,
                loss=Loss(**dict(zip(CAUSES, parts.tolist(), strict=True))),
                other_pq=sq * rq * rng.uniform(0.8, 1.1) if content.other else math.nan,
            )
        )
    return replace(content, classes=(*content.classes, *more))


def jpeg(image: npt.NDArray[np.uint8], quality: int = 80) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def drawn(image: Any, ids: Any, segments: Any, enlarge: int, quality: int) -> bytes:
    return jpeg(overlay(image, ids.repeat(enlarge, 0).repeat(enlarge, 1), segments, TAXONOMY), quality)


def error_map(scene: Scene, prediction: Prediction, enlarge: int, quality: int) -> bytes:
    """Paint each error in the color of its cause, on the image in gray."""
    gray = np.asarray(Image.fromarray(scene.image).convert("L"))[..., None].repeat(3, 2) // 2 + 90
    for ids, key in ((scene.ids, 1), (prediction.ids, -1)):
        for identifier, cause in prediction.causes.items():
            if identifier * key > 0 and cause != "boundary":
                gray[ids == abs(identifier)] = CAUSE_COLORS[cause]
    boundary = {segment["id"] for segment in scene.segments if prediction.causes.get(segment["id"]) == "boundary"}
    wrong = np.isin(scene.ids, list(boundary)) & _differs(scene, prediction)
    gray[wrong] = CAUSE_COLORS["boundary"]
    gray = gray.repeat(enlarge, 0).repeat(enlarge, 1).astype(np.uint8)
    numbers = segment_numbers(scene.ids, scene.segments).repeat(enlarge, 0).repeat(enlarge, 1)
    gray[outlines(numbers)] = 255
    return jpeg(gray, quality)


def _differs(scene: Scene, prediction: Prediction) -> npt.NDArray[np.bool_]:
    category_of = {segment["id"]: segment["category_id"] for segment in scene.segments}
    found = {segment["id"]: segment["category_id"] for segment in prediction.segments}
    lookup = np.vectorize(lambda number: category_of.get(number, 0))
    other = np.vectorize(lambda number: found.get(number, 0))
    return lookup(scene.ids) != other(prediction.ids)


def _unmatched(
    scene: Scene, prediction: Prediction
) -> tuple[defaultdict[int, list[Cause]], defaultdict[int, list[Cause]]]:
    """Return the causes of false negatives and of false positives by category; `_reconciled` drops what is too many."""
    missed: defaultdict[int, list[Cause]] = defaultdict(list)
    alarms: defaultdict[int, list[Cause]] = defaultdict(list)
    for segment in scene.segments:
        cause = prediction.causes.get(segment["id"])
        if cause and cause != "boundary":
            missed[segment["category_id"]].append(cause)
    for segment in prediction.segments:
        cause = prediction.causes[-segment["id"]]
        if cause != "boundary":
            alarms[segment["category_id"]].append(cause)
    return missed, alarms


def _reconciled(quality: ClassQuality, missed: list[Cause], alarms: list[Cause]) -> Loss:
    if not quality.tp + quality.fp + quality.fn:
        return Loss()
    known: list[Cause] = [*missed, *_MISSED * quality.fn]
    found: list[Cause] = [*alarms, *_FALSE_ALARM * quality.fp]
    return losses(quality, known[: quality.fn], found[: quality.fp])


def _average_loss(parts: Sequence[Loss]) -> Loss:
    return Loss(**{cause: _mean([part.by_cause[cause] for part in parts]) for cause in CAUSES})


def _by_size(loss: Loss) -> LossBySize:
    def share(part: float) -> Loss:
        return Loss(**{cause: part * points for cause, points in loss.by_cause.items()})

    return LossBySize(small=share(0.5), medium=share(0.375), large=share(0.125))


def _calibration() -> Calibration:
    counts = [0, 0, 0, 0, 0, 3, 12, 22, 31, 58, 77, 120, 180, 260, 190]
    bins = tuple(
        CalibrationBin(
            lower=number / 15,
            upper=(number + 1) / 15,
            count=count,
            score=(number + 0.5) / 15 if count else math.nan,
            correct=min(1.0, ((number + 0.5) / 15) ** 1.6) if count else math.nan,
        )
        for number, count in enumerate(counts)
    )
    return Calibration(expected_error=0.083, maximum_error=0.17, bins=bins)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
