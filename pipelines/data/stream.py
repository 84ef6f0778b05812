"""The Ray Data pipelines: from packed shards to batches in a given order.

Each rank builds a small table of its samples (position, epoch, image id, shard, row), in the order it needs them,
and maps it with one Ray Data operator: a task reads its rows from the shards, decodes and augments them, and returns
an Arrow table. Blocks keep their order (`preserve_order`), so a rank gets exactly its samples, starting at any
position, without communication with other ranks.
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

from maskformer.preprocess import resize_image, resized_shape
from maskformer.taxonomy import Taxonomy
from pipelines.data import order
from pipelines.data.augment import Sample, augment, sample_rng
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.batch import PanopticBatch
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_image, decode_panoptic, index_map
from pipelines.data.schema import AUGMENTED, PACKED, RESIZED, require
from pipelines.errors import UserError
from pipelines.storage import locate, sha256

_TASKS_PER_EXECUTION = 8
"""A run is a sequence of executions of this many tasks. Each starts when the batches of the one before are first used,
so a rank holds the output of at most two executions in the object store."""


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
    """Yield the samples at `positions`, augmented, as micro-batches in that order.

    Args:
        positions: this rank's positions in the infinite order of samples; a multiple of `micro_batch` of them.
        seed: seed of the order and of the augmentation.
        samples_per_task: images per Ray Data task, rounded up to a multiple of `micro_batch`.
        cpus: CPUs that this rank's tasks may use at a time.
        prefetch: micro-batches to buffer in this process.

    Raises:
        UserError: a packed row is damaged. It may be raised a few micro-batches early.
    """
    samples_per_task = micro_batch * -(-samples_per_task // micro_batch)
    operator = _LoadAndAugment(samples.shards, samples.taxonomy, seed, augmentation)
    # The first execution is a single task, so that training starts soon.
    starts = range(samples_per_task, len(positions), samples_per_task * _TASKS_PER_EXECUTION)
    parts = np.split(positions, starts)

    def execute(part: np.ndarray) -> list[Any]:
        return blocks(_apply(operator, _sample_tables(samples, part, seed, samples_per_task), cpus), cpus)

    def produce() -> Iterator[PanopticBatch]:
        with ThreadPoolExecutor(1, "next execution") as pool:
            upcoming = pool.submit(execute, parts[0])
            for part in [*parts[1:], positions[:0]]:
                ready = upcoming.result()
                if len(part):
                    upcoming = pool.submit(execute, part)
                yield from map(PanopticBatch.from_arrow, _slices(ready, micro_batch))

    return _prefetched(produce, prefetch)


def blocks(dataset: ray.data.Dataset, cpus: float) -> list[Any]:
    """Execute `dataset` with at most `cpus` CPUs and return references to its Arrow tables, in order.

    Slow consumers should use this instead of Ray Data's iterators: while such an iterator waits for its consumer, its
    executor polls continuously, which costs a trainer half a core.
    """
    options = dataset.context.execution_options
    options.preserve_order = True
    # Every rank runs its own executors, each of which would otherwise use the whole cluster.
    options.resource_limits = options.resource_limits.copy(cpu=cpus)
    with original_errors():
        return list(dataset.materialize().to_arrow_refs())


def _slices(tables: list[Any], rows: int) -> Iterator[pa.Table]:
    """Yield `rows` rows at a time, dropping the reference to each table once it is used."""
    rest: list[pa.Table] = []
    while tables:
        rest.append(ray.get(tables.pop(0)))
        table = pa.concat_tables(rest)
        end = len(table) - len(table) % rows if tables else len(table)
        yield from (table.slice(start, rows) for start in range(0, end, rows))
        rest = [table.slice(end)]  # Ray Data may split a task's table if it is large


def resized_images(
    samples: PackedSet, *, short_side: int, long_side: int, samples_per_task: int, cpus: float
) -> ray.data.Dataset:
    """Return a dataset of the RESIZED schema: every image of `samples` once, resized for inference.

    Iterate over it within `original_errors`.

    Args:
        short_side: length in pixels to resize the short side to.
        long_side: upper limit in pixels of the long side.
        samples_per_task: images per Ray Data task.
        cpus: CPUs of each task, at most 1.
    """
    operator = _LoadAndResize(samples.shards, short_side, long_side)
    table = _rows_to_read(samples.image_ids, samples.shard, samples.row)
    return _apply(operator, _split(table, samples_per_task), cpus)


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise a UserError of a Ray Data task as a UserError, not as Ray's exception."""
    try:
        yield
    except UserCodeException as error:
        # Of an exception in a task, Ray passes only the traceback as text.
        message = re.search(rf"^{UserError.__module__}\.{UserError.__name__}: (.+)$", str(error), re.MULTILINE)
        if message is None:
            raise
        raise UserError(message[1]) from error


def _sample_tables(samples: PackedSet, positions: np.ndarray, seed: int, samples_per_task: int) -> list[pa.Table]:
    epochs, indices = order.samples_at(positions, len(samples), seed)
    table = _rows_to_read(samples.image_ids[indices], samples.shard[indices], samples.row[indices])
    table = table.append_column("position", pa.array(positions)).append_column("epoch", pa.array(epochs, pa.int32()))
    return _split(table, samples_per_task)


def _rows_to_read(image_ids: np.ndarray, shard: np.ndarray, row: np.ndarray) -> pa.Table:
    return pa.table({"image_id": image_ids, "shard": shard, "row": row})


def _split(table: pa.Table, rows: int) -> list[pa.Table]:
    # Copies, since pickling a slice pickles the entire table.
    return [table.take(list(range(start, min(start + rows, len(table))))) for start in range(0, len(table), rows)]


def _apply(operator: Callable[[pa.Table], pa.Table], tables: list[pa.Table], cpus: float) -> ray.data.Dataset:
    # Ray Data logs every execution and draws bars for it, and there is one per few thousand images.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data.from_arrow(tables).map_batches(
        operator, batch_size=None, batch_format="pyarrow", num_cpus=min(1.0, cpus)
    )


@dataclass(frozen=True)
class _LoadAndAugment:
    """Operator of a training task: maps a table of `_sample_tables` to AUGMENTED rows in the same order."""

    shards: tuple[str, ...]
    taxonomy: Taxonomy
    seed: int
    config: AugmentConfig

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._sample(entry) for entry in table.to_pylist()], schema=AUGMENTED)

    def _sample(self, entry: dict) -> dict:
        packed = _read_row(self.shards[entry["shard"]], entry["row"], entry["image_id"])
        indices, classes = index_map(decode_panoptic(packed["panoptic"]), packed["segments"], self.taxonomy)
        sample = Sample(decode_image(packed["image"]), indices, classes)
        sample = augment(sample, sample_rng(self.seed, entry["epoch"], entry["image_id"]), self.config)
        return {
            "position": entry["position"],
            "epoch": entry["epoch"],
            "image_id": entry["image_id"],
            "height": sample.image.shape[0],
            "width": sample.image.shape[1],
            "image": sample.image.tobytes(),
            "index_map": sample.index_map.astype("<u2").tobytes(),
            "classes": sample.classes.tolist(),
        }


@dataclass(frozen=True)
class _LoadAndResize:
    """Operator of an inference task: maps a table of `_rows_to_read` to RESIZED rows in the same order."""

    shards: tuple[str, ...]
    short_side: int
    long_side: int

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._image(entry) for entry in table.to_pylist()], schema=RESIZED)

    def _image(self, entry: dict) -> dict:
        packed = _read_row(self.shards[entry["shard"]], entry["row"], entry["image_id"])
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
    """Read one image's row group and check its id and its hash."""
    try:
        packed = _open_shard(shard).read_row_group(row).to_pylist()[0]
    except (OSError, pa.ArrowException, UserError) as error:  # perhaps the network, so it may be retried
        raise OSError(f"Cannot read image {image_id}, row {row} of {shard}: {error}") from error
    if packed["image_id"] != image_id or sha256(packed["image"] + packed["panoptic"]) != packed["sha256"]:
        raise UserError(
            f"Row {row} of {shard} is damaged: its bytes are not those of image {image_id} as packed. "
            f"Delete the pack and run prepare_data.py again."
        )
    return packed


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
