"""Drawings in SVG. Their colors come from the style of the page; what they show is also there as a table."""

import math
from collections.abc import Iterable, Iterator, Sequence

from pipelines.evaluation.report_page.content import Calibration, Cause, Curve, Loss
from pipelines.evaluation.report_page.formats import CAUSE_NAMES, percent
from pipelines.page import text

_WIDTH, _HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 14, 14, 42
"""Margins for the labels of the axes."""
_COUNTS = 46
"""Height of the counts below a reliability diagram."""


def swatch(cause: Cause) -> str:
    """Return a small square in the color of a cause."""
    return (
        f'<svg class="swatch" viewBox="0 0 1 1" aria-hidden="true"><rect class="{cause}" width="1" height="1"/></svg>'
    )


def loss_bar(loss: Loss, *, kept: float = 0.0, whole: float = 1.0) -> str:
    """Return a bar of the losses by cause.

    Args:
        kept: PQ, as the first part.
        whole: what the length of the bar stands for.
    """
    parts: list[tuple[str, str, float]] = [("kept", "PQ", kept)]
    parts += [(cause, CAUSE_NAMES[cause], part) for cause, part in loss.by_cause.items()]
    drawn, start = [], 0.0
    for kind, name, part in parts:
        if not part > 0:
            continue
        width = 100 * part / whole
        drawn.append(
            f'<rect class="{kind}" x="{start:.2f}" width="{width:.2f}" height="1">'
            f"<title>{name} {percent(part)}</title></rect>"
        )
        start += width
    return f'<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>'


def line_chart(curves: Sequence[Curve], title: str) -> str:
    """Return PQ over steps, a line for each curve; values that are not finite are left out."""
    drawn = [[(step, 100 * value) for step, value in curve.points if math.isfinite(value)] for curve in curves]
    points = [point for each in drawn for point in each]
    x_ticks = ticks(max((x for x, _ in points), default=1))
    y_ticks = ticks(max((y for _, y in points), default=1))

    def place(x: float, y: float) -> tuple[float, float]:
        return _across(x / x_ticks[-1]), _down(y / y_ticks[-1])

    lines: list[str] = []
    for number, each in enumerate(drawn):
        places = [place(*point) for point in each]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline class="curve curve-{number}" points="{path}"/>')
        lines += (f'<circle class="end curve-{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places[-1:])
    return _chart(
        title,
        [
            *_axes([(x / x_ticks[-1], f"{x:,.10g}") for x in x_ticks], [(y / y_ticks[-1], f"{y:g}") for y in y_ticks]),
            *_names("step", "PQ"),
            *lines,
        ],
    )


def reliability_diagram(calibration: Calibration, title: str) -> str:
    """Return the share of correct segments over their scores, and below it how many there are."""
    filled = [each for each in calibration.bins if each.count]
    most = max((each.count for each in filled), default=1)
    bars: list[str] = []
    for each in filled:
        left, right = _across(each.lower), _across(each.upper)
        top = _down(each.correct)
        bars.append(_rectangle("share", left, top, right, _down(0)))
        height = _COUNTS * each.count / most
        bars.append(_rectangle("count", left, _HEIGHT + _COUNTS - height, right, _HEIGHT + _COUNTS))
    means = (
        f'<circle class="end curve-0" cx="{_across(each.score):.1f}" cy="{_down(each.correct):.1f}" r="3"/>'
        for each in filled
    )
    fifths = [(part / 5, f"{20 * part}") for part in range(6)]
    return _chart(
        title,
        [
            *_axes(fifths, fifths),
            *_names("score, %", "correct, %"),
            *bars,
            f'<path class="ideal" d="M{_across(0)} {_down(0)}L{_across(1)} {_down(1)}"/>',
            *means,
            f'<text x="{_LEFT - 7}" y="{_HEIGHT + 10}" text-anchor="end">{most:,}</text>',
            f'<text x="{_LEFT - 7}" y="{_HEIGHT + _COUNTS}" text-anchor="end">0</text>',
            f'<path class="axis" d="M{_LEFT} {_HEIGHT + _COUNTS}H{_WIDTH - _RIGHT}"/>',
            f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT + _COUNTS + 16}" text-anchor="end">number of segments</text>',
        ],
        extra=_COUNTS + 20,
    )


def ticks(largest: float) -> list[float]:
    """Return 4 to 8 round numbers from 0 to `largest` or a little above; `largest` that is not positive counts as 1."""
    largest = largest if largest > 0 else 1.0
    size = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if math.ceil(largest / (size * factor) - 1e-9) <= 6)
    return [step * number for number in range(math.ceil(largest / step - 1e-9) + 1)]


def _chart(title: str, parts: Iterable[str], extra: int = 0) -> str:
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT + extra}"'
    return f'<svg class="chart" {box} role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'


def _axes(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> Iterator[str]:
    for part, label in y_ticks:
        y = _down(part)
        yield f'<path class="{"grid" if part else "axis"}" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for part, label in x_ticks:
        anchor = "end" if part == 1 else "middle"
        yield f'<text x="{_across(part):.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="{anchor}">{label}</text>'


def _names(x_name: str, y_name: str) -> Iterator[str]:
    yield f'<text class="name" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{x_name}</text>'
    yield f'<text class="name" x="{_LEFT + 6}" y="{_TOP + 12}">{y_name}</text>'


def _rectangle(kind: str, left: float, top: float, right: float, bottom: float) -> str:
    size = f'width="{max(right - left - 1, 1):.1f}" height="{bottom - top:.1f}"'
    return f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" {size}/>'


def _across(part: float) -> float:
    return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)


def _down(part: float) -> float:
    return _HEIGHT - _BOTTOM - part * (_HEIGHT - _BOTTOM - _TOP)
