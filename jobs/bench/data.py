"""Measure how many training images this machine supplies per second: one CPU, and all through Ray Data to a consumer.

python jobs/bench/data.py --data packed/val2017

jobs/plan.py takes the rate of one CPU as --images-per-cpu-second.
"""

import re
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from jobs.shared.cli import parse, run
from pipelines.config.recipes import RECIPES
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.manifest import PackedSet
    from pipelines.data.sample_order import SampleOrder


@dataclass(frozen=True, kw_only=True)
class Data:
    """Measure how many training images this machine supplies per second."""

    data: str
    """Pack to read: a path or a URI."""
    recipe: str = "r50_mmdet"
    """Recipe whose augmentation is used."""
    images: int = 2000
    """Images to stream. Those of the pack are used again and again."""
    cpus: int = 2
    """CPUs for data tasks."""
    samples_per_task: int = 64
    """Images of a Ray Data task."""
    object_store_gb: float = 1.5
    """GB of Ray's object store that the stream may use."""
    repeats: int = 3
    """Streams from position 0, and as many of the last tenth of the images."""


def main() -> None:
    flags = parse(Data, description=__doc__)
    if flags.recipe not in RECIPES:
        raise UserError(f"There is no recipe {flags.recipe!r}; use one of {', '.join(RECIPES)}.")
    if min(flags.images // 10, flags.cpus, flags.samples_per_task, flags.repeats) < 1:
        raise UserError("--images must be at least 10, and --cpus, --samples-per-task and --repeats at least 1.")

    import numpy as np  # --help should not import them
    import ray
    import torch

    from pipelines.data.manifest import open_pack

    torch.set_num_threads(1)
    samples = open_pack(flags.data)
    samples = samples.take(np.arange(flags.images) % len(samples))
    config = RECIPES[flags.recipe]
    one = replace(config, run=replace(config.run, global_batch=1, micro_batch=1)).with_workers(1)
    order = one.sample_order(samples)

    single = _one_cpu(samples, order, min(flags.images, 512))
    late_start = flags.images * 9 // 10
    ray.init(num_cpus=flags.cpus, dashboard_port=0, log_to_driver=False, runtime_env=_ONE_THREAD)
    try:
        _stream(flags, samples, order, 0, min(flags.images, 4 * flags.cpus * flags.samples_per_task))  # starts workers
        whole = [_stream(flags, samples, order, 0, flags.images) for _ in range(flags.repeats)]
        late = [_stream(flags, samples, order, late_start, flags.images) for _ in range(flags.repeats)]
    finally:
        ray.shutdown()
    rate = median(facts.rate for facts in whole)
    share = rate / single / flags.cpus
    rows = [
        ("one CPU, without Ray", f"{single:.1f} images/s"),
        (f"{flags.cpus} CPUs, through Ray Data", f"{rate:.1f} images/s, {share:.0%} of {flags.cpus} times one CPU"),
        ("first image from position 0", f"{median(facts.first for facts in whole):.2f} s"),
        (f"first image from position {late_start:,}", f"{median(facts.first for facts in late):.2f} s"),
        ("CPU of the consumer", f"{median(facts.cpu for facts in whole):.0%} of a core, which makes no batches"),
        ("object store, most in use", f"{max(facts.store for facts in whole) / 1e9:.2f} GB"),
        ("spilled", f"{max(facts.spilled for facts in whole) / 1e9:.2f} GB"),
        ("a data worker, own memory", f"{max(facts.worker for facts in whole) / 1e9:.2f} GB"),
        ("agent of the dashboard", f"{whole[0].agent / 1e9:.2f} GB, at the end {late[-1].agent / 1e9:.2f} GB"),
    ]
    print("\n".join(f"{name:<36}{text}" for name, text in rows))


class Facts(NamedTuple):
    """What is measured of a stream."""

    rate: float
    """Images per second, after the first table."""
    first: float
    """Seconds until the first table."""
    cpu: float
    """Share of a core that the consumer's process uses."""
    store: float
    """Bytes of the object store, the most in use."""
    spilled: float
    """Bytes spilled to disk."""
    worker: float
    """Bytes of the largest data worker, without shared memory."""
    agent: float
    """Bytes of the dashboard's agent."""


_ONE_THREAD = {"env_vars": {"OMP_NUM_THREADS": "1"}}


def _one_cpu(samples: "PackedSet", order: "SampleOrder", count: int) -> float:
    """Return images per second of CPU time, from reading to the Arrow table."""
    import numpy as np

    from pipelines.data.tasks import LoadAndAugment

    load = LoadAndAugment(samples, order.seed, order.augmentation, 60.0, False)
    rates: list[float] = []
    for start in range(0, count, 64):
        positions = np.arange(start, min(start + 64, count))
        since = time.process_time()
        load(positions, *order.samples(positions))
        rates.append(len(positions) / (time.process_time() - since))
    return median(rates[1:] or rates)


def _stream(flags: Data, samples: "PackedSet", order: "SampleOrder", first: int, last: int) -> Facts:
    """Take the tables of a stream as they come, and drop them."""
    import numpy as np

    from pipelines.data.stream import training_tables

    since, cpu = time.perf_counter(), time.process_time()
    arrivals: list[float] = []
    sizes: list[int] = []
    memory: list[tuple[float, float, float, float]] = []
    for table in training_tables(
        samples,
        order,
        rank=0,
        first_step=first,
        last_step=last,
        samples_per_task=flags.samples_per_task,
        cpus=flags.cpus,
        object_store=int(flags.object_store_gb * 1e9),
        name="bench",
    ):
        arrivals.append(time.perf_counter() - since)
        sizes.append(len(table))
        memory.append(_memory())
    # Without the first table, for which all processes start; a single table is the whole stream.
    rate = sum(sizes[1:]) / (arrivals[-1] - arrivals[0]) if len(sizes) > 1 else sizes[0] / arrivals[0]
    store, spilled, worker, agent = np.max(memory, axis=0).tolist()
    used = (time.process_time() - cpu) / arrivals[-1]
    return Facts(rate=rate, first=arrivals[0], cpu=used, store=store, spilled=spilled, worker=worker, agent=agent)


def _memory() -> tuple[float, float, float, float]:
    """Return bytes: the object store in use, what was spilled, the largest data worker, the dashboard's agent."""
    import psutil
    from ray._private.internal_api import memory_summary

    text = memory_summary(stats_only=True)
    store, spilled = (
        sum(float(number) for number in re.findall(pattern, text)) * 2**20
        for pattern in (r"Plasma memory usage (\d+) MiB", r"Spilled (\d+) MiB")
    )
    worker = agent = 0.0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        command, memory = " ".join(process.info["cmdline"] or []), process.info["memory_info"]
        if memory and "MapBatches" in command:
            worker = max(worker, float(memory.rss - memory.shared))
        elif memory and "dashboard/agent.py" in command:
            agent = max(agent, float(memory.rss))
    return store, spilled, worker, agent


if __name__ == "__main__":
    run(main)
