"""How many workers an attempt gets, with a made-up cluster and clock."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipelines.config.recipes import DEMO
from pipelines.errors import UserError
from pipelines.training import elastic
from pipelines.training.elastic import WorkerCount


class Cluster:
    """Stands in for Ray: the CPUs that are free on each node, those it has, and a clock that waiting moves."""

    def __init__(self) -> None:
        self.free: dict[str, float] = {}
        self.nodes: dict[str, float] = {}
        self.now = 0.0
        self.events: dict[float, Callable[[], None]] = {}

    def set(self, **nodes: float) -> None:
        self.free, self.nodes = dict(nodes), dict(nodes)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in sorted(self.events):
            if when <= self.now:
                self.events.pop(when)()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(elastic.checks, "free_resources", lambda: {n: {"CPU": c} for n, c in made.free.items()})
    monkeypatch.setattr(elastic.checks, "resources", lambda: {n: {"CPU": c} for n, c in made.nodes.items()})
    monkeypatch.setattr(elastic.time, "sleep", made.sleep)
    monkeypatch.setattr(elastic.time, "monotonic", lambda: made.now)
    return made


def count(workers: Any = "2:8", micro_batches: int = 8) -> WorkerCount:
    """Return the count of a run whose workers need one CPU each, and whose data tasks need one."""
    run = replace(DEMO.run, global_batch=micro_batches, micro_batch=1)
    scaling = replace(DEMO.scaling, workers=workers, cpus_per_worker=1, data_cpus=1, node_wait=60)
    return WorkerCount(replace(DEMO, run=run, scaling=scaling))


def unexpected() -> None:
    raise AssertionError("nothing is waited for")


@pytest.mark.parametrize(
    ("cpus", "workers"),
    [((9,), 8), ((20, 20), 8), ((8,), 4), ((5, 5), 8), ((4, 4), 4), ((3,), 2), ((3, 1), 2), ((2.5, 2.5, 2.5), 4)],
)
def test_the_most_that_divide_and_fit(cluster: Cluster, cpus: tuple[float, ...], workers: int) -> None:
    cluster.set(**{f"node{index}": cpu for index, cpu in enumerate(cpus)})
    assert count().choose(unexpected) == workers


def test_a_fixed_number_is_left_to_ray(cluster: Cluster) -> None:
    assert count(workers=4).choose(unexpected) == 4


def test_the_first_attempt_takes_what_there_is_and_waits_for_the_least(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.events[30] = lambda: cluster.set(a=3)
    assert count().choose(lambda: None) == 2
    assert 30 <= cluster.now < 32
    assert caplog.text.count("Waiting for room") == 1


@pytest.mark.parametrize(("returns_at", "workers", "waited"), [(10, 8, 10), (59, 8, 59), (200, 4, 60)])
def test_a_lost_node_has_time_to_return(
    cluster: Cluster, returns_at: float, workers: int, waited: float, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = count()
    cluster.set(a=5, b=5)
    assert chosen.choose(unexpected) == 8
    cluster.set(a=5)
    cluster.events[returns_at] = lambda: cluster.set(a=5, b=5)
    assert chosen.choose(lambda: None) == workers
    assert waited <= cluster.now < waited + 2
    assert ("with 4 workers, fewer than before (8)" in caplog.text) == (workers == 4)


def test_waiting_can_be_interrupted(cluster: Cluster) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count().choose(stop)


def test_a_returned_node_is_used(cluster: Cluster) -> None:
    """Two workers on node a; node b comes. Data tasks of the run may hold a CPU, and so may another program."""
    chosen = count()
    cluster.set(a=3)
    assert chosen.choose(unexpected) == 2
    cluster.free = {"a": 0.0}  # two workers and a data task of the run
    assert not chosen.can_grow(["a", "a"])
    cluster.nodes, cluster.free = {"a": 3, "b": 2}, {"a": 0.0, "b": 2}
    cluster.now = 700
    assert chosen.can_grow(["a", "a"])
    assert not chosen.can_grow(["a", "a"])  # asked once; not again at every look
    # The room of the workers that have ended is not free at once.
    cluster.free = {"a": 0.0, "b": 3}
    cluster.events[705] = lambda: cluster.free.update(a=3)
    assert chosen.choose(lambda: None) == 4
    assert cluster.now < 707
    cluster.free = {"a": 3, "b": 0.0}  # the next choice is not about growing
    cluster.events[2000] = lambda: None
    assert chosen.choose(lambda: None) == 2


@pytest.mark.parametrize("free", [{"a": 0.0, "b": 1}, {"a": 0.0, "b": 0.0}])
def test_what_others_use_is_not_counted(cluster: Cluster, free: dict[str, float]) -> None:
    chosen = count()
    cluster.set(a=3)
    chosen.choose(unexpected)
    cluster.nodes, cluster.free = {"a": 3, "b": 2}, free
    assert not chosen.can_grow(["a", "a"])


def test_with_the_most_workers_there_is_nothing_to_grow(cluster: Cluster) -> None:
    chosen = count("2:4")
    cluster.set(a=5)
    assert chosen.choose(unexpected) == 4
    cluster.set(a=50)
    assert not chosen.can_grow(["a"] * 4)


def test_a_range_without_a_divisor_is_refused() -> None:
    with pytest.raises(UserError, match=r"No number of workers in --scaling\.workers 5:7 divides .* 1, 2, 4, 8\."):
        count("5:7")


def test_fewer_workers_are_said(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    chosen = count()
    cluster.set(a=3)
    chosen.choose(unexpected)
    cluster.set(a=9)
    assert chosen.choose(unexpected) == 8
    assert "with 8 workers, more than before (2)" in caplog.text
