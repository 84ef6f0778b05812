"""From finished trials to what a person reads: a ranking, a table, what mattered, and a picture."""

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from csv import writer
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.stats import rankdata

_GROUPS = {"finished": 0, "failed": 2}  # all others 1
_LAST_GROUP = 3


@dataclass(frozen=True)
class TrialRecord:
    """What became of one trial."""

    name: str
    values: dict[str, Any]
    """The leaves that the sweep varies, by their dotted names."""
    status: str
    """`finished`, `stopped early` or `failed`; `waiting` or `running` before it has ended."""
    results: list[tuple[int, float]]
    """Step and quick PQ, a fraction, in the order of the steps."""
    cause: str = ""
    """Of a failure."""

    @property
    def last(self) -> tuple[int, float]:
        """Step and PQ of the furthest evaluation; (0, nan) without any."""
        return self.results[-1] if self.results else (0, math.nan)


def tied(records: Iterable[TrialRecord]) -> bool:
    """Tell whether several trials have a result and all of them the same PQ, such as 0 before anything is learned."""
    found = [trial.last[1] for trial in records if trial.results]
    return len(found) > 1 and len(set(found)) == 1


def ranking(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Sort trials, the best first: those that reached the end by their last PQ, then the others by how far they came.

    A PQ counts at the trial's furthest step. PQs after different numbers of steps say little about each other, and a
    trial comes far by beating others on its way; so among the unfinished the step counts first. A failed trial, which
    may not be able to go further, comes after those that were stopped. Trials without a PQ are last.
    """
    return sorted(records, key=_merit)


def _merit(record: TrialRecord) -> tuple[int, int, float, str]:
    step, pq = record.last
    if math.isnan(pq):
        return (_LAST_GROUP, 0, 0.0, record.name)
    group = _GROUPS.get(record.status, 1)
    return (group, -step if group else 0, -pq, record.name)


# ---- what mattered


def importance(records: Iterable[TrialRecord]) -> list[tuple[str, float, str | None]]:
    """Measure how closely the PQ follows each leaf, from 0 to 1; return leaf, score and direction, the closest first.

    All trials are compared at the last step that all of them reached. Numbers: |Spearman's rank correlation|, and `+`
    if more is better, else `-`. Others: the correlation ratio of the ranks, eta, which is |Spearman's| for two values;
    None for the direction. NaN where nothing can be said: fewer than three trials, one PQ, one value, or no value
    tried twice.
    """
    compared, _, pqs = _compared(records)
    scores = [
        (leaf, *_association([record.values.get(leaf) for record in compared], pqs)) for leaf in _leaves(compared)
    ]
    return sorted(scores, key=lambda score: (1 if math.isnan(score[1]) else -score[1], score[0]))


def importance_text(records: Iterable[TrialRecord]) -> str:
    """Return `importance` for a terminal, with how much of it chance alone would give."""
    records = list(records)
    compared, step, _ = _compared(records)
    count = len(compared)
    if count < 3:
        return f"What mattered: nothing can be said from {count} trial(s) with a PQ at the same step."
    lines = [f"What mattered, over {count} trials at step {step} (0: unrelated to the PQ, 1: decides its order)"]
    scores = importance(records)
    width = max((len(leaf) for leaf, _, _ in scores), default=0)
    for leaf, score, direction in scores:
        meaning = {"+": "  more is better", "-": "  less is better", None: ""}[direction]
        lines.append(f"  {leaf:<{width}}  {'too few values' if math.isnan(score) else f'{score:.2f}{meaning}'}")
    chance = min(1.96 / math.sqrt(count - 1), 1.0)
    lines.append(
        f"A hint, no more: over {count} trials a number without influence reaches {chance:.2f} once in twenty."
    )
    return "\n".join(lines)


def _compared(records: Iterable[TrialRecord]) -> tuple[list[TrialRecord], int, np.ndarray]:
    """Return the trials with a result, the last step at which all of them have one, and their PQs there.

    No trials where there is no such step.
    """
    by_step = {}
    for record in records:
        pqs = {step: pq for step, pq in record.results if not math.isnan(pq)}
        if pqs:
            by_step[record.name] = record, pqs
    common = set.intersection(*(set(pqs) for _, pqs in by_step.values())) if by_step else set()
    if not common:
        return [], 0, np.empty(0)
    step = max(common)
    return [record for record, _ in by_step.values()], step, np.array([pqs[step] for _, pqs in by_step.values()])


def _association(values: list[Any], pqs: np.ndarray) -> tuple[float, str | None]:
    groups = {value: [k for k, other in enumerate(values) if other == value] for value in values}
    if len(values) < 3 or len(groups) < 2 or np.ptp(pqs) == 0:
        return math.nan, None
    ranks = rankdata(pqs)
    if all(_is_number(value) for value in values):
        rho = float(np.corrcoef(rankdata(values), ranks)[0, 1])
        return abs(rho), "+" if rho > 0 else "-" if rho < 0 else None
    if len(groups) == len(values):
        return math.nan, None
    between = sum(len(members) * (ranks[members].mean() - ranks.mean()) ** 2 for members in groups.values())
    return math.sqrt(between / ((ranks - ranks.mean()) ** 2).sum()), None


# ---- tables


def table(records: Iterable[TrialRecord]) -> str:
    """Return the trials for a terminal, the best first, PQ in percent; the causes of failures below."""
    records = ranking(records)
    leaves = _leaves(records)
    rows = [["trial", "status", "step", "PQ", *_short(leaves)]]
    for record in records:
        step, pq = record.last
        percent = "-" if math.isnan(pq) else f"{100 * pq:.1f}"
        values = [_shown(record.values[leaf]) if leaf in record.values else "" for leaf in leaves]
        rows.append([record.name, record.status, f"{step:,}" if record.results else "-", percent, *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([f"{row[0]:<{widths[0]}}", f"{row[1]:<{widths[1]}}", *_right(row[2:], widths[2:])]) for row in rows
    ]
    failures = [f"{record.name}: {' '.join(record.cause.split())}" for record in records if record.cause]
    return "\n".join([*lines, *failures])


def csv(records: Iterable[TrialRecord]) -> str:
    """Return the trials as CSV, the best first, with every leaf's full name and PQ as a fraction."""
    records = ranking(records)
    leaves = _leaves(records)
    text = io.StringIO()
    lines = writer(text, lineterminator="\n")
    lines.writerow(["trial", "status", "step", "pq", *leaves, "cause"])
    for record in records:
        step, pq = record.last if record.results else ("", "")
        values = [_exact(record.values[leaf]) if leaf in record.values else "" for leaf in leaves]
        lines.writerow([record.name, record.status, step, pq, *values, record.cause])
    return text.getvalue()


def _right(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]


def _leaves(records: Iterable[TrialRecord]) -> list[str]:
    return list(dict.fromkeys(leaf for record in records for leaf in record.values))


def _short(leaves: Sequence[str]) -> list[str]:
    """Return the last part of each leaf's name, or the whole name where that is not enough."""
    last = [leaf.rpartition(".")[2] for leaf in leaves]
    return [part if last.count(part) == 1 else leaf for leaf, part in zip(leaves, last, strict=True)]


def _exact(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- the picture

_TICK: dict[str, Any] = {
    "fontsize": 8, "va": "center", "parse_math": False, "zorder": 9,
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.8},
}  # fmt: skip


@dataclass(frozen=True)
class _Scale:
    """One vertical axis: where a value stands, from 0 to 1, and what is written beside it."""

    label: str
    heights: list[float]
    """Of each trial."""
    ticks: list[tuple[float, str]]


def parallel_coordinates(records: Iterable[TrialRecord]) -> bytes:
    """Draw every trial that has a PQ as a line over its leaves and its PQ; return a PNG.

    The colour is the PQ, the trials that did not reach the end are dashed, and the best is thick and named.
    """
    records = list(records)
    drawn = [record for record in ranking(records) if not math.isnan(record.last[1])]
    leaves = _leaves(drawn)
    figure = Figure(figsize=(2.5 + 1.9 * max(len(leaves), 2), 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    if not drawn:
        figure.suptitle(f"None of {len(records)} trials has a PQ")
        return _png(figure)
    pqs = [100 * record.last[1] for record in drawn]
    scales = [_scale(leaf, [record.values.get(leaf) for record in drawn]) for leaf in leaves]
    scales.append(_scale("PQ, percent", pqs, log_from=math.inf))
    shade = Normalize(min(pqs), max(pqs))
    opacity = min(1.0, 6 / math.sqrt(len(drawn)))
    for place, record in reversed(list(enumerate(drawn))):  # the best above the others
        heights = [scale.heights[place] for scale in scales]
        color = colormaps["viridis"](float(shade(pqs[place])))
        ended = record.status == "finished"
        style = "-" if ended else "--"
        if place == 0:
            axes.plot(heights, color="black", linewidth=5, linestyle=style)
        axes.plot(
            heights,
            color=color,
            linewidth=3 if place == 0 else 1.5 if ended else 0.9,
            linestyle=style,
            alpha=1 if place == 0 else opacity,
        )
    for position, scale in enumerate(scales):
        axes.axvline(position, color="0.3", linewidth=0.8, zorder=0)
        axes.text(position, 1.06, scale.label, ha="center", va="bottom", fontsize=9)
        side, offset = ("left", 0.05) if position == len(leaves) else ("right", -0.05)
        for height, text in scale.ticks:
            axes.plot([position - 0.02, position + 0.02], [height, height], color="0.3", linewidth=0.8)
            axes.text(position + offset, height, text, ha=side, **_TICK)
    axes.set_xlim(-0.5, len(leaves) + 0.5)
    axes.set_ylim(-0.05, 1.05)
    best, hidden = drawn[0], len(records) - len(drawn)
    step, pq = best.last
    figure.suptitle(
        f"Best of {len(records)} trials: {best.name}, PQ {100 * pq:.1f} at step {step:,}\n"
        f"dashed: did not reach the end{f'; not drawn: {hidden} without a PQ' if hidden else ''}",
        parse_math=False,
    )
    figure.colorbar(ScalarMappable(shade, "viridis"), ax=axes, label="PQ at the furthest step, percent", shrink=0.8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _scale(name: str, values: list[Any], log_from: float = 20) -> _Scale:
    """Lay out one axis: numbers linearly, or by their logarithms if they span that factor; the rest evenly spaced."""
    lines = textwrap.wrap(name.replace("_", "_ ").replace(".", ". "), 18)
    label = "\n".join(lines).replace("_ ", "_").replace(". ", ".")
    if not all(_is_number(value) for value in values):
        names = sorted({_shown(value) for value in values})
        height_of = {text: (place + 0.5) / len(names) for place, text in enumerate(names)}
        return _Scale(
            label,
            [height_of[_shown(value)] for value in values],
            [(height, text if len(text) <= 18 else f"…{text[-17:]}") for text, height in height_of.items()],
        )
    low, high = min(values), max(values)
    if low == high:
        return _Scale(label, [0.5] * len(values), [(0.5, _shown(low))])
    log = low > 0 and high > log_from * low
    along, back = (math.log, math.exp) if log else (float, float)
    start, length = along(low), along(high) - along(low)
    marks = sorted(set(values))
    if len(marks) > 6:
        marks = [back(start + length * part / 4) for part in range(5)]
        if all(isinstance(value, int) for value in values):
            marks = sorted(set(map(round, marks)))
    ticks: list[tuple[float, str]] = []
    for mark in marks:
        height = (along(mark) - start) / length
        if not ticks or height - ticks[-1][0] > 0.045:  # two labels closer than this overlap
            ticks.append((height, f"{mark:.3g}" if isinstance(mark, float) else str(mark)))
    return _Scale(label, [(along(value) - start) / length for value in values], ticks)
