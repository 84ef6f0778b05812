"""The tables of the page."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipelines.evaluation.report_page.charts import loss_bar, swatch
from pipelines.evaluation.report_page.content import (
    CAUSES,
    Calibration,
    ClassRow,
    Curve,
    Group,
    Loss,
    LossBySize,
    Measure,
    Summary,
)
from pipelines.evaluation.report_page.formats import CAUSE_MEANINGS, CAUSE_NAMES, p_value, percent, signed, span
from pipelines.page import text

GROUPS: dict[Group, str] = {"all": "All classes", "things": "Things", "stuff": "Stuff"}
_LOWER_IS_BETTER = ("LRP",)


def summary_tables(summary: Summary) -> Iterator[str]:
    """Yield the numbers of an evaluation with their intervals."""
    rows = []
    for name, group in (("All", summary.all), ("Things", summary.things), ("Stuff", summary.stuff)):
        cells = "".join(f"<td>{_with_interval(each)}</td>" for each in (group.pq, group.sq, group.rq))
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    heads = _heads("", "PQ", "SQ", "RQ")
    yield '<div class="columns">'
    yield f'<div class="wide"><table class="numbers spans"><caption>Panoptic quality</caption>{heads}'
    yield f"<tbody>{''.join(rows)}</tbody></table></div>"
    for caption, measures in _others(summary).items():
        known = [(name, measure) for name, measure in measures if not math.isnan(measure.value)]
        if known:
            yield f'<table class="numbers"><caption>{caption}</caption><tbody>'
            yield from (f'<tr><th scope="row">{name}</th><td>{_with_interval(each)}</td></tr>' for name, each in known)
            yield "</tbody></table>"
    yield "</div>"


def comparison_table(summary: Summary, other: str) -> Iterator[str]:
    """Yield the numbers of two runs and their differences."""
    named = [
        (f"{quality.upper()}, {GROUPS[group].lower()}", getattr(getattr(summary, group), quality))
        for group in ("all", "things", "stuff")
        for quality in ("pq", "sq", "rq")
    ]
    named += [
        (f"LRP: {name.lower()}" if caption.startswith("LRP") and name != "LRP" else name, measure)
        for caption, measures in _others(summary).items()
        for name, measure in measures
    ]
    yield f'<div class="wide" tabindex="0" role="region" aria-label="Compared with {text(other)}">'
    yield '<table class="numbers">'
    yield _heads("", "this run", "the other", "difference", "interval", "p", "")
    yield "<tbody>"
    for name, measure in named:
        compared = measure.compared
        if compared is None:
            continue
        interval, difference = compared.difference, measure.value - compared.other
        ends = "–" if interval is None else f"{signed(interval.low)} to {signed(interval.high)}"
        yield (
            f'<tr><th scope="row">{name}</th><td>{percent(measure.value)}</td><td>{percent(compared.other)}</td>'
            f"<td>{signed(difference)}</td><td>{ends}</td><td>{text(p_value(compared.p_value))}</td>"
            f"<td>{_verdict(name, measure)}</td></tr>"
        )
    yield "</tbody></table></div>"


def loss_tables(lost: Mapping[Group, LossBySize]) -> Iterator[str]:
    """Yield where PQ is lost, for each group of classes: bars and numbers by cause and size."""
    yield '<div class="columns">'
    for group, name in GROUPS.items():
        if group not in lost:
            continue
        sizes = lost[group]
        total, columns = sizes.total, (sizes.small, sizes.medium, sizes.large, sizes.total)
        kept = 1 - total.total
        yield f'<div class="lost"><h3>{name}: PQ {percent(kept)}, lost {percent(total.total)}</h3>'
        yield f'{loss_bar(total, kept=max(kept, 0))}<div class="bars" aria-hidden="true">'
        for label, part in (("small", sizes.small), ("medium", sizes.medium), ("large", sizes.large)):
            yield f"<span>{label}</span>{loss_bar(part, whole=total.total or 1)}"
        yield "</div>"
        yield f'<table class="numbers"><caption class="unseen">{name}: points of PQ lost</caption>'
        yield _heads("points lost", "small", "medium", "large", "all")
        yield "<tbody>"
        for cause in CAUSES:
            cells = "".join(f"<td>{percent(loss.by_cause[cause])}</td>" for loss in columns)
            yield f'<tr><th scope="row">{swatch(cause)} {CAUSE_NAMES[cause]}</th>{cells}</tr>'
        cells = "".join(f"<td>{percent(loss.total)}</td>" for loss in columns)
        yield f'</tbody><tfoot><tr><th scope="row">total</th>{cells}</tr></tfoot></table></div>'
    yield "</div>"
    yield "<details><summary>What the causes mean</summary><dl>"
    for cause in CAUSES:
        yield f"<dt>{swatch(cause)} {CAUSE_NAMES[cause]}</dt><dd>{CAUSE_MEANINGS[cause]}</dd>"
    yield "</dl></details>"


def class_table(classes: Sequence[ClassRow], shown: Iterable[int], compared: bool) -> Iterator[str]:
    """Yield the table of classes, the lowest PQ first.

    Args:
        shown: class indices that some image of the page has.
        compared: whether there is another run.
    """
    linked = frozenset(shown)
    heads = ["PQ", *(["difference"] if compared else []), "SQ", "RQ", "LRP", "IoU", "AP", "segments"]
    worst = max((row.loss.by_cause[row.loss.largest] for row in classes), default=0) or 1
    yield '<form id="class-filter" hidden>'
    yield '<label>Name <input type="search" name="name" autocomplete="off"></label>'
    yield '<label>Kind <select name="kind"><option value="">all</option>'
    yield '<option value="thing">things</option><option value="stuff">stuff</option></select></label>'
    yield '<output name="count"></output></form>'
    yield '<div class="wide tall" tabindex="0" role="region" aria-label="Classes">'
    yield '<table class="numbers sortable" id="classes"><thead><tr><th scope="col">class</th><th scope="col">kind</th>'
    for head in heads:
        yield f'<th scope="col" data-number{" aria-sort=ascending" if head == "PQ" else ""}>{head}</th>'
    yield '<th scope="col" data-number>largest loss</th></tr></thead><tbody>'
    for index, row in sorted(enumerate(classes), key=lambda each: _nan_last(each[1].pq)):
        difference = row.pq - row.other_pq
        numbers = [(row.pq, percent(row.pq))]
        numbers += [(difference, signed(difference))] if compared else []
        numbers += [(value, percent(value)) for value in (row.sq, row.rq, row.lrp, row.iou, row.ap)]
        numbers += [(float(row.segments), f"{row.segments:,}")]
        name = f"<bdi>{text(row.name)}</bdi>"
        link = f'<a href="#images" data-class="{index}">{name}</a>' if index in linked else name
        kind = "thing" if row.is_thing else "stuff"
        yield f'<tr data-kind="{kind}"><th scope="row">{link}</th><td>{kind}</td>'
        yield "".join(f'<td data-value="{_value(value)}">{words}</td>' for value, words in numbers)
        yield f"{_largest_loss(row.loss, worst)}</tr>"
    yield "</tbody></table></div>"


def calibration_table(calibration: Calibration) -> Iterator[str]:
    """Yield the bins of a reliability diagram."""
    yield '<table class="numbers">'
    yield _heads("score", "mean score", "correct", "segments")
    yield "<tbody>"
    for each in calibration.bins:
        if each.count:
            cells = (percent(each.score), percent(each.correct), f"{each.count:,}")
            yield f'<tr><th scope="row">{percent(each.lower)} to {percent(each.upper)}</th>'
            yield "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table>"


def curve_tables(curves: Sequence[Curve]) -> Iterator[str]:
    """Yield the points of curves."""
    for curve in curves:
        yield f'<table class="numbers"><caption>{text(curve.name)}</caption>{_heads("step", "PQ")}<tbody>'
        yield from (f'<tr><th scope="row">{step:,}</th><td>{percent(pq)}</td></tr>' for step, pq in curve.points)
        yield "</tbody></table>"


def _others(summary: Summary) -> dict[str, list[tuple[str, Measure]]]:
    return {
        "Other qualities": [("Boundary PQ", summary.boundary_pq), ("mean IoU", summary.mean_iou)],
        "LRP error, lower is better": [
            ("LRP", summary.lrp),
            ("Localization", summary.lrp_localization),
            ("False positives", summary.lrp_false_positives),
            ("False negatives", summary.lrp_false_negatives),
        ],
        "Mask AP of things": [
            ("AP", summary.ap),
            ("AP at IoU 50", summary.ap50),
            ("AP at IoU 75", summary.ap75),
            ("AP small", summary.ap_small),
            ("AP medium", summary.ap_medium),
            ("AP large", summary.ap_large),
        ],
    }


def _with_interval(measure: Measure) -> str:
    number = f"<b>{percent(measure.value)}</b>"
    return number if measure.interval is None else f"{number} <small>{span(measure.interval)}</small>"


def _verdict(name: str, measure: Measure) -> str:
    interval = measure.compared.difference if measure.compared else None
    if interval is None or interval.low <= 0 <= interval.high:
        return ""
    return "better" if (interval.low > 0) != name.startswith(_LOWER_IS_BETTER) else "worse"


def _largest_loss(loss: Loss, longest: float) -> str:
    cause = loss.largest
    points = loss.by_cause[cause]
    if points <= 0:
        return '<td data-value="0">–</td>'
    bar = loss_bar(Loss(**{cause: points}), whole=longest)
    return f'<td data-value="{_value(points)}" class="loss">{bar}{CAUSE_NAMES[cause]} {percent(points)}</td>'


def _heads(*names: str) -> str:
    cells = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _value(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _nan_last(value: float) -> tuple[bool, float]:
    return math.isnan(value), value
