"""The account of a run, against made-up runs whose every second has a label."""

import json
import math
import random
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import pytest

from pipelines.storage import Location, locate
from pipelines.training import goodput
from pipelines.training.goodput import PARTS, RECOVERY, WORK, account, describe, duration, metrics, read, summary

OLD = ("began", "entered", "restored", "until", "split", "cause_class")


@dataclass
class Made:
    """A made-up run: what really happened, and what driver and workers wrote about it."""

    now: float = 1.7e9
    intervals: list[tuple[str, float]] = field(default_factory=list)
    """Label and seconds. Labels are those of PARTS, but with `start`, `restore` and `first_batch` for every start."""
    events: list[dict[str, Any]] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)
    """Whether the interval belongs to a start that follows no failure."""
    ended_after: list[int] = field(default_factory=list)
    """For each attempt, how many intervals there were when it died."""
    ends: list[int] = field(default_factory=list)
    """How many intervals there were when the run ended."""
    lost: list[int | None] = field(default_factory=list)
    attempt: int = 0
    saved: int = 0
    reached: int = 0
    highest: int = 0
    is_fresh: bool = True

    def spend(self, label: str, seconds: float) -> float:
        self.intervals.append((label, seconds))
        self.fresh.append(self.is_fresh)
        self.now += seconds
        return self.now

    def write(self, event: str, **facts: Any) -> None:
        self.events.append({"event": event, "time": self.now, "attempt": self.attempt, **facts})

    def begin(self, rng: random.Random) -> dict[str, Any]:
        """Start an attempt up to its first batch; return what its status says."""
        self.attempt += 1
        began = self.now
        entered, restored = self.spend("start", rng.uniform(1, 9)), self.spend("restore", rng.uniform(0.1, 5))
        if self.lost:
            self.lost[-1] = self.reached - self.saved
        self.lost.append(None)
        self.reached = self.saved
        self.write(
            "start", workers=2, step=self.saved, began=began, entered=entered, restored=restored, lost_steps=None
        )
        return {"attempt": self.attempt, "began": began, "entered": entered, "restored": restored}

    def work(self, rng: random.Random, pieces: int) -> dict[str, Any]:
        """Do some of an attempt's work; return what rank 0 measured."""
        first = len(self.intervals)
        self.spend("first_batch", rng.uniform(0.1, 2))
        for _ in range(pieces):
            label = rng.choice(WORK)
            if label in ("steps", "repeated"):
                # Steps that were done before come first.
                label = "repeated" if self.reached < self.highest else "steps"
                self.reached += 1
                self.highest = max(self.highest, self.reached)
            if label == "checkpoint":
                self.saved = self.reached
            self.spend(label, rng.uniform(0.01, 3))
        split = dict.fromkeys(("first_batch", *WORK), 0.0)
        for label, seconds in self.intervals[first:]:
            split[label] += seconds
        return {"until": self.now, "split": split, "step": self.reached}

    def die(self) -> None:
        self.ended_after.append(len(self.intervals))
        self.is_fresh = False

    def away(self, rng: random.Random) -> None:
        self.spend("away", rng.uniform(10, 1e5))

    @property
    def seconds(self) -> dict[str, float]:
        """What the account must say."""
        sums = dict.fromkeys((*PARTS, "away"), 0.0)
        for (label, seconds), fresh in zip(self.intervals, self.fresh, strict=True):
            sums["start_up" if fresh and label in ("start", "restore", "first_batch") else label] += seconds
        return sums

    def recovery(self, index: int) -> dict[str, float] | None:
        """What the account must say about the recovery from an attempt: all until the next step."""
        first = self.ended_after[index]
        after = list(takewhile(lambda each: each[0] not in ("steps", "repeated"), self.intervals[first:]))
        last = first + len(after)
        if last == len(self.intervals) or any(first <= end <= last for end in self.ends):
            return None
        return {part: sum(value for label, value in after if label == part) for part in RECOVERY}


def make(seed: int, attempts: int = 8) -> Made:
    """Make up a run in which everything happens, that ends at last."""
    rng, made = random.Random(seed), Made()
    for turn in range(attempts):
        last = turn == attempts - 1
        kind = "end" if last else rng.choice(["failure", "failure", "before start", "restart", "driver", "stop"])
        if kind == "before start":
            made.attempt += 1
            began = made.now
            made.spend("start", rng.uniform(1, 60))
            made.lost.append(None)
            if turn:  # it has no steps; the loss is that of the one before it
                made.lost[-1], made.lost[-2] = made.lost[-2], made.lost[-1]
            made.write("failure", began=began, step=None, cause="no node", cause_class="start")
            made.die()
            made.spend("wait", rng.uniform(0, 2))
            continue
        made.begin(rng)
        facts = made.work(rng, rng.choice([0, 1, 5, 20]))
        if kind in ("stop", "restart", "end"):
            made.saved = made.reached
        if kind in ("end", "stop"):
            made.ended_after.append(len(made.intervals))
            made.spend("shutdown", rng.uniform(0.1, 3))
            made.ends.append(len(made.intervals))
            made.write("end", status="finished" if last else "stopped", cause="", cause_class="user", **facts)
            made.is_fresh = True
            if not last:
                made.away(rng)
            continue
        made.die()
        if kind == "driver":
            made.away(rng)
            made.write("failure", cause="the driver was lost", cause_class="driver", **facts)
            continue
        made.spend("detect", rng.uniform(0, 5))
        made.write(kind, cause="worker 1: killed", cause_class="worker", **facts)
        made.spend("wait", rng.uniform(0, 2))
    return made


def check(made: Made, found: goodput.Goodput) -> None:
    expected = made.seconds
    away = expected.pop("away")
    assert found.seconds == pytest.approx(expected, abs=1e-5)
    assert found.away == pytest.approx(away, abs=1e-5)
    assert found.wall == pytest.approx(sum(expected.values()), abs=1e-5)
    assert found.recovery == pytest.approx(sum(expected[part] for part in RECOVERY), abs=1e-5)


@pytest.mark.parametrize("seed", range(200))
def test_every_second_of_a_run_is_in_its_part(seed: int) -> None:
    made = make(seed)
    found = account(made.events)
    check(made, found)
    assert len(found.attempts) == made.attempt == len(made.ended_after)
    for index, attempt in enumerate(found.attempts):
        assert attempt.number == index + 1
        expected = made.recovery(index)
        if expected is None:
            assert attempt.recovery is None
        else:
            assert attempt.recovery is not None
            assert {part: attempt.recovery.get(part, 0.0) for part in RECOVERY} == pytest.approx(expected, abs=1e-5)
    for event, before in zip(made.events[1:], made.events, strict=False):
        if event["event"] == "start" and before.get("step") is not None:
            assert found.attempts[before["attempt"] - 1].lost_steps == before["step"] - event["step"]
    assert found.attempts[-1].lost_steps is None


def test_all_outcomes_were_made_up() -> None:
    """The oracle above is worth something only if the runs it makes are of all kinds."""
    every = [make(seed) for seed in range(200)]
    spent = {part for part in (*PARTS, "away") if any(made.seconds[part] > 0 for made in every)}
    assert spent == {*PARTS, "away"} - {"unknown"}
    pairs = {(before["event"], after["event"]) for made in every for before, after in pairwise(made.events)}
    assert ("failure", "failure") in pairs  # a failure during the recovery from a failure


@pytest.mark.parametrize("seed", range(50))
def test_a_run_that_is_training_or_whose_driver_was_lost(seed: int) -> None:
    """The time until the last status is known, too."""
    rng = random.Random(seed)
    made = make(seed, attempts=3)
    made.away(rng)
    facts = {**made.begin(rng), **made.work(rng, 10), "phase": "training"}
    made.spend("unknown", 0.5)
    status = {**facts, "time": made.now}
    check(made, account(made.events, status))
    assert account(made.events, status).attempts[-1].reached == made.reached
    assert account(made.events, status).attempts[-1].ended == ""

    # The next driver copies it into the ledger.
    made.spend("away", 1000)
    lost = {key: facts[key] for key in ("attempt", "step", "until", "split")}
    made.events.append(
        {"event": "failure", "time": made.now, "cause": "the driver was lost", "cause_class": "driver", **lost}
    )
    made.intervals = [(label if label != "unknown" else "away", seconds) for label, seconds in made.intervals]
    made.is_fresh = False
    made.begin(rng)
    check(made, account(made.events))


@pytest.mark.parametrize("kind", ["failure", "end"])
def test_a_run_that_is_starting(kind: str) -> None:
    """An attempt has no event yet; it follows a failure or, in another command, the end."""
    rng, made = random.Random(0), Made()
    made.begin(rng)
    facts = made.work(rng, 20)
    made.spend("detect" if kind == "failure" else "shutdown", 2.0)
    made.write(kind, status="stopped", cause="", cause_class="worker", **facts)
    made.is_fresh = kind == "end"
    made.spend("wait" if kind == "failure" else "away", 7.0)
    began = made.now
    made.spend("start", 4.0)
    status = {"attempt": 2, "began": began, "phase": "starting", "time": made.now}
    found = account(made.events, status)
    check(made, found)
    assert [attempt.number for attempt in found.attempts] == [1, 2]
    assert found.attempts[0].recovery is None


def test_a_status_of_before_the_end_adds_nothing() -> None:
    made = make(3)
    last = made.events[-1]
    for phase, time in (("training", last["time"] - 1), ("ended", last["time"] + 1)):
        status = {"attempt": made.attempt, "began": last["time"] - 50, "phase": phase, "time": time, "step": 1}
        assert account(made.events, status) == account(made.events)


def test_a_run_that_waits_for_resources() -> None:
    rng, made = random.Random(0), Made()
    made.begin(rng)
    facts = made.work(rng, 20)
    made.spend("detect", 1.0)
    made.write("failure", cause="lost", cause_class="node", **facts)
    made.is_fresh = False
    made.spend("wait", 300.0)
    # The status still has the attempt before.
    status = {"attempt": 1, "began": made.events[0]["began"], "phase": "waiting for resources", "time": made.now}
    check(made, account(made.events, status))


def test_a_driver_that_was_lost_while_no_attempt_was_open() -> None:
    rng, made = random.Random(0), Made()
    made.begin(rng)
    made.write("failure", cause="lost", cause_class="node", **made.work(rng, 20))
    made.is_fresh = False
    made.spend("away", 500.0)
    made.write("failure", cause="the driver was lost", cause_class="driver", step=None)
    made.begin(rng)
    found = account(made.events)
    check(made, found)
    assert len(found.attempts) == 2


@pytest.mark.parametrize("seed", range(20))
def test_a_ledger_of_before(seed: int) -> None:
    """Without the times inside an attempt, the wall time is the same; what is not known is in a part of its own."""
    made = make(seed)
    old = [{key: value for key, value in event.items() if key not in OLD} for event in made.events]
    found = account(old)
    assert found.wall + found.away == pytest.approx(old[-1]["time"] - old[0]["time"], abs=1e-5)
    assert found.seconds["unknown"] == pytest.approx(found.wall, abs=1e-5)
    assert found.useful_share == 0
    lost_at = [index for index, event in enumerate(made.events) if event.get("cause_class") == "driver"]
    gaps = [old[index + 1]["time"] - old[index]["time"] for index in lost_at]
    gaps += [after["time"] - before["time"] for before, after in pairwise(old) if before["event"] == "end"]
    assert found.away == pytest.approx(sum(gaps), abs=1e-5)
    assert "unknown" in summary(found)


@pytest.mark.parametrize("seed", range(50))
def test_the_parts_add_up_whatever_is_missing(seed: int) -> None:
    """Lines and facts left out, clocks that differ: no second is counted twice, none is negative."""
    rng = random.Random(seed)
    events = [dict(event) for event in make(seed).events if rng.random() > 0.2]
    for event in events:
        for key in OLD:
            if rng.random() < 0.2:
                event.pop(key, None)
            elif key in event and isinstance(event[key], float):
                event[key] += rng.gauss(0, 20)
        event["time"] += rng.gauss(0, 5)
    while events[0]["event"] != "start":
        events.pop(0)
    events.append({"event": "start", "time": max(event["time"] for event in events) + 1})
    found = account(events)
    first = min(events[0]["time"], events[0].get("began", math.inf))
    last = max([event["time"] for event in events] + [event.get("began", 0.0) for event in events])
    assert min(found.seconds.values()) >= 0
    assert found.away >= 0
    total = found.wall + found.away
    assert events[-1]["time"] - first - 1e-5 <= total <= last - first + 1e-5
    summary(found)


def test_a_clock_that_is_ahead_does_not_stretch_an_attempt() -> None:
    rng, made = random.Random(1), Made()
    made.begin(rng)
    facts = made.work(rng, 20)
    made.write("end", status="finished", **facts)
    events = [
        {
            **event,
            **{key: event[key] + 30 for key in ("entered", "restored", "until") if key in event},
        }
        for event in made.events
    ]
    found, expected = account(events), account(made.events)
    assert found.wall == pytest.approx(expected.wall, abs=1e-5)
    assert found.seconds["steps"] == pytest.approx(expected.seconds["steps"], abs=1e-5)


@pytest.mark.parametrize(
    "value", [None, "x", True, [], {}, math.nan, math.inf, -math.inf, 10**400, -5, 1e300, {"steps": "x"}, ["steps"]]
)
def test_values_that_make_no_sense(value: Any) -> None:
    made = make(2)
    keys = sorted({key for event in made.events for key in event} - {"event"})
    for key in keys:
        events = [{**event, key: value} if key in event else event for event in made.events]
        found = account(events, {"time": value, "split": value, "attempt": value, "began": value, "until": value})
        assert math.isfinite(found.wall + found.away)
        assert all(math.isfinite(each) for each in metrics(found).values())
        summary(found)
    assert account([{"event": value, "time": 1.0}, {"time": 1.0}]).attempts == []


def test_nothing() -> None:
    found = account([])
    assert (found.wall, found.useful_share, found.attempts) == (0, 0, [])
    assert summary(found) == "Goodput 0.0 %: of 0.0 s, 0.0 s were new steps."
    assert metrics(found)["goodput/useful_share"] == 0


def test_figures_for_mlflow() -> None:
    made = make(4)
    found, expected = account(made.events), made.seconds
    away, wall = expected["away"], sum(expected.values()) - expected["away"]
    values = metrics(found)
    assert values["goodput/useful_share"] == pytest.approx(expected["steps"] / wall)
    assert values["goodput/seconds_wall"] == pytest.approx(wall)
    assert values["goodput/seconds_away"] == pytest.approx(away)
    assert values["goodput/seconds_recovery"] == pytest.approx(
        sum(values[f"goodput/seconds_recovery_{part}"] for part in RECOVERY)
    )
    assert values["goodput/attempts"] == 8
    assert values["goodput/failures"] == sum(event["event"] == "failure" for event in made.events)
    parts = [f"goodput/seconds_{part}" for part in ("recovery", *PARTS) if part not in RECOVERY]
    assert sum(values[part] for part in parts) == pytest.approx(wall)


def test_the_summary_of_a_run_without_failures_is_short() -> None:
    rng, made = random.Random(0), Made()
    made.begin(rng)
    facts = made.work(rng, 30)
    made.spend("shutdown", 2.0)
    made.write("end", status="finished", cause="", cause_class="user", **facts)
    lines = summary(account(made.events)).splitlines()
    assert len(lines) <= 12
    share = 100 * made.seconds["steps"] / sum(made.seconds.values())
    assert lines[0].startswith(f"Goodput {share:.1f} %: ")
    assert [line.split("  ")[1] for line in lines[1:3]] == ["steps", "waiting for data"]
    percents = [float(line.split()[-2]) for line in lines[1:]]
    assert sum(percents) == pytest.approx(100, abs=0.5)


def test_the_summary_names_each_failure_and_its_cost() -> None:
    events = [
        {"event": "start", "time": 6.0, "attempt": 1, "step": 0, "workers": 2, "began": 0.0,
         "entered": 5.0, "restored": 6.0},
        {"event": "failure", "time": 60.0, "attempt": 1, "step": 25, "cause": "worker 1: killed",
         "cause_class": "worker", "until": 58.0, "split": {"first_batch": 1.0, "steps": 51.0}},
        {"event": "start", "time": 66.0, "attempt": 2, "step": 20, "workers": 1, "began": 60.5, "entered": 65.0,
         "restored": 66.0, "lost_steps": 5},
        {"event": "end", "time": 100.0, "attempt": 2, "step": 40, "status": "finished", "cause_class": "user",
         "until": 99.0, "split": {"first_batch": 0.25, "repeated": 10.0, "steps": 22.75}},
    ]  # fmt: skip
    assert summary(account(events)).splitlines() == [
        "Goodput 73.8 %: of 0:01:40, 73.8 s were new steps.",
        "  steps                       73.8 s   73.8 %",
        "  repeated steps              10.0 s   10.0 %",
        "  start                        7.0 s    7.0 %",
        "  recovery                     8.2 s    8.2 %  "
        "(detect 2.0 s, wait 0.5 s, start 4.5 s, restore 1.0 s, first batch 0.2 s)",
        "  shutdown                     1.0 s    1.0 %",
        "2 attempts, 1 failed, 5 steps repeated",
        "  attempt 1: 2 workers, step 0 to 25, 5 steps repeated, 8.2 s to recover; worker: worker 1: killed",
        "  attempt 2: 1 worker, step 20 to 40; finished",
    ]


def test_only_the_last_attempts_are_listed() -> None:
    lines = summary(account(make(0, attempts=30).events)).splitlines()
    listed = [line for line in lines if line.startswith("  attempt ")]
    assert [int(line.split()[1].rstrip(":")) for line in listed] == list(range(21, 31))
    assert "30 attempts, " in "\n".join(lines)
    assert "attempt 1:" not in summary(account(make(0).events), most=0)


def test_text_of_a_ledger_cannot_control_a_terminal() -> None:
    cause = "\x1b[2J\r\nerror: \u202egnp\ud800 \x9b1m ü " + "x" * 1000
    events = [{"event": "failure", "time": 1.0, "attempt": 1, "cause": cause, "cause_class": "\x07node", "step": None}]
    text = summary(account(events))
    assert text.replace("\n", "").isprintable()
    text.encode()
    assert "\\x1b[2J\\r\\nerror: \\u202egnp\\ud800 \\x9b1m ü xxx" in text
    assert max(map(len, text.splitlines())) < 300
    assert describe(account(events).attempts[0]).startswith("attempt 1: did not start; \\x07node: ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (12.34, "12.3 s"), (99.94, "99.9 s"), (99.96, "0:01:40"), (3723, "1:02:03"), (90061, "1 d 1:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path) -> Location:
    return locate(tmp_path / "run" if request.param == "local" else request.getfixturevalue("bucket") + "/run")


def test_reading_a_folder(folder: Location) -> None:
    made = make(5)
    assert read(folder) == goodput.History([], {}, [])
    lines = [json.dumps(event) for event in made.events]
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "status.json").write_text('{"time": 1}')
    assert read(folder) == goodput.History(made.events, {"time": 1}, [])


def test_damaged_lines_are_left_out_and_counted(folder: Location) -> None:
    made = make(5)
    lines = [json.dumps(event).encode() for event in made.events]
    bad = [b"\xff\xfe", b"[1]", b"null", b'{"event": "start"}', b'{"event": "start", "time": "x"}', b"[" * 100_000]
    bad += [b'{"event": "start", "time": NaN}', b'{"event": ["end"], "time": 1}', lines[0][:20]]
    (folder / "ledger.jsonl").write_bytes(b"\n".join([*bad[:4], b"", *lines, *bad[4:]]))
    (folder / "status.json").write_text('{"time": 17')
    assert read(folder) == goodput.History(
        made.events,
        {},
        [f"{len(bad)} damaged line(s) of ledger.jsonl are left out.", "status.json is damaged and left out."],
    )
