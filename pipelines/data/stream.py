"""The Ray Data graphs: from packed shards to batches in a given order. Only wiring.

Each rank builds its own small plan, a table of (position, image, shard, row) whose order is already decided,
and reads it through one Ray Data operator: a task fetches its rows from the shards, decodes and augments them
and hands back an Arrow batch. Blocks keep their order (`preserve_order`), so a rank gets exactly its plan,
from whatever position it starts, and knows nothing of the other ranks.
"""

import logging
import queue
import re
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import UserCodeException

from maskformer.inference import resize_image, resized_shape
from maskformer.taxonomy import Taxonomy
from pipelines.data import order
from pipelines.data.augment import AugmentConfig, Sample, augment, sample_rng
from pipelines.data.batch import PanopticBatch
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_image, decode_panoptic, index_map
from pipelines.data.schema import AUGMENTED, PACKED, RESIZED, require
from pipelines.errors import UserError
from pipelines.storage import locate, sha256

_TASKS_PER_EXECUTION = 8
"""An endless run is a chain of executions of this many tasks, each begun when the one before is handed out: what two
of them produce is what a rank holds in the object store."""


def training_batches(
    samples: PackedSet,
    positions: np.ndarray,
    *,
    seed: int,
    augmentation: AugmentConfig,
    micro_batch: int,
    samples_per_task: int,
    cpus: float,
    prefetch: int,
) -> Generator[PanopticBatch]:
    """Yield the samples at `positions`, augmented, in that order, as micro-batches.

    Args:
        positions: this rank's places in the endless order; a multiple of `micro_batch`.
        samples_per_task: images that one Ray Data task makes; rounded up to whole micro-batches.
        cpus: the share of the cluster's CPUs that this rank's tasks may use at a time.
        prefetch: micro-batches to hold ready in this process.

    Raises:
        UserError: a packed row is damaged. It may come a few micro-batches early.
    """
    samples_per_task = micro_batch * -(-samples_per_task // micro_batch)
    operator = _LoadAndAugment(samples.shards, samples.taxonomy, seed, augmentation)
    # One task first, so that training starts soon.
    starts = range(samples_per_task, len(positions), samples_per_task * _TASKS_PER_EXECUTION)
    parts = np.split(positions, starts)

    def execute(part: np.ndarray) -> list[Any]:
        return blocks(_through(operator, _plans(samples, part, seed, samples_per_task), cpus), cpus)

    def produce() -> Iterator[PanopticBatch]:
        with ThreadPoolExecutor(1, "next execution") as pool:
            upcoming = pool.submit(execute, parts[0])
            for part in [*parts[1:], positions[:0]]:
                ready = upcoming.result()
                if len(part):
                    upcoming = pool.submit(execute, part)
                yield from map(PanopticBatch.from_arrow, _slices(ready, micro_batch))

    return _ahead(produce, prefetch)


def blocks(dataset: ray.data.Dataset, cpus: float) -> list[Any]:
    """Execute `dataset` with at most `cpus` CPUs and return references to its Arrow tables, in order.

    Whoever takes its time over the tables should use this: the executor behind Ray Data's iterators polls without
    a pause while it waits for a slow consumer, and in a trainer that takes half a core from the training.
    """
    options = dataset.context.execution_options
    options.preserve_order = True
    # Every rank runs executors of its own, which would otherwise plan with the whole cluster.
    options.resource_limits = options.resource_limits.copy(cpu=cpus)
    with original_errors():
        return list(dataset.materialize().to_arrow_refs())


def _slices(tables: list[Any], rows: int) -> Iterator[pa.Table]:
    """Yield `rows` rows at a time, letting go of each table as soon as it is used up."""
    rest: list[pa.Table] = []
    while tables:
        rest.append(ray.get(tables.pop(0)))
        table = pa.concat_tables(rest)
        whole = len(table) - len(table) % rows if tables else len(table)
        yield from (table.slice(start, rows) for start in range(0, whole, rows))
        rest = [table.slice(whole)]  # Ray Data may cut a task's table in two where it is large


def resized_images(
    samples: PackedSet, *, short_side: int, long_side: int, samples_per_task: int, cpus: float
) -> ray.data.Dataset:
    """Return a dataset of the RESIZED schema: every image of `samples` once, resized as for inference.

    Iterate over it within `original_errors`.
    """
    operator = _LoadAndResize(samples.shards, short_side, long_side)
    plan = _plan_table(samples.image_ids, samples.shard, samples.row)
    return _through(operator, _cut(plan, samples_per_task), cpus)


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise a UserError of a Ray Data task as itself."""
    try:
        yield
    except UserCodeException as error:
        # Ray hands over what was raised in a task as the text of its traceback only.
        message = re.search(rf"^{UserError.__module__}\.{UserError.__name__}: (.+)$", str(error), re.MULTILINE)
        if message is None:
            raise
        raise UserError(message[1]) from error


def _plans(samples: PackedSet, positions: np.ndarray, seed: int, samples_per_task: int) -> list[pa.Table]:
    epochs, places = order.samples_at(positions, len(samples), seed)
    plan = _plan_table(samples.image_ids[places], samples.shard[places], samples.row[places])
    plan = plan.append_column("position", pa.array(positions)).append_column("epoch", pa.array(epochs, pa.int32()))
    return _cut(plan, samples_per_task)


def _plan_table(image_ids: np.ndarray, shard: np.ndarray, row: np.ndarray) -> pa.Table:
    return pa.table({"image_id": image_ids, "shard": shard, "row": row})


def _cut(plan: pa.Table, rows: int) -> list[pa.Table]:
    # Copied, since a slice would be pickled with the whole table behind it.
    return [plan.take(list(range(start, min(start + rows, len(plan))))) for start in range(0, len(plan), rows)]


def _through(operator: Callable[[pa.Table], pa.Table], plans: list[pa.Table], cpus: float) -> ray.data.Dataset:
    # Ray Data describes every execution and draws bars for it, and there is one per few thousand images.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data.from_arrow(plans).map_batches(
        operator, batch_size=None, batch_format="pyarrow", num_cpus=min(1.0, cpus)
    )


@dataclass(frozen=True)
class _LoadAndAugment:
    """One training task: rows of a plan in, AUGMENTED rows out, in the same order."""

    shards: tuple[str, ...]
    taxonomy: Taxonomy
    seed: int
    config: AugmentConfig

    def __call__(self, plan: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._sample(row) for row in plan.to_pylist()], schema=AUGMENTED)

    def _sample(self, plan: dict) -> dict:
        packed = _read_row(self.shards[plan["shard"]], plan["row"], plan["image_id"])
        plane, classes = index_map(decode_panoptic(packed["panoptic"]), packed["segments"], self.taxonomy)
        sample = Sample(decode_image(packed["image"]), plane, classes)
        sample = augment(sample, sample_rng(self.seed, plan["epoch"], plan["image_id"]), self.config)
        return {
            "position": plan["position"],
            "epoch": plan["epoch"],
            "image_id": plan["image_id"],
            "height": sample.image.shape[0],
            "width": sample.image.shape[1],
            "image": sample.image.tobytes(),
            "index_map": sample.index_map.astype("<u2").tobytes(),
            "classes": sample.classes.tolist(),
        }


@dataclass(frozen=True)
class _LoadAndResize:
    """One inference task: rows of a plan in, RESIZED rows out, in the same order."""

    shards: tuple[str, ...]
    short_side: int
    long_side: int

    def __call__(self, plan: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._image(row) for row in plan.to_pylist()], schema=RESIZED)

    def _image(self, plan: dict) -> dict:
        packed = _read_row(self.shards[plan["shard"]], plan["row"], plan["image_id"])
        shape = resized_shape(packed["height"], packed["width"], self.short_side, self.long_side)
        image = resize_image(decode_image(packed["image"]), shape)
        return {
            "image_id": packed["image_id"],
            "file_name": packed["file_name"],
            "height": shape[0],
            "width": shape[1],
            "image": image.tobytes(),
            "original_height": packed["height"],
            "original_width": packed["width"],
            "panoptic": packed["panoptic"],
            "segments": packed["segments"],
        }


@lru_cache(maxsize=64)
def _open_shard(uri: str) -> pq.ParquetFile:
    location = locate(uri)
    shard = pq.ParquetFile(location.filesystem.open_input_file(location.path), pre_buffer=True)
    require(shard.schema_arrow, PACKED, uri)
    return shard


def _read_row(shard: str, row: int, image_id: int) -> dict:
    """Read one image's row group and check that it is the one that was packed."""
    try:
        packed = _open_shard(shard).read_row_group(row).to_pylist()[0]
    except (OSError, pa.ArrowException, UserError) as error:  # perhaps the network, so it may be tried again
        raise OSError(f"Cannot read image {image_id}, row {row} of {shard}: {error}") from error
    if packed["image_id"] != image_id or sha256(packed["image"] + packed["panoptic"]) != packed["sha256"]:
        raise UserError(
            f"Row {row} of {shard} is damaged: its bytes are not those of image {image_id} as it was packed. "
            f"Delete the pack and run prepare_data.py again."
        )
    return packed


def _ahead(produce: Callable[[], Iterator[PanopticBatch]], depth: int) -> Generator[PanopticBatch]:
    """Run `produce` in a thread, at most `depth` items ahead."""
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
        except BaseException as error:  # handed to the consumer, which raises it
            offer(error)

    threading.Thread(target=work, name="sample stream", daemon=True).start()
    try:
        while (item := items.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
