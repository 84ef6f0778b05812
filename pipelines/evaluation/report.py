"""The report of an evaluation: its numbers and pictures as one HTML file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from maskformer.analysis.bootstrap import Difference
from maskformer.analysis.lost_quality import CAUSES, SIZES, Cause, lost_quality
from maskformer.analysis.lrp import class_lrp
from maskformer.analysis.summary import Analysis
from maskformer.panoptic_quality import panoptic_result
from pipelines.cluster.session import session
from pipelines.evaluation.folder import OVERLAYS, REPORT
from pipelines.evaluation.pictures import Pictures, draw_pictures
from pipelines.evaluation.report_page import content, page
from pipelines.evaluation.result import EvaluationResult
from pipelines.evaluation.score import ScoredImage
from pipelines.progress import progress
from pipelines.storage import locate

_OVERLAYS = 16
"""Predictions that are written as files too, from both ends of the images."""


def write_report(
    evaluation: EvaluationResult,
    *,
    images: int,
    other: EvaluationResult | None = None,
    difference: Difference | None = None,
    training: Sequence[tuple[int, float]] = (),
    cpus: float = 1.0,
) -> str:
    """Write the report into the folder of an evaluation and return its path or URI.

    Args:
        images: number of images to show, half of them those with the lowest PQ, half those with the highest; or, with
            `other`, those whose PQ differs most in both directions.
        other: another evaluation on the same data, to compare this one with.
        difference: of PQ, this evaluation minus the other.
        training: steps and quick PQ of the training.
        cpus: CPUs of each task that draws pictures.

    Raises:
        UserError: a file cannot be read or written.
    """
    classes = _classes(evaluation, other)
    row_of = {row.name: number for number, row in enumerate(classes)}
    entries = {image.image_id: _entry(evaluation, image, row_of) for image in evaluation.images}
    if other is not None:
        others = {image_id: result.pq for image_id, result in other.per_image.items()}
        entries = {key: replace(entry, other_pq=others[key]) for key, entry in entries.items()}
    shown = _chosen(list(entries.values()), images)
    with session():
        drawn = draw_pictures(evaluation, other, [int(e.image_id) for e in shown], content.CAUSE_COLORS, cpus)
        pictures = {each.image_id: each for each in progress(drawn, len(shown), "images drawn")}
    folder = locate(evaluation.output)
    (folder / OVERLAYS).delete()
    for entry in _both_ends(shown, _OVERLAYS):
        (folder / OVERLAYS / f"{entry.image_id}.jpg").write_bytes(pictures[int(entry.image_id)].prediction)
    file = folder / REPORT
    file.write_bytes(
        page(
            content.Content(
                title="Panoptic evaluation",
                facts=tuple(_facts(evaluation)),
                summary=_summary(evaluation, other, difference),
                lost=_lost(evaluation.analysis),
                classes=classes,
                images=tuple(_with_pictures(entry, pictures[int(entry.image_id)]) for entry in shown),
                num_images=len(evaluation.images),
                training=(content.Curve(name="quick PQ", points=tuple(training)),) if training else (),
                calibration=_calibration(evaluation.analysis),
                other=other.output if other else "",
            )
        )
    )
    return str(file)


def _chosen(entries: list[content.ImageEntry], count: int) -> list[content.ImageEntry]:
    """Return the images at both ends, the worst first; images without any segment have no PQ and are left out."""

    def key(entry: content.ImageEntry) -> float:
        return entry.pq if math.isnan(entry.other_pq) else entry.pq - entry.other_pq

    return _both_ends(sorted((entry for entry in entries if not math.isnan(key(entry))), key=key), count)


def _both_ends(ordered: list[content.ImageEntry], count: int) -> list[content.ImageEntry]:
    if len(ordered) <= count:
        return ordered
    return [*ordered[: -(-count // 2)], *ordered[len(ordered) - count // 2 :]]


def _entry(evaluation: EvaluationResult, image: ScoredImage, row_of: Mapping[str, int]) -> content.ImageEntry:
    """Return an image without its pictures.

    Args:
        row_of: row of each class in the table of classes.
    """
    taxonomy, analysis = evaluation.taxonomy, image.analysis
    result = panoptic_result([analysis.quality], taxonomy)
    lost = lost_quality([analysis.losses], result.per_class, taxonomy)
    classes = []
    for category_id, quality in sorted(analysis.quality.items()):
        name = taxonomy.names[taxonomy.class_index(category_id)]
        loss = lost.per_class[name].sum(axis=1)
        causes: tuple[Cause, ...] = tuple(cause for cause, part in zip(CAUSES, loss.tolist(), strict=True) if part > 0)
        classes.append(content.ClassOfImage(class_index=row_of[name], pq=quality.pq, causes=causes))
    return content.ImageEntry(
        image_id=image.image_id,
        file_name=evaluation.file_names[image.image_id],
        height=analysis.size[0],
        width=analysis.size[1],
        pq=result.pq,
        loss=_loss(lost.all.sum(axis=1).tolist()),
        classes=tuple(classes),
        input=b"",
        truth=b"",
        prediction=b"",
        errors=b"",
    )


def _with_pictures(entry: content.ImageEntry, drawn: Pictures) -> content.ImageEntry:
    return replace(
        entry,
        input=drawn.input,
        truth=drawn.truth,
        prediction=drawn.prediction,
        errors=drawn.errors,
        other=drawn.other,
    )


def _facts(evaluation: EvaluationResult) -> list[tuple[str, str]]:
    facts = [("data", evaluation.data.uri), ("images", f"{evaluation.quality.num_images:,}")]
    model = evaluation.model
    if model is None:
        facts.append(("predictions", evaluation.png_folder))
    else:
        size, panoptic = model.config.evaluation, model.config.panoptic
        facts += [
            ("checkpoint", model.uri),
            ("step", f"{model.step:,}"),
            ("recipe", model.config.recipe),
            ("image size", f"short side {size.short_side}, long side at most {size.long_side}"),
            ("thresholds", f"score {panoptic.score_threshold:g}, overlap {panoptic.overlap_threshold:g}"),
        ]
    return [*facts, ("evaluated", f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}")]


def _summary(
    evaluation: EvaluationResult, other: EvaluationResult | None, difference: Difference | None
) -> content.Summary:
    analysis, theirs = evaluation.analysis, other and other.analysis

    def measure(value: float, another: float | None = None) -> content.Measure:
        return content.Measure(value=value, compared=None if another is None else content.Compared(other=another))

    def group(name: str) -> content.Qualities:
        ours, their = getattr(analysis.quality, name), theirs and getattr(theirs.quality, name)
        pq, sq, rq = (measure(getattr(ours, key), their and getattr(their, key)) for key in ("pq", "sq", "rq"))
        if name in analysis.intervals:
            _, low, high, confidence = analysis.intervals[name]
            pq = replace(pq, interval=content.Interval(low=low, high=high, confidence=confidence))
        if name == "all" and difference is not None and pq.compared is not None:
            pq = replace(pq, compared=_compared(pq.compared.other, difference))
        return content.Qualities(pq=pq, sq=sq, rq=rq)

    lrp, their_lrp = analysis.lrp["all"], theirs and theirs.lrp["all"]
    ap, their_ap = analysis.mask_ap, theirs and theirs.mask_ap
    return content.Summary(
        all=group("all"),
        things=group("things"),
        stuff=group("stuff"),
        boundary_pq=measure(analysis.boundary.pq, theirs and theirs.boundary.pq),
        mean_iou=measure(analysis.mean_iou, theirs and theirs.mean_iou),
        lrp=measure(lrp.lrp, their_lrp and their_lrp.lrp),
        lrp_localization=measure(lrp.localization, their_lrp and their_lrp.localization),
        lrp_false_positives=measure(lrp.false_positives, their_lrp and their_lrp.false_positives),
        lrp_false_negatives=measure(lrp.false_negatives, their_lrp and their_lrp.false_negatives),
        ap=measure(ap.ap, their_ap and their_ap.ap),
        ap50=measure(ap.ap50, their_ap and their_ap.ap50),
        ap75=measure(ap.ap75, their_ap and their_ap.ap75),
        ap_small=measure(ap.small, their_ap and their_ap.small),
        ap_medium=measure(ap.medium, their_ap and their_ap.medium),
        ap_large=measure(ap.large, their_ap and their_ap.large),
    )


def _compared(other: float, difference: Difference) -> content.Compared:
    interval = content.Interval(low=difference.low, high=difference.high, confidence=difference.confidence)
    return content.Compared(other=other, difference=interval, p_value=difference.p_value)


def _loss(by_cause: Sequence[float]) -> content.Loss:
    return content.Loss(**dict(zip(CAUSES, by_cause, strict=True)))


def _lost(analysis: Analysis) -> dict:
    return {
        name: content.LossBySize(**{size: _loss(part[:, column].tolist()) for column, size in enumerate(SIZES)})
        for name, part in (("all", analysis.lost.all), ("things", analysis.lost.things), ("stuff", analysis.lost.stuff))
        if not math.isnan(float(part.sum()))
    }


def _classes(evaluation: EvaluationResult, other: EvaluationResult | None) -> tuple[content.ClassRow, ...]:
    analysis = evaluation.analysis
    rows = []
    for category in evaluation.taxonomy.categories:
        name, quality = category.name, analysis.quality.per_class[category.name]
        if not quality.tp + quality.fp + quality.fn:
            continue
        rows.append(
            content.ClassRow(
                name=name,
                is_thing=category.isthing,
                segments=quality.tp + quality.fn,
                pq=quality.pq,
                sq=quality.sq,
                rq=quality.rq,
                lrp=class_lrp(quality).lrp,
                iou=analysis.iou.get(name, math.nan),
                ap=analysis.mask_ap.per_class.get(name, math.nan),
                loss=_loss(analysis.lost.per_class[name].sum(axis=1).tolist()),
                other_pq=other.quality.per_class[name].pq if other else math.nan,
            )
        )
    return tuple(rows)


def _calibration(analysis: Analysis) -> content.Calibration | None:
    found = analysis.calibration
    if not any(each.count for each in found.bins):
        return None
    return content.Calibration(
        expected_error=found.expected_error,
        maximum_error=found.maximum_error,
        bins=tuple(
            content.CalibrationBin(
                lower=each.lower, upper=each.upper, count=each.count, score=each.mean_score, correct=each.share_correct
            )
            for each in found.bins
        ),
    )
