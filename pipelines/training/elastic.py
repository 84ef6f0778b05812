"""The number of workers of each attempt: of a range, the largest that divides the global batch and fits the cluster."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ray.exceptions import RayError

from pipelines.cluster import checks
from pipelines.cluster.capacity import Capacity, Demand
from pipelines.config.train import TrainConfig

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_NEXT_GROWTH_SECONDS = 600
"""Minimum time between two attempts to use more workers, so that nodes that come and go do not restart it forever."""


class WorkerCount:
    """Chooses the number of workers of each attempt. A fixed number is always chosen: Ray waits for its resources."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._possible = [split.workers for split in config.batch_splits]  # the most first
        self._last: int | None = None
        self._grown = -float("inf")
        self._growing = False
        """Whether the workers were asked to end for more of them."""

    def choose(self, on_wait: Callable[[], None]) -> int:
        """Return the number of workers of the next attempt, once so many fit.

        If fewer fit than before, lost nodes have `scaling.node_wait` seconds to return. After `can_grow`, the workers
        that ended have as long to free their resources. If not even the least number fits, waits without limit.

        Args:
            on_wait: called about once a second while waiting; may raise to end it.
        """
        if len(self._possible) == 1:
            return self._possible[0]
        deadline = time.monotonic() + (0 if self._last is None else self._config.scaling.node_wait)
        wanted = (self._last or 0) + self._growing
        told = False
        while True:
            fitting = self._free()
            late = time.monotonic() >= deadline
            if fitting and (late or fitting >= wanted):
                break
            if not told or (late and not fitting):
                least = wanted if not late else self._possible[-1]
                logger.warning("Waiting for room for %d workers; the cluster has room for %d now.", least, fitting)
                told, deadline = True, deadline + 60 if late else deadline
            on_wait()
            time.sleep(_POLL_SECONDS)
        if self._last is not None and fitting != self._last:
            more = "fewer" if fitting < self._last else "more"
            logger.warning("The run continues with %d workers, %s than before (%d).", fitting, more, self._last)
        self._last, self._growing = fitting, False
        return fitting

    def can_grow(self, nodes: Sequence[str]) -> bool:
        """Return whether more workers than now would fit.

        Args:
            nodes: id of the node of each worker.
        """
        if self._last is None or self._last == self._possible[0]:
            return False
        if time.monotonic() - self._grown < _NEXT_GROWTH_SECONDS:
            return False
        own = Counter(nodes)
        free = checks.free_resources()
        per_worker = self._config.scaling.per_worker
        with_own = [
            {kind: amount + own[node] * per_worker.get(kind, 0.0) for kind, amount in resources.items()}
            | {kind: own[node] * amount for kind, amount in per_worker.items() if kind not in resources}
            for node, resources in free.items()
        ]
        # The run's own data tasks may occupy CPUs now, so they are only counted in what the nodes have in all.
        grows = self._fitting(with_own, data_cpus=False) > self._last and self._fitting(_all_nodes(free)) > self._last
        if grows:
            self._grown, self._growing = time.monotonic(), True
            logger.info("More workers fit now; they are used after the next checkpoint.")
        return grows

    def _free(self) -> int:
        """Return the largest possible number of workers that fits the cluster now."""
        try:
            return self._fitting(list(checks.free_resources().values()))
        except RayError as error:
            logger.warning("The state of the cluster is not known now. %s", error)
            return 0

    def _fitting(self, nodes: list[dict[str, float]], data_cpus: bool = True) -> int:
        """Return the largest possible number of workers that fits on nodes with these resources, 0 if none does."""
        capacity, scaling = Capacity.of(nodes), self._config.scaling
        for workers in self._possible:
            demand = Demand.of(scaling, workers)
            slots = sum(capacity.slots(demand.per_worker))
            if slots >= workers and (not data_cpus or capacity.jobs(demand)):
                return workers
        return 0


def _all_nodes(nodes: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    """Return all resources, in use or not, of the nodes with these ids."""
    return [resources for node, resources in checks.resources().items() if node in nodes]
