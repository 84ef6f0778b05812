"""Where the time of a run went, and what each of its attempts cost, from its ledger and its last status.

Needs neither Ray nor torch, so that a run can be looked at from any machine.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from maskformer.untrusted import escaped
from pipelines.storage import Location

WORK: tuple[str, ...] = ("steps", "repeated", "data", "checkpoint", "evaluation")
"""What an attempt does once it has its first batch: steps that no attempt had done before, steps that one had, waiting
for data, waiting for a checkpoint, quick PQ."""

RECOVERY: tuple[str, ...] = ("detect", "wait", "start", "restore", "first_batch")
"""From the last sign of life of an attempt to the first step of the next: until the driver knew, until it began another
attempt, until the workers' processes ran, until they had the state, until they had a batch."""

PARTS: tuple[str, ...] = (*WORK, "start_up", *RECOVERY, "shutdown", "unknown")
"""Parts of a run's wall time. `start_up` is what `start`, `restore` and `first_batch` are in the first attempt of a
run, and in the first one after its end. `shutdown` is from the last sign of life of the workers to the end of the run.
`unknown` is what the files do not tell."""

_LABELS = {
    "steps": "steps",
    "repeated": "repeated steps",
    "data": "waiting for data",
    "checkpoint": "waiting for checkpoints",
    "evaluation": "quick PQ",
    "start_up": "start",
    "recovery": "recovery",
    "shutdown": "shutdown",
    "unknown": "unknown",
}

_EVENTS = ("start", "failure", "restart", "end")
_LONGEST_CAUSE = 200
_LARGEST = 1e11
"""Times are in seconds since 1970; a larger number in a file is an error."""

Event = Mapping[str, Any]


@dataclass
class Attempt:
    """One group of workers, from the decision to start it to its end."""

    number: int | None
    workers: int | None = None
    started: int | None = None
    """Steps done when it started; None if its workers never did."""
    reached: int | None = None
    """Steps done when it ended."""
    lost_steps: int | None = None
    """Steps of it that the next attempt repeated; None if that is not known, or there is no next one."""
    ended: str = ""
    """`failure`, `restart`, or the status of the run that ended with it. Empty if it has not ended."""
    cause_class: str = ""
    cause: str = ""
    recovery: dict[str, float] | None = None
    """Seconds from its last sign of life to the next step of any attempt, by RECOVERY and `unknown`, without those in
    which no driver ran. None if the run did not go on from it, or not yet."""


@dataclass
class Goodput:
    """What the time of a run went into."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """By PARTS; they add up to the wall time."""
    away: float = 0.0
    """Seconds in which no driver ran, between two commands. They are not part of the wall time."""
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def wall(self) -> float:
        """Seconds in which a driver ran."""
        return sum(self.seconds.values())

    @property
    def recovery(self) -> float:
        """Seconds of recovery."""
        return sum(self.seconds[part] for part in RECOVERY)

    @property
    def useful_share(self) -> float:
        """Share of the wall time that went into steps that no attempt had done before, 0..1."""
        return self.seconds["steps"] / self.wall if self.wall else 0.0

    @property
    def lost_steps(self) -> int:
        """Steps that were done again, as far as known."""
        return sum(attempt.lost_steps or 0 for attempt in self.attempts)

    @property
    def failures(self) -> int:
        """Attempts that failed."""
        return sum(attempt.ended in ("failure", "failed") for attempt in self.attempts)


@dataclass(frozen=True)
class History:
    """What a run's folder says about its past."""

    events: list[dict[str, Any]]
    """Of the ledger, oldest first."""
    status: dict[str, Any]
    """The last status; empty if there is none."""
    notes: list[str]
    """What could not be read, a line each."""


def read(run: Location) -> History:
    """Read ledger and status of a run. What is damaged is left out, with a note.

    Raises:
        UserError: the storage cannot be read.
    """
    notes: list[str] = []
    lines = [line for line in (_text(run / "ledger.jsonl") or "").split("\n") if line.strip()]
    events = [event for event in map(_parsed, lines) if _is_event(event)]
    if len(events) < len(lines):
        notes.append(f"{len(lines) - len(events)} damaged line(s) of ledger.jsonl are left out.")
    return History(events, read_object(run / "status.json", notes), notes)


def read_object(file: Location, notes: list[str]) -> dict[str, Any]:
    """Read a JSON object. It is empty if there is no such file, or if it is damaged; then a note is added.

    Raises:
        UserError: the storage cannot be read.
    """
    text = _text(file)
    value = None if text is None else _parsed(text)
    if isinstance(value, dict):
        return value
    if text is not None:
        notes.append(f"{file.name} is damaged and left out.")
    return {}


def number(value: Any) -> float | None:
    """Return a number that was read; None if it is something else, not finite, or larger than any of a run."""
    return float(value) if type(value) in (int, float) and abs(value) <= _LARGEST else None


def count(value: Any) -> int | None:
    """Return an integer from 0 that was read; None if it is something else."""
    return value if type(value) is int and 0 <= value <= _LARGEST else None


def printable(value: Any) -> str:
    """Return a text that was read, with all escaped that a terminal might obey; empty if it is no text."""
    return escaped(value) if isinstance(value, str) else ""


def account(events: Iterable[Event], status: Event | None = None) -> Goodput:
    """Divide the time from the beginning of a run's first attempt to its end, or to the last sign of life.

    Args:
        events: of the ledger, oldest first. Facts that are missing or damaged are unknown.
        status: the last status, for a run that may not have ended.
    """
    accountant = _Accountant()
    for event in events:
        if _is_event(event):
            accountant.add(event)
    if status:
        accountant.look(status)
    return accountant.goodput


class _Accountant:
    """Follows a run in time. `_now` only moves forward, whatever the clocks of driver and workers said."""

    def __init__(self) -> None:
        self.goodput = Goodput()
        self._now: float | None = None
        self._open: Attempt | None = None
        """The attempt whose workers run."""
        self._away = False
        """Whether no driver runs."""
        self._fresh = True
        """Whether the next attempt is the first of the run, or the first after its end."""
        self._recoveries: list[tuple[Attempt, dict[str, float]]] = []
        """Attempts after whose end no step was done yet, and where the time since went."""

    def add(self, event: Event) -> None:
        """Account for the time until an event."""
        kind, time = event["event"], float(event["time"])
        if kind == "start":
            self._begin(event, time)
            self._start(event, time)
            return
        lost_driver = event.get("cause_class") == "driver" or event.get("cause") == "the driver was lost"
        if self._open is not None:
            known = self._work(event, time)
            self._close(event)
            if not (lost_driver and known):  # else nobody ran who could notice
                self._spend("shutdown" if kind == "end" else "detect", time)
        elif kind == "failure" and not lost_driver:  # before its workers started
            self._begin(event, time)
            self._open = self._append(event)
            self._spend("unknown" if number(event.get("began")) is None else "start", time)
            self._close(event)
        elif kind == "end" and self._now is not None and not self._away:
            self._spend("shutdown", time)
        self._away, self._fresh = lost_driver or kind == "end", kind == "end"
        if kind == "end":
            self._recoveries = []

    def look(self, status: Event) -> None:
        """Account for the time until the last status, unless the run had ended."""
        time, began, attempt = number(status.get("time")), number(status.get("began")), count(status.get("attempt"))
        if time is None:
            return
        if self._open is not None:
            if self._work(status, time):
                self._open.reached = count(status.get("step"))
            self._spend("unknown", time)
            return
        last = self.goodput.attempts[-1].number if self.goodput.attempts else None
        if began is not None and attempt is not None and attempt > (last or 0):  # it has no event yet
            self._begin(status, time)
            self._append(status)
            self._spend("start", time)
        elif self._now is not None and not self._away:
            self._spend("wait", time)

    def _begin(self, event: Event, time: float) -> None:
        """Account for the time before an attempt."""
        began = number(event.get("began"))
        before = time if began is None else began
        if self._open is not None:  # the line that closed it is missing
            self._work({}, before)
            self._close({"event": "failure", "cause": "the ledger does not tell", "cause_class": "unknown"})
        if self._now is None:
            self._now = min(before, time)
        elif self._away:
            self.goodput.away += max(0.0, before - self._now)
            self._now = max(self._now, before)
        else:
            self._spend("unknown" if began is None else "wait", before)
        self._away = False

    def _append(self, event: Event) -> Attempt:
        self.goodput.attempts.append(Attempt(count(event.get("attempt"))))
        return self.goodput.attempts[-1]

    def _start(self, event: Event, time: float) -> None:
        """Open an attempt, and account for the time until its workers had the state."""
        before = [attempt for attempt in self.goodput.attempts if attempt.started is not None][-1:]
        self._open = self._append(event)
        self._open.workers, self._open.started = count(event.get("workers")), count(event.get("step"))
        for attempt in before:
            attempt.lost_steps = count(event.get("lost_steps"))
            if attempt.reached is not None and self._open.started is not None:
                attempt.lost_steps = max(0, attempt.reached - self._open.started)
        entered, restored = number(event.get("entered")), number(event.get("restored"))
        if number(event.get("began")) is None or entered is None or restored is None:
            self._spend("unknown", time)
        else:
            # A worker's clock may be ahead of the driver's.
            self._spend("start", min(entered, time))
            self._spend("restore", min(restored, time))

    def _work(self, event: Event, time: float) -> bool:
        """Account for the time from the open attempt's start to its last sign of life, and tell whether that is known.

        Args:
            event: what was written about the attempt at `time`.
        """
        assert self._open is not None
        assert self._now is not None
        if count(event.get("attempt")) not in (None, self._open.number):
            event = {}
        until, split, reached = number(event.get("until")), event.get("split"), count(event.get("step"))
        end = max(self._now, time if until is None else min(until, time))
        seconds, stepped = dict.fromkeys(("first_batch", *WORK), 0.0), reached is None
        if isinstance(split, Mapping) and until is not None:
            seconds = {part: max(0.0, number(split.get(part)) or 0.0) for part in seconds}
            stepped = seconds["steps"] + seconds["repeated"] > 0
        elif reached is not None:
            stepped = reached > (self._open.started or 0)
        # More than fits between the times is an error of the clocks.
        total = sum(seconds.values())
        scale = min(1.0, (end - self._now) / total) if total else 0.0
        self._add("first_batch", seconds.pop("first_batch") * scale)
        if stepped:
            for attempt, spent in self._recoveries:
                attempt.recovery = spent
            self._recoveries = []
        for part, value in seconds.items():
            self._add(part, value * scale)
        self._add("unknown", max(0.0, end - self._now - total * scale))
        self._now = end
        return until is not None

    def _close(self, event: Event) -> None:
        assert self._open is not None
        attempt, self._open = self._open, None
        if event["event"] != "end":
            self._recoveries.append((attempt, {}))
        attempt.ended = (printable(event.get("status")) or "end") if event["event"] == "end" else event["event"]
        attempt.reached = count(event.get("step"))
        attempt.cause_class, attempt.cause = printable(event.get("cause_class")), printable(event.get("cause"))

    def _spend(self, part: str, time: float) -> None:
        """Count the time until `time` to a part."""
        assert self._now is not None
        self._add(part, max(0.0, time - self._now))
        self._now = max(self._now, time)

    def _add(self, part: str, seconds: float) -> None:
        if part in RECOVERY or part == "unknown":
            for _, spent in self._recoveries:
                spent[part] = spent.get(part, 0.0) + seconds
        if self._fresh and part in ("start", "restore", "first_batch"):
            part = "start_up"
        self.goodput.seconds[part] += seconds


def metrics(goodput: Goodput) -> dict[str, float]:
    """Return the figures for MLflow: shares, seconds and counts."""
    seconds = {f"recovery_{part}" if part in RECOVERY else part: goodput.seconds[part] for part in PARTS}
    seconds |= {"recovery": goodput.recovery, "wall": goodput.wall, "away": goodput.away}
    return {
        "goodput/useful_share": goodput.useful_share,
        "goodput/attempts": float(len(goodput.attempts)),
        "goodput/failures": float(goodput.failures),
        "goodput/lost_steps": float(goodput.lost_steps),
        **{f"goodput/seconds_{name}": value for name, value in seconds.items()},
    }


def summary(goodput: Goodput, most: int = 10) -> str:
    """Return a table of where the time went, and a line for each of the last `most` attempts if there were several."""
    wall = goodput.wall
    rows = {part: goodput.recovery if part == "recovery" else goodput.seconds[part] for part in _LABELS}
    lines = [
        f"Goodput {100 * goodput.useful_share:.1f} %: of {duration(wall)}, {duration(rows['steps'])} were new steps."
    ]
    for part, seconds in rows.items():
        # Less than is printed is left out.
        if seconds >= max(0.05, 0.0005 * wall):
            parts = [f"{name.replace('_', ' ')} {duration(goodput.seconds[name])}" for name in RECOVERY]
            detail = f"  ({', '.join(parts)})" if part == "recovery" else ""
            lines.append(f"  {_LABELS[part]:<24}{duration(seconds):>10}{100 * seconds / wall:>7.1f} %{detail}")
    if goodput.away >= 0.05:
        lines.append(f"  {'no driver ran':<24}{duration(goodput.away):>10}")
    attempts = goodput.attempts
    if len(attempts) > 1 or goodput.failures:
        failed = f"{goodput.failures} failed" if goodput.failures else "none failed"
        lines.append(f"{len(attempts)} attempts, {failed}, {goodput.lost_steps} steps repeated")
        if len(attempts) > most:
            lines[-1] += f"; the last {most}"
        lines += [f"  {describe(attempt)}" for attempt in attempts[max(0, len(attempts) - most) :]]
    return "\n".join(lines)


def describe(attempt: Attempt) -> str:
    """Return in one line what an attempt did, why it ended, and what that cost."""
    name = f"attempt {'?' if attempt.number is None else attempt.number}"
    facts = [] if attempt.workers is None else [f"{attempt.workers} worker{'s'[: attempt.workers != 1]}"]
    if attempt.started is None:
        facts.append("did not start")
    else:
        facts.append(f"step {attempt.started} to {'?' if attempt.reached is None else attempt.reached}")
    if attempt.lost_steps:
        facts.append(f"{attempt.lost_steps} steps repeated")
    if attempt.recovery is not None:
        facts.append(f"{duration(sum(attempt.recovery.values()))} to recover")
    cause = attempt.cause
    if len(cause) > _LONGEST_CAUSE:
        cause = cause[: _LONGEST_CAUSE - 3] + "..."
    end = ": ".join(dict.fromkeys(filter(None, (attempt.cause_class, cause)))) or attempt.ended or "not ended"
    if attempt.ended in ("finished", "stopped"):
        end = attempt.ended
    return f"{name}: {', '.join(facts)}; {end}"


def duration(seconds: float) -> str:
    """Return a time span in a form such as 12.3 s, 1:02:03 or 2 d 1:02:03."""
    if round(seconds, 1) < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    days, minutes = divmod(minutes, 24 * 60)
    return f"{f'{days} d ' if days else ''}{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _is_event(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("event") in _EVENTS and number(value.get("time")) is not None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(file: Location) -> str | None:
    try:
        return file.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
