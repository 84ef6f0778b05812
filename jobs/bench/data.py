"""Measure how many training images this machine supplies per second: one CPU, and all through Ray Data to a consumer.

python jobs/bench/data.py --data packed/val2017

jobs/plan.py takes the rate through Ray Data, divided by the CPUs, as --images-per-cpu-second.
"""

import re
import time
from collections.abc import Callable
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
    """Images of the data set. Those of the pack are used again and again."""
    epochs: int = 1
    """Times to stream them."""
    cpus: int = 2
    """CPUs for data tasks."""
    samples_per_task: int = 64
    """Images of a Ray Data task."""
    object_store_gb: float = 1.5
    """GB of Ray's object store that the stream may use."""
    repeats: int = 3
    """Streams from position 0, and as many of the last tenth of the images. One more watches the memory."""


def main() -> None:
    flags = parse(Data, description=__doc__)
    if flags.recipe not in RECIPES:
        raise UserError(f"There is no recipe {flags.recipe!r}; use one of {', '.join(RECIPES)}.")
    if min(flags.images // 10, flags.epochs, flags.cpus, flags.samples_per_task, flags.repeats) < 1:
        raise UserError("--images must be at least 10, and the other numbers at least 1.")
    if flags.images * flags.epochs < 8 * flags.cpus * flags.samples_per_task:
        raise UserError(
            f"A rate needs at least 8 tasks per CPU, {8 * flags.cpus * flags.samples_per_task:,} images. Use more "
            f"--images or --epochs."
        )

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

    count = flags.images * flags.epochs
    single = _one_cpu(samples, order, min(count, 512))
    late_start = count * 9 // 10
    ray.init(num_cpus=flags.cpus, dashboard_port=0, log_to_driver=False, runtime_env=_ONE_THREAD)
    try:
        _stream(flags, samples, order, 0, min(count, 4 * flags.cpus * flags.samples_per_task))  # starts workers
        whole = [_stream(flags, samples, order, 0, count) for _ in range(flags.repeats)]
        late = [_stream(flags, samples, order, late_start, count) for _ in range(flags.repeats)]
        watched: list[tuple[float, float, float, float]] = []
        _stream(flags, samples, order, 0, count, lambda: watched.append(_memory()))
        memory = np.array(watched)
    finally:
        ray.shutdown()
    rate = median(stream.rate for stream in whole)
    share = rate / single / flags.cpus
    tenth = -(-len(memory) // 10)
    most, start, end = (rows.max(axis=0) / 1e9 for rows in (memory, memory[:tenth], memory[-tenth:]))
    rows = [
        ("one CPU, without Ray", f"{single:.1f} images/s"),
        (f"{flags.cpus} CPUs, through Ray Data", f"{rate:.1f} images/s, {share:.0%} of {flags.cpus} times one CPU"),
        ("first image from position 0", f"{median(stream.first for stream in whole):.2f} s"),
        (f"first image from position {late_start:,}", f"{median(stream.first for stream in late):.2f} s"),
        ("CPU of the consumer", f"{median(stream.cpu for stream in whole):.0%} of a core, which makes no batches"),
        (f"memory over {len(memory)} tasks", "in GB, at most in the first tenth and in the last"),
        ("  object store in use", f"{start[0]:.2f} {end[0]:.2f}, at any time {most[0]:.2f}"),
        ("  object store, spilled", f"{start[1]:.2f} {end[1]:.2f}"),
        ("  largest data worker, unshared", f"{start[2]:.2f} {end[2]:.2f}"),
        ("  dashboard's agent", f"{start[3]:.3f} {end[3]:.3f}"),
    ]
    print("\n".join(f"{name:<36}{text}" for name, text in rows))


class Stream(NamedTuple):
    """What is measured of a stream."""

    rate: float
    """Images per second, after the first tables."""
    first: float
    """Seconds until the first table."""
    cpu: float
    """Share of a core that the consumer's process uses."""


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


def _stream(
    flags: Data,
    samples: "PackedSet",
    order: "SampleOrder",
    first: int,
    last: int,
    watch: Callable[[], None] = lambda: None,
) -> Stream:
    """Take the tables of a stream as they come, and drop them. `watch` is called after each."""
    from pipelines.data.stream import training_tables

    since, cpu = time.perf_counter(), time.process_time()
    arrivals: list[float] = []
    sizes: list[int] = []
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
        watch()
    # All CPUs start at once, so their first tables arrive together; the rate counts from then on.
    skip = min(flags.cpus, len(sizes) - 1)
    rate = sum(sizes[skip:]) / (arrivals[-1] - arrivals[skip - 1]) if skip else sizes[0] / arrivals[0]
    return Stream(rate=rate, first=arrivals[0], cpu=(time.process_time() - cpu) / arrivals[-1])


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
        elif memory and command.startswith("ray::DashboardAgent"):  # the title that it gives itself
            agent = max(agent, float(memory.rss))
    if not agent:
        raise RuntimeError("Ray runs no dashboard agent on this machine.")
    return store, spilled, worker, agent


if __name__ == "__main__":
    run(main)
