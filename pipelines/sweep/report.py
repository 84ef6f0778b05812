"""Reports on the trials of a sweep: ranking, tables, and the importance of each setting."""

import io
import math
from collections.abc import Iterable, Sequence
from csv import writer
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from maskformer.untrusted import escaped
from pipelines.columns import left, right, width

_GROUPS = {"finished": 0, "failed": 2}  # all others 1
_LAST_GROUP = 3
_LONGEST = 60
"""Characters of a cell of the table."""


@dataclass(frozen=True)
class TrialRecord:
    """Status and results of one trial."""

    name: str
    values: dict[str, Any]
    """Values of the settings that the sweep varies, by dotted name."""
    status: str
    """`waiting`, `running`, `finished`, `stopped early` or `failed`."""
    results: list[tuple[int, float]]
    """Pairs of step and quick PQ (a fraction), sorted by step."""
    cause: str = ""
    """Cause of a failure."""

    @property
    def last(self) -> tuple[int, float]:
        """Step and PQ of the last evaluation; (0, nan) if there is none."""
        return self.results[-1] if self.results else (0, math.nan)


def tied(records: Iterable[TrialRecord]) -> bool:
    """Return whether several trials have a result and all of them the same PQ, such as 0 after too few steps."""
    found = [trial.last[1] for trial in records if trial.results]
    return len(found) > 1 and len(set(found)) == 1


def ranking(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Sort trials, the best first: finished ones by their last PQ, then the others by their last step.

    The PQ of a trial is that of its last evaluation. PQs after different numbers of steps are hardly comparable, and a
    trial only gets far by beating others; so unfinished trials are sorted by step first, then by PQ. Failed trials,
    which may not be able to continue, come after those that were stopped. Trials without a PQ are last.
    """
    return sorted(records, key=_rank_key)


def _rank_key(record: TrialRecord) -> tuple[int, int, float, str]:
    step, pq = record.last
    if math.isnan(pq):
        return (_LAST_GROUP, 0, 0.0, record.name)
    group = _GROUPS.get(record.status, 1)
    return (group, -step if group else 0, -pq, record.name)


# ---- importance


def importance(records: Iterable[TrialRecord]) -> list[tuple[str, float, str | None]]:
    """Return name, score and direction of each setting, sorted by score: the association with the PQ, from 0 to 1.

    All trials are compared at the last step that all of them reached. For numbers the score is the absolute value of
    Spearman's rank correlation, and the direction is `+` if higher values are better, else `-`. For other values the
    score is the correlation ratio of the ranks, eta, which for two values equals |Spearman's|, and the direction is
    None. The score is NaN if it is undefined: fewer than three trials, a single PQ, a single value, or no value tried
    twice.
    """
    compared, _, pqs = _compared(records)
    scores = [
        (setting, *_association([record.values.get(setting) for record in compared], pqs))
        for setting in _settings(compared)
    ]
    return sorted(scores, key=lambda score: (1 if math.isnan(score[1]) else -score[1], score[0]))


def importance_text(records: Iterable[TrialRecord]) -> str:
    """Return `importance` as text for a terminal, with the score that chance alone would give."""
    records = list(records)
    compared, step, _ = _compared(records)
    count = len(compared)
    if count < 3:
        return f"Importance of settings: unknown, since only {count} trial(s) have a PQ at the same step."
    lines = [
        f"Importance of settings, from {count} trials at step {step} (0: unrelated to the PQ, 1: determines its order)"
    ]
    scores = importance(records)
    scores = [(escaped(setting), score, direction) for setting, score, direction in scores]
    first = max((width(setting) for setting, _, _ in scores), default=0)
    for setting, score, direction in scores:
        meaning = {"+": "  higher is better", "-": "  lower is better", None: ""}[direction]
        lines.append(f"  {left(setting, first)}  {'too few values' if math.isnan(score) else f'{score:.2f}{meaning}'}")
    chance = min(1.96 / math.sqrt(count - 1), 1.0)
    lines.append(f"Only a hint: with {count} trials, a number without any effect reaches {chance:.2f} once in twenty.")
    return "\n".join(lines)


def _compared(records: Iterable[TrialRecord]) -> tuple[list[TrialRecord], int, np.ndarray]:
    """Return the trials with a result, the last step at which all of them have one, and their PQs at it.

    If there is no such step, no trials are returned.
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
    """Return a table of the trials for a terminal, the best first, PQ in percent, followed by causes of failures."""
    records = ranking(records)
    settings = _settings(records)
    rows = [["trial", "status", "step", "PQ", *_short(settings)]]
    for record in records:
        step, pq = record.last
        percent = "-" if math.isnan(pq) else f"{100 * pq:.1f}"
        values = [_shown(record.values[setting]) if setting in record.values else "" for setting in settings]
        rows.append([record.name, record.status, f"{step:,}" if record.results else "-", percent, *values])
    rows = [[escaped(cell, _LONGEST) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(left, row[:2], widths[:2]), *map(right, row[2:], widths[2:])]) for row in rows]
    failures = [escaped(f"{record.name}: {' '.join(record.cause.split())}") for record in records if record.cause]
    return "\n".join([*lines, *failures])


def csv(records: Iterable[TrialRecord]) -> str:
    """Return the trials as CSV, the best first, with full setting names and PQ as a fraction."""
    records = ranking(records)
    settings = _settings(records)
    text = io.StringIO()
    lines = writer(text, lineterminator="\n")
    lines.writerow(["trial", "status", "step", "pq", *map(_cell, settings), "cause"])
    for record in records:
        step, pq = record.last if record.results else ("", "")
        values = [_cell(record.values[setting]) if setting in record.values else "" for setting in settings]
        lines.writerow(
            [_cell(record.name), _cell(record.status), step, pq, *values, _cell(" ".join(record.cause.split()))]
        )
    return text.getvalue()


def _cell(value: Any) -> str:
    """Return a value for CSV. A text that a spreadsheet would compute, such as `=1+1`, gets an apostrophe before it."""
    text = escaped(_exact(value))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not _is_number(value) else text


def _settings(records: Iterable[TrialRecord]) -> list[str]:
    return list(dict.fromkeys(setting for record in records for setting in record.values))


def _short(settings: Sequence[str]) -> list[str]:
    """Return the last part of each setting's name, or the full name where the last part is ambiguous."""
    last = [setting.rpartition(".")[2] for setting in settings]
    return [part if last.count(part) == 1 else setting for setting, part in zip(settings, last, strict=True)]


def _exact(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
