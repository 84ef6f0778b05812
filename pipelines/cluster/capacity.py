"""Whether a job fits a cluster, live or planned. All such checks are made here."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.config.train import ScalingConfig
from pipelines.errors import UserError

_TOLERANCE = 1e-6
"""For floating-point rounding: 0.3 // 0.1 is 2."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a job needs: equal workers, each on a single node, and CPUs for data tasks on any node."""

    workers: int
    per_worker: Mapping[str, float]
    """Resources of one worker by Ray's names, CPU and possibly GPU."""
    data_cpus: float

    @classmethod
    def of(cls, scaling: ScalingConfig, workers: int | None = None) -> "Demand":
        """Return the demand of a training run, with its largest number of workers unless another is given."""
        count = scaling.max_workers if workers is None else workers
        return cls(workers=count, per_worker=scaling.per_worker, data_cpus=scaling.data_cpus)

    @property
    def total(self) -> dict[str, float]:
        """Resources of workers and data tasks together, by Ray's names."""
        workers = {kind: amount * self.workers for kind, amount in self.per_worker.items()}
        return {**workers, "CPU": workers["CPU"] + self.data_cpus}


@dataclass(frozen=True)
class Capacity:
    """The resources of a cluster's nodes, in use or not."""

    nodes: tuple[Mapping[str, float], ...]
    """Resources of each node, by Ray's names."""

    @classmethod
    def of(cls, nodes: Iterable[Mapping[str, float]]) -> "Capacity":
        """Return the capacity of nodes with these resources."""
        return cls(tuple(nodes))

    def total(self, kind: str) -> float:
        """Return how much of one resource all nodes have together."""
        return sum(node.get(kind, 0) for node in self.nodes)

    @property
    def num_nodes(self) -> int:
        """Number of nodes that exchange gradients: those with GPUs if there are any, otherwise all."""
        return sum(node.get("GPU", 0) > 0 for node in self.nodes) or len(self.nodes)

    def slots(self, per_worker: Mapping[str, float]) -> list[int]:
        """Count the workers that each node can hold."""
        return [_times(node, per_worker) for node in self.nodes]

    def jobs(self, demand: Demand) -> int:
        """Count how many such jobs fit at the same time. The CPUs for data tasks may be spread over any nodes."""
        total = {kind: self.total(kind) for kind in demand.total}
        return min(_times(total, demand.total), sum(self.slots(demand.per_worker)) // demand.workers)

    def placement(self, demand: Demand) -> tuple[int, ...]:
        """Return the workers on each node that has any, when nodes are filled one by one, most slots first."""
        placed, rest = [], demand.workers
        for slots in sorted(self.slots(demand.per_worker), reverse=True):
            placed.append(min(slots, rest))
            rest -= placed[-1]
        return tuple(workers for workers in placed if workers)


def require_fit(capacity: Capacity, demand: Demand, remedy: str, what: str = "The run", at_once: int = 1) -> None:
    """Refuse a job that can never run on the cluster; Ray would wait forever.

    Args:
        remedy: what the user can do about it, as sentences.
        what: the job or jobs, as the subject of the message.
        at_once: number of such jobs that are to run at the same time.

    Raises:
        UserError: the job does not fit, with the needed and the available resources.
    """
    room = capacity.jobs(demand)
    if room >= at_once:
        return
    needed = ", ".join(f"{at_once * amount:g} {kind}" for kind, amount in demand.total.items())
    found = ", ".join(f"{capacity.total(kind):g} {kind}" for kind in demand.total)
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in demand.per_worker.items())
    slots = sum(capacity.slots(demand.per_worker))
    times = "" if at_once == 1 else f", {at_once} times"
    jobs = "" if at_once == 1 else f" and for {room} of these jobs at a time"
    raise UserError(
        f"{what} needs {needed}: {_count(demand.workers)} with {each} each, and {demand.data_cpus:g} CPU for data "
        f"tasks{times}. The cluster has {found}, with room for {_count(slots)} of this size{jobs}. {remedy}"
    )


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _times(available: Mapping[str, float], needed: Mapping[str, float]) -> int:
    """Return how many times `needed` fits into `available`."""
    counts = ((available.get(kind, 0) + _TOLERANCE) // amount for kind, amount in needed.items() if amount > 0)
    return int(min(counts, default=sys.maxsize))
