"""Numbers and causes as words."""

import math

from pipelines.evaluation.report_page.content import Cause, Interval

NONE = "–"

CAUSE_NAMES: dict[Cause, str] = {
    "missed": "missed",
    "wrong_class": "wrong class",
    "split": "split",
    "merged": "merged",
    "boundary": "boundary",
    "false_alarm": "false alarm",
}

CAUSE_MEANINGS: dict[Cause, str] = {
    "missed": "a true segment without a prediction of its class near it",
    "wrong_class": "a true segment that a prediction of another class matches, and that prediction",
    "split": "a true segment that several predictions share, and these",
    "merged": "several true segments in one prediction, and that prediction",
    "boundary": "what matches lack of an IoU of 1, and pairs of one class whose IoU is 0.1 to 0.5, too low for a match",
    "false_alarm": "a predicted segment without a true one of its class near it",
}


def percent(value: float) -> str:
    """Return a fraction in percent, without the sign."""
    return NONE if math.isnan(value) else f"{100 * value:.1f}".replace("-", "−")


def signed(value: float) -> str:
    """Return a difference of fractions in points, with its sign."""
    if math.isnan(value):
        return NONE
    points = f"{100 * value:+.1f}"
    return "0.0" if float(points) == 0 else points.replace("-", "−")


def span(interval: Interval | None) -> str:
    """Return the ends of an interval in percent."""
    return NONE if interval is None else f"{percent(interval.low)} to {percent(interval.high)}"


def p_value(value: float) -> str:
    """Return a p-value; small ones as a bound."""
    if math.isnan(value):
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
