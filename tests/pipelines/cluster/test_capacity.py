"""Whether jobs fit a cluster, against a search that tries every way of putting workers on nodes."""

import itertools
import random
import re
from dataclasses import replace

import pytest

from pipelines.cluster.capacity import Capacity, Demand, require_fit
from pipelines.config.recipes import DEMO, R50_MMDET, SWIN_L_MMDET
from pipelines.config.train import ScalingConfig
from pipelines.errors import UserError

HEAD, GPU_NODE, CPU_NODE = {"CPU": 4.0, "memory": 1e9}, {"CPU": 32.0, "GPU": 8.0}, {"CPU": 16.0}


def fits(nodes: list[dict[str, int]], demand: Demand, jobs: int) -> bool:
    """Try all numbers of workers on each node. What they leave of the CPUs is for data tasks, on any node."""
    workers = jobs * demand.workers
    for placed in itertools.product(range(workers + 1), repeat=len(nodes)):
        if sum(placed) != workers:
            continue
        left = [
            {kind: node.get(kind, 0) - count * amount for kind, amount in demand.per_worker.items()}
            for node, count in zip(nodes, placed, strict=True)
        ]
        if min(min(node.values()) for node in left) >= 0 and sum(node["CPU"] for node in left) >= (
            jobs * demand.data_cpus
        ):
            return True
    return False


@pytest.mark.parametrize("seed", range(150))
def test_as_many_jobs_fit_as_a_search_can_place(seed: int) -> None:
    draw = random.Random(seed)
    nodes = [
        {"CPU": draw.randint(0, 6), "GPU": draw.randint(0, 3)} if draw.random() < 0.7 else {"CPU": draw.randint(0, 6)}
        for _ in range(draw.randint(1, 3))
    ]
    per_worker: dict[str, float] = {"CPU": draw.randint(1, 3)}
    if draw.random() < 0.6:
        per_worker["GPU"] = 1
    demand = Demand(workers=draw.randint(1, 3), per_worker=per_worker, data_cpus=draw.randint(0, 3))
    expected = 0
    while fits(nodes, demand, expected + 1):
        expected += 1
    capacity = Capacity.of(nodes)
    assert capacity.jobs(demand) == expected
    require_fit(capacity, demand, "", at_once=expected)
    with pytest.raises(UserError):
        require_fit(capacity, demand, "", at_once=expected + 1)


def test_fractions_of_a_cpu_fill_a_node() -> None:
    assert 3 * 0.1 > 0.3  # floating point
    demand = Demand(workers=3, per_worker={"CPU": 0.1}, data_cpus=0.3)
    assert Capacity.of([{"CPU": 0.3}, {"CPU": 0.3}]).slots(demand.per_worker) == [3, 3]
    assert Capacity.of([{"CPU": 0.3}, {"CPU": 0.3}]).jobs(demand) == 1
    assert Capacity.of([{"CPU": 0.3}, {"CPU": 0.29}]).jobs(demand) == 0


def test_the_demand_of_a_training_run() -> None:
    demand = Demand.of(R50_MMDET.scaling)
    assert demand == Demand(workers=16, per_worker={"CPU": 2, "GPU": 1}, data_cpus=64)
    assert demand.total == {"CPU": 96, "GPU": 16}
    assert Demand.of(DEMO.scaling).total == {"CPU": 2}


def test_nodes_that_exchange_gradients_are_those_with_gpus() -> None:
    capacity = Capacity.of([HEAD, GPU_NODE, GPU_NODE, CPU_NODE])
    assert (capacity.num_nodes, capacity.total("GPU"), capacity.total("CPU")) == (2, 16, 84)
    assert Capacity.of([HEAD, HEAD]).num_nodes == 2
    assert Capacity.of([HEAD, {"CPU": 4.0, "GPU": 0.0}]).num_nodes == 2


@pytest.mark.parametrize(
    ("scaling", "nodes", "expected"),
    [
        (SWIN_L_MMDET.scaling, [GPU_NODE] * 8 + [CPU_NODE] * 8, (8,) * 8),
        (R50_MMDET.scaling, [CPU_NODE, GPU_NODE, GPU_NODE], (8, 8)),
        (
            R50_MMDET.scaling,
            [{"CPU": 96.0, "GPU": 4.0}, {"CPU": 96.0, "GPU": 8.0}, {"CPU": 10.0, "GPU": 8.0}],
            (8, 5, 3),
        ),
        (DEMO.scaling, [{"CPU": 1.0}, {"CPU": 4.0}], (2,)),
        (replace(DEMO.scaling, workers=6), [{"CPU": 1.0}, {"CPU": 2.0}], (4, 2)),
    ],
)
def test_workers_fill_one_node_after_another(
    scaling: ScalingConfig, nodes: list[dict[str, float]], expected: tuple[int, ...]
) -> None:
    assert Capacity.of(nodes).placement(Demand.of(scaling)) == expected


def test_the_message_has_what_is_needed_what_there_is_and_what_to_do() -> None:
    capacity = Capacity.of([{"CPU": 40.0, "GPU": 8.0}])
    with pytest.raises(UserError) as error:
        require_fit(capacity, Demand.of(R50_MMDET.scaling), "Use a larger cluster.", what="The recipe r50_mmdet")
    assert str(error.value) == (
        "The recipe r50_mmdet needs 96 CPU, 16 GPU: 16 workers with 2 CPU and 1 GPU each, and 64 CPU for data tasks. "
        "The cluster has 40 CPU, 8 GPU, with room for 8 workers of this size. Use a larger cluster."
    )


def test_the_message_about_several_jobs() -> None:
    capacity, demand = Capacity.of([{"CPU": 4.0}]), Demand(workers=2, per_worker={"CPU": 0.5}, data_cpus=0.5)
    require_fit(capacity, demand, "", at_once=2)
    with pytest.raises(UserError) as error:
        require_fit(capacity, demand, "Lower --sweep.concurrency.", what="Running 3 trial(s) at a time", at_once=3)
    assert re.fullmatch(
        r"Running 3 trial\(s\) at a time needs 4\.5 CPU: 2 workers with 0\.5 CPU each, and 0\.5 CPU for data "
        r"tasks, 3 times\. The cluster has 4 CPU, with room for 8 workers of this size and for 2 of these jobs at a "
        r"time\. Lower --sweep\.concurrency\.",
        str(error.value),
    )
