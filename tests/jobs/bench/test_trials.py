"""The trials of jobs/bench/chaos.py: one of them, and that they can fail."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.bench.shared import trials
from jobs.bench.shared.faults import KINDS, Kind, Trial
from jobs.bench.shared.trial_environment import GLOBAL, STEPS, base_config
from jobs.bench.shared.trials import attempt, reference_of
from pipelines.config.train import TrainConfig

OF_THIS_SESSION: Any = SimpleNamespace(storage=SimpleNamespace(mode="ok"), mlflow=SimpleNamespace(mode="ok"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Describe the runs of the trials, with room for four workers on two CPUs."""
    config = base_config(tmp_path_factory.mktemp("trials"))
    return replace(config, scaling=replace(config.scaling, cpus_per_worker=0.25))


@pytest.fixture(scope="module")
def reference(ray_session: str, base: TrainConfig) -> Callable[[float], dict[str, str]]:
    return cache(lambda ema: reference_of(base, ema))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_worker_that_dies_while_a_checkpoint_is_written(base: TrainConfig, reference: Any) -> None:
    """Seed 5 has four workers, the reference two, and averaged weights."""
    line = attempt(5, "write", base, reference, OF_THIS_SESSION, OF_THIS_SESSION, longest=5)
    assert line["ok"], line
    assert (line["workers"], line["attempts"], line["ema"], line["causes"]) == (4, 2, 0.9, ["worker"])
    assert line["samples_exactly_once"]
    assert line["equal"]


@pytest.fixture
def scripted(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a trial with a made-up run: its events, its log of samples and its hashes."""

    def make(
        events: list[dict[str, Any]], samples: list[dict[str, Any]], hashes: dict[str, str], act: Any = id, **kind: Any
    ) -> dict[str, Any]:
        monkeypatch.setitem(KINDS, "made-up", Kind(act, **kind))
        monkeypatch.setattr(trials, "fit", lambda config: object())
        monkeypatch.setattr(trials, "hashes", lambda config: hashes)
        monkeypatch.setattr(Trial, "events", lambda self: events)
        monkeypatch.setattr(Trial, "samples", lambda self: samples)
        return attempt(1, "made-up", base, lambda ema: {"weights": "a"}, OF_THIS_SESSION, OF_THIS_SESSION, 5)

    return make


def taken(first: int, last: int) -> list[dict[str, Any]]:
    """Return the log of a worker that did the steps after `first` up to `last`."""
    return [
        {"step": step, "positions": positions, "image_ids": [7 * position for position in positions]}
        for step in range(first, last)
        for positions in [list(range(step * GLOBAL, (step + 1) * GLOBAL))]
    ]


def start(step: int, lost: int | None = None) -> dict[str, Any]:
    return {"event": "start", "step": step, "lost_steps": lost, "time": 0.0}


FAILURE = {"event": "failure", "cause_class": "worker", "time": 0.0}
BROKEN = [start(0), FAILURE, start(4, 2)]
AGAIN = [*taken(0, 6), *taken(4, STEPS)]
SAME = {"weights": "a"}


def test_a_run_that_ends_like_the_reference_is_fine(scripted: Any) -> None:
    line = scripted(BROKEN, AGAIN, SAME)
    assert line["ok"], line
    assert (line["steps_lost"], line["steps_repeated"], line["attempts"]) == ([2], 2, 2)


@pytest.mark.parametrize(
    ("events", "samples", "hashes", "kind", "check"),
    [
        (BROKEN, AGAIN, {"weights": "b"}, {}, "equal"),
        ([start(0)], taken(0, STEPS), SAME, {}, "broken"),
        (BROKEN, AGAIN[:-1], SAME, {}, "samples_exactly_once"),  # a step is missing
        (BROKEN, [*AGAIN, {**AGAIN[0], "step": 1}], SAME, {}, "samples_exactly_once"),  # two steps with one sample
        (BROKEN, [*AGAIN, {**AGAIN[0], "image_ids": GLOBAL * [1]}], SAME, {}, "samples_exactly_once"),  # another image
        (BROKEN, AGAIN, SAME, {"bound": 1}, "within_bound"),
        # Nobody knows how many steps a lost driver had done, except from the samples.
        ([start(0), FAILURE, start(4)], AGAIN, SAME, {"bound": 1}, "within_bound"),
    ],
)
def test_a_trial_can_fail(scripted: Any, events: Any, samples: Any, hashes: Any, kind: Any, check: str) -> None:
    line = scripted(events, samples, hashes, **kind)
    assert line[check] is False
    assert not line["ok"]


def test_an_outage_must_not_cost_a_restart(scripted: Any) -> None:
    line = scripted(BROKEN, AGAIN, SAME, restarts=0)
    assert line["needless_restart"] is True
    assert line["ok"] is False


def test_an_outage_that_nothing_met_is_no_trial(scripted: Any) -> None:
    def unmet(trial: Trial) -> None:
        trial.refused = 0

    line = scripted(BROKEN, AGAIN, SAME, act=unmet)
    assert line["broken"] is line["ok"] is False
