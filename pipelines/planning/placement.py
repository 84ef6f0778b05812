"""Placement of a recipe's workers by Ray, tested on simulated nodes without starting a worker."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util import placement_group, remove_placement_group

from pipelines.cluster.capacity import Capacity, Demand
from pipelines.cluster.simulated import Node, bundles_per_node, simulated
from pipelines.config.train import TrainConfig
from pipelines.errors import RunFailedError

_PLACEMENT_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Placement of a recipe's workers by Ray."""

    workers: tuple[int, ...]
    """Number of workers on each node that has any, largest first."""
    data_cpus: float
    """CPUs that remain for data tasks."""
    seconds: float
    """Duration of the test."""


def counts_per_node(workers: Sequence[int]) -> str:
    """Format the number of workers on each node, such as `8 + 8`."""
    return " + ".join(map(str, workers))


def place(config: TrainConfig, nodes: Sequence[Node]) -> Placement:
    """Reserve resources for all workers of `config` on simulated `nodes`, as Ray Train would, without starting them.

    Raises:
        RunFailedError: the workers do not fit, are spread over too many nodes, or leave too few CPUs for data tasks.
    """
    begun = time.monotonic()
    scaling = config.scaling
    bundle = scaling.per_worker
    with simulated(nodes, {}):
        # The request of Ray Train: one bundle per worker, with its default strategy.
        group = placement_group([bundle] * scaling.max_workers, strategy="PACK")
        if not group.wait(_PLACEMENT_SECONDS):
            raise RunFailedError(
                f"Ray could not place {scaling.max_workers} workers of {bundle} on {len(nodes)} nodes within "
                f"{_PLACEMENT_SECONDS} s. Use larger nodes, or more of them."
            )
        workers = bundles_per_node()
        left = ray.cluster_resources()["CPU"] - scaling.max_workers * bundle["CPU"]
        remove_placement_group(group)
    expected = Capacity.of({"CPU": node.cpus, "GPU": node.gpus} for node in nodes).placement(Demand.of(scaling))
    if workers != expected:
        raise RunFailedError(
            f"Ray placed {counts_per_node(workers)} workers on the nodes instead of {counts_per_node(expected)}. Use "
            f"nodes of one size, or fewer --scaling.cpus-per-worker."
        )
    if left + 1e-6 < scaling.data_cpus:
        raise RunFailedError(
            f"Only {left:g} CPUs remain for data tasks, which need {scaling.data_cpus:g}. Lower --scaling.data-cpus, "
            f"or plan for more --cluster.cpus-per-node."
        )
    return Placement(workers=workers, data_cpus=left, seconds=time.monotonic() - begun)
