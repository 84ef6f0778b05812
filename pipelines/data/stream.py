"""The Ray Data streams: from packed shards to batches in a given order.

A stream is several Ray Data executions in turn: a short one, which starts at once, and others of an epoch or more. Its
tasks are numbered, and the number of a task says which positions of the order it computes: it looks them up in the
index, reads their ranges of the shards, decodes and augments them, and returns an Arrow table. Blocks keep the order of
the tasks (`preserve_order`), so a rank gets exactly its samples, starting at any position, without communication with
other ranks.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import wraps
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources

from pipelines.data.batch import PanopticBatch
from pipelines.data.execution import mapped, outputs
from pipelines.data.manifest import PackedSet
from pipelines.data.sample_order import SampleOrder
from pipelines.data.tasks import LoadAndAugment, LoadAndResize

_PATIENCE = 900.0
"""Seconds that tasks wait for a storage that does not answer, unless told otherwise."""

_TASK_CPUS = 1.0

_FIRST_TASKS, _TASKS_PER_EXECUTION = 64, 512
"""Tasks of a stream's first execution and of the others, or those of an epoch if they are more.

Ray puts an object into its store for each task before an execution starts, which takes 1 ms."""


def training_batches(
    samples: PackedSet,
    order: SampleOrder,
    *,
    rank: int,
    first_step: int,
    last_step: int,
    prefetch: int,
    **reading: Any,
) -> Generator[PanopticBatch]:
    """Yield the micro-batches of worker `rank` in the steps [first_step, last_step), in the order it uses them.

    Args:
        prefetch: micro-batches to buffer in this process.
        reading: the other arguments of `training_tables`.

    Raises:
        UserError: a packed row is damaged, or its shard is missing. It may be raised a few micro-batches early.
        StorageUnavailableError: the storage did not answer for as long as it should be waited for.
    """
    size = order.split.micro_batch

    def expected() -> Iterator[list[int]]:
        for step in range(first_step, last_step):
            yield from order.positions(rank, step, step + 1).reshape(-1, size).tolist()

    def produce() -> Iterator[PanopticBatch]:
        tables = training_tables(samples, order, rank=rank, first_step=first_step, last_step=last_step, **reading)
        for wanted, table in zip(expected(), _slices(tables, size), strict=True):
            batch = PanopticBatch.from_arrow(table)
            if list(batch.positions) != wanted:
                raise RuntimeError(f"The stream returned the positions {batch.positions} instead of {wanted}.")
            yield batch

    return _prefetched(produce, prefetch)


def training_tables(
    samples: PackedSet,
    order: SampleOrder,
    *,
    rank: int,
    first_step: int,
    last_step: int,
    samples_per_task: int,
    cpus: float,
    object_store: int,
    damaged: Literal["stop", "skip"] = "stop",
    patience: float = _PATIENCE,
    name: str = "train",
) -> Iterator[pa.Table]:
    """Yield the AUGMENTED samples of worker `rank` in the steps [first_step, last_step), in the order it uses them.

    Args:
        order: of these samples, with their augmentation.
        samples_per_task: images per Ray Data task, rounded up to a multiple of the micro-batch.
        cpus: CPUs that this rank's tasks may use at a time.
        object_store: bytes of Ray's object store that this rank's stream may use.
        damaged: what to do about a packed row that cannot be used, even when read again: `stop` raises; `skip` yields
            the next usable image of `samples` at its position, and the batch says so in `skipped`.
        patience: seconds to wait for a storage that does not answer.
        name: name of the stream in Ray's dashboard.

    Raises:
        UserError, StorageUnavailableError: as `training_batches`.
    """
    split = order.split
    per_step = split.accumulation * split.micro_batch
    per_task = split.micro_batch * -(-samples_per_task // split.micro_batch)
    load = LoadAndAugment(samples, order.seed, order.augmentation, patience, damaged == "skip")

    def load_and_augment(number: int) -> pa.Table:
        first, last = number * per_task, min((number + 1) * per_task, (last_step - first_step) * per_step)
        steps = first_step + first // per_step, first_step + -(-last // per_step)
        skipped = first % per_step
        positions = order.positions(rank, *steps)[skipped : skipped + last - first]
        return load(positions, *order.samples(positions))

    count = -(-(last_step - first_step) * per_step // per_task)
    most = max(_TASKS_PER_EXECUTION, -(-len(samples) // per_task))
    for first, end in pairwise(sorted({0, *range(_FIRST_TASKS, count, most), count})):
        dataset = _stream(load_and_augment, range(first, end), cpus, object_store, name)
        yield from outputs(dataset)


def resized_images(
    samples: PackedSet,
    *,
    short_side: int,
    long_side: int,
    samples_per_task: int,
    cpus: float,
    object_store: int | None = None,
    patience: float = _PATIENCE,
    name: str = "evaluation",
) -> ray.data.Dataset:
    """Return a dataset of the RESIZED schema: every image of `samples` once, in order, resized for inference.

    Iterate over it within `original_errors`.

    Args:
        short_side: length in pixels to resize the short side to.
        long_side: upper limit in pixels of the long side.
        samples_per_task: images per Ray Data task.
        cpus: CPUs of each task, at most 1; with `object_store`, of all tasks at a time.
        object_store: bytes of Ray's object store that the stream may use; None: Ray decides.
        patience: seconds to wait for a storage that does not answer.
        name: name of the stream in Ray's dashboard.
    """
    load = LoadAndResize(samples, short_side, long_side, patience)

    def load_and_resize(number: int) -> pa.Table:
        return load(np.arange(number * samples_per_task, min((number + 1) * samples_per_task, len(samples))))

    return _stream(load_and_resize, range(-(-len(samples) // samples_per_task)), cpus, object_store, name)


def _stream(
    compute: Callable[[int], pa.Table], tasks: range, cpus: float, object_store: int | None, name: str
) -> ray.data.Dataset:
    """Return the dataset of the tables that `compute` returns for the numbers of tasks, in order."""

    @wraps(compute)
    def run(task: pa.Table) -> pa.Table:
        return compute(task["number"][0].as_py())

    limits = None
    if object_store is not None:
        # Every rank runs its own execution, each of which would otherwise use the whole cluster.
        limits = ExecutionResources(cpu=cpus, object_store_memory=object_store)
    numbers = ray.data.from_items([{"number": number} for number in tasks], override_num_blocks=len(tasks))
    return mapped(numbers, run, name, in_order=True, task_cpus=min(_TASK_CPUS, cpus), limits=limits)


def _slices(tables: Iterable[Any], rows: int) -> Iterator[pa.Table]:
    """Yield `rows` rows at a time, dropping the reference to each table once it is used."""
    rest: list[pa.Table] = []
    for received in tables:
        table = pa.concat_tables([*rest, received])
        end = len(table) - len(table) % rows
        yield from (table.slice(start, rows) for start in range(0, end, rows))
        rest = [table.slice(end)]  # Ray Data may split a task's table if it is large


def _prefetched(produce: Callable[[], Iterator[PanopticBatch]], depth: int) -> Generator[PanopticBatch]:
    """Run `produce` in a thread and yield its items, buffering at most `depth` of them."""
    items: queue.Queue = queue.Queue(maxsize=max(1, depth))
    stopped = threading.Event()
    end = object()

    def offer(item: object) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in produce():
                if not offer(item):
                    return
            offer(end)
        except BaseException as error:  # sent to the consumer, which raises it
            offer(error)

    threading.Thread(target=work, name="sample stream", daemon=True).start()
    try:
        while (item := items.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
