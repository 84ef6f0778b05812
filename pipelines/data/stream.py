"""The Ray Data pipelines: from packed shards to batches in a given order.

Each rank builds a small table of its samples (position, epoch, image id, where it is), in the order it needs them,
and maps it with one Ray Data operator: a task reads its rows from the shards, decodes and augments them, and returns
an Arrow table. Blocks keep their order (`preserve_order`), so a rank gets exactly its samples, starting at any
position, without communication with other ranks.
"""

import itertools
import logging
import queue
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import UserCodeException

from maskformer.preprocess import resize_image, resized_shape
from pipelines.data import order
from pipelines.data.augment import Sample, augment, sample_rng
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.batch import PanopticBatch
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_image, decompress_index_map, index_map_type
from pipelines.data.schema import AUGMENTED, PACKED, RESIZED, require, row_hash
from pipelines.errors import StorageRefusedError, StorageUnavailableError, UserError
from pipelines.storage import locate, patience, retried

_PATIENCE = 900.0
"""Seconds that tasks wait for a storage that does not answer, unless told otherwise."""

_RAISED = (UserError, StorageRefusedError, StorageUnavailableError)
_OF_TASKS = {f"{kind.__module__}.{kind.__name__}": kind for kind in _RAISED}
_PACK_AGAIN = "Delete the pack and run prepare_data.py again"

_REPLACEMENTS, _REPLACEMENTS_PER_SHARD = 12, 4
"""Images to try in place of one that cannot be read. A whole shard may be missing, hence the limit per shard."""

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
    damaged: Literal["stop", "skip"] = "stop",
    patience: float = _PATIENCE,
) -> Generator[PanopticBatch]:
    """Yield the samples at `positions`, augmented, as micro-batches in that order.

    Args:
        positions: this rank's positions in the infinite order of samples; a multiple of `micro_batch` of them.
        seed: seed of the order and of the augmentation.
        samples_per_task: images per Ray Data task, rounded up to a multiple of `micro_batch`.
        cpus: CPUs that this rank's tasks may use at a time.
        prefetch: micro-batches to buffer in this process.
        damaged: what to do about a packed row that cannot be used, even when read again: `stop` raises; `skip` yields
            the next usable image of `samples` at its position, and the batch says so in `skipped`.
        patience: seconds to wait for a storage that does not answer.

    Raises:
        UserError: a packed row is damaged, or its shard is missing. It may be raised a few micro-batches early.
        StorageUnavailableError: the storage did not answer for `patience` seconds.
    """
    samples_per_task = micro_batch * -(-samples_per_task // micro_batch)
    replacements = samples if damaged == "skip" else None
    operator = _LoadAndAugment(samples.shards, seed, augmentation, patience, replacements)
    name = uuid.uuid4().hex
    # The first execution is a single task, so that training starts soon.
    starts = range(samples_per_task, len(positions), samples_per_task * _TASKS_PER_EXECUTION)
    parts = np.split(positions, starts)

    def execute(part: np.ndarray) -> list[Any]:
        return blocks(_apply(operator, _sample_tables(samples, part, seed, samples_per_task), cpus), cpus, name)

    def produce() -> Iterator[PanopticBatch]:
        with ThreadPoolExecutor(1, "next execution") as pool:
            upcoming = pool.submit(execute, parts[0])
            for part in [*parts[1:], positions[:0]]:
                ready = upcoming.result()
                if len(part):
                    upcoming = pool.submit(execute, part)
                yield from map(PanopticBatch.from_arrow, _slices(ready, micro_batch))

    return _prefetched(produce, prefetch)


def blocks(dataset: ray.data.Dataset, cpus: float, name: str) -> list[Any]:
    """Execute `dataset` with at most `cpus` CPUs and return references to its Arrow tables, in order.

    Ray keeps its gauges for each name that it ever saw, so executions that follow one another should share one, and
    executions at the same time must not.

    Slow consumers should use this instead of Ray Data's iterators: while such an iterator waits for its consumer, its
    executor polls continuously, which costs a trainer half a core.
    """
    options = dataset.context.execution_options
    options.preserve_order = True
    # Every rank runs its own executors, each of which would otherwise use the whole cluster.
    options.resource_limits = options.resource_limits.copy(cpu=cpus)
    # Ray makes a new name for each dataset, and Dataset.materialize for each call. Measured, that took 1.2 MB of memory
    # of Ray's processes and this one per execution; with the same name it is less than 0.1 MB.
    dataset._set_uuid(name)
    with original_errors():
        return list(dataset.to_arrow_refs())


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
    samples: PackedSet,
    *,
    short_side: int,
    long_side: int,
    samples_per_task: int,
    cpus: float,
    patience: float = _PATIENCE,
) -> ray.data.Dataset:
    """Return a dataset of the RESIZED schema: every image of `samples` once, resized for inference.

    Iterate over it within `original_errors`.

    Args:
        short_side: length in pixels to resize the short side to.
        long_side: upper limit in pixels of the long side.
        samples_per_task: images per Ray Data task.
        cpus: CPUs of each task, at most 1.
        patience: seconds to wait for a storage that does not answer.
    """
    operator = _LoadAndResize(samples.shards, short_side, long_side, patience)
    table = _rows_to_read(samples.image_ids, samples.shard, samples.row)
    return _apply(operator, _split(table, samples_per_task), cpus)


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise a UserError or StorageUnavailableError of a Ray Data task as such, not as Ray's exception."""
    try:
        yield
    except UserCodeException as error:
        # Of an exception in a task, Ray passes only the traceback as text; the causes of an exception are above it.
        for line in reversed(str(error).splitlines()):
            name, _, message = line.partition(": ")
            if name in _OF_TASKS:
                raise _OF_TASKS[name](message) from error
        raise


def _sample_tables(samples: PackedSet, positions: np.ndarray, seed: int, samples_per_task: int) -> list[pa.Table]:
    epochs, indices = order.samples_at(positions, len(samples), seed)
    table = _rows_to_read(samples.image_ids[indices], samples.shard[indices], samples.row[indices])
    for name, values in (("position", positions), ("epoch", epochs), ("index", indices)):
        table = table.append_column(name, pa.array(values))
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
    seed: int
    config: AugmentConfig
    patience: float
    replacements: PackedSet | None = None
    """The set that the table's indices refer to, whose images may replace one that cannot be used; None: it may not be
    replaced."""

    def __call__(self, table: pa.Table) -> pa.Table:
        with patience(self.patience):
            return pa.Table.from_pylist([self._augmented(entry) for entry in table.to_pylist()], schema=AUGMENTED)

    def _augmented(self, entry: dict) -> dict:
        image_id, skipped = entry["image_id"], None
        try:
            sample = self._load(image_id, entry["shard"], entry["row"])
        except _UnusableRowError as error:
            if self.replacements is None:
                hint = f"{_PACK_AGAIN}, or use --data.damaged skip to train on other images in its place."
                raise UserError(f"{error}. {hint}") from error
            image_id, sample = self._replacement(self.replacements, entry["index"], error)
            skipped = f"{error}. Image {image_id} took its place."
        sample = augment(sample, sample_rng(self.seed, entry["epoch"], image_id), self.config)
        return augmented_row(sample, entry["position"], entry["epoch"], image_id, skipped)

    def _load(self, image_id: int, shard: int, row: int) -> Sample:
        packed = _read_row(self.shards[shard], row, image_id)
        try:
            return packed_sample(packed)
        except ValueError as error:
            raise _unusable(self.shards[shard], row, image_id, error) from error

    def _replacement(self, samples: PackedSet, index: int, error: "_UnusableRowError") -> tuple[int, Sample]:
        """Return the next image that can be used, with its id."""
        tried = _following(samples.shard, index)
        for other in tried:
            image_id = int(samples.image_ids[other])
            try:
                return image_id, self._load(image_id, int(samples.shard[other]), int(samples.row[other]))
            except _UnusableRowError:
                continue
        raise UserError(
            f"{error}. Nor can {len(tried)} images after it be used in its place. {_PACK_AGAIN}."
        ) from error


def augmented_row(
    sample: Sample, position: int, epoch: int, image_id: int, skipped: str | None = None
) -> dict[str, Any]:
    """Return the AUGMENTED row of a sample."""
    return {
        "position": position,
        "epoch": epoch,
        "image_id": image_id,
        "height": sample.image.shape[0],
        "width": sample.image.shape[1],
        # Views, which Arrow copies once.
        "image": np.ascontiguousarray(sample.image).data.cast("B"),
        "index_map": np.ascontiguousarray(sample.index_map, index_map_type(len(sample.classes))).data.cast("B"),
        "classes": sample.classes,
        "skipped": skipped,
    }


def packed_sample(row: Mapping[str, Any]) -> Sample:
    """Decode a PACKED row for training.

    Raises:
        ValueError: the row cannot be decoded, or its image and its index map differ in size.
    """
    image = decode_image(row["image"])
    index_map = decompress_index_map(row["index_map"], (row["height"], row["width"]), len(row["classes"]))
    if image.shape[:2] != index_map.shape:
        raise ValueError(f"its image has the size {image.shape[:2]}, and its index map {index_map.shape}")
    return Sample(image, index_map, np.array(row["classes"], np.int16))


def _following(shard: np.ndarray, index: int) -> list[int]:
    """Return the indices, after `index` and then from 0 on, of the images to try in its place."""
    found: list[int] = []
    of_shard: Counter[int] = Counter()
    for other in itertools.chain(range(index + 1, len(shard)), range(index)):
        of_shard[shard[other]] += 1
        if of_shard[shard[other]] <= _REPLACEMENTS_PER_SHARD:
            found.append(other)
        if len(found) == _REPLACEMENTS:
            break
    return found


@dataclass(frozen=True)
class _LoadAndResize:
    """Operator of an inference task: maps a table of `_rows_to_read` to RESIZED rows in the same order."""

    shards: tuple[str, ...]
    short_side: int
    long_side: int
    patience: float

    def __call__(self, table: pa.Table) -> pa.Table:
        with patience(self.patience):
            return pa.Table.from_pylist([self._image(entry) for entry in table.to_pylist()], schema=RESIZED)

    def _image(self, entry: dict) -> dict:
        try:
            packed = _read_row(self.shards[entry["shard"]], entry["row"], entry["image_id"])
        except _UnusableRowError as error:
            raise UserError(f"{error}. {_PACK_AGAIN}.") from error
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


class _UnusableRowError(Exception):
    """A packed row that is missing, damaged or not usable. The message is a sentence without its full stop."""


def _unusable(shard: str, row: int, image_id: int, reason: object) -> _UnusableRowError:
    text = " ".join(str(reason).split()).rstrip(".")
    return _UnusableRowError(f"Row {row} of {shard}, image {image_id}, cannot be used: {text}")


def _read_row(shard: str, row: int, image_id: int) -> dict:
    """Read one image's row group, for as long as the storage's patience allows, and check its id and its hash.

    Raises:
        _UnusableRowError: the row is missing or damaged, also in the shard opened anew.
        StorageUnavailableError: the storage does not answer.
        UserError: the storage refuses.
    """
    try:
        return _read_and_check(shard, row, image_id)
    except (_UnusableRowError, UserError):
        _open_shard.cache_clear()  # the file that is open may have been replaced or deleted
        return _read_and_check(shard, row, image_id)


def _read_and_check(shard: str, row: int, image_id: int) -> dict:
    def read() -> dict:
        try:
            return _open_shard(shard).read_row_group(row).to_pylist()[0]
        except OSError:
            _open_shard.cache_clear()  # a remote file that failed once may fail forever
            raise

    try:
        packed = retried("read", locate(shard), read)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise _unusable(shard, row, image_id, "the file does not exist") from error
    except OSError as error:
        if error.errno is not None:  # of this machine, such as too many open files, so another attempt may succeed
            raise OSError(error.errno, f"Cannot read image {image_id}, row {row} of {shard}: {error}") from error
        raise _unusable(shard, row, image_id, error) from error
    except (pa.ArrowException, ValueError, IndexError) as error:
        raise _unusable(shard, row, image_id, error) from error
    if packed["image_id"] != image_id or row_hash(packed) != packed["sha256"]:
        raise _UnusableRowError(
            f"Row {row} of {shard} is damaged: its bytes are not those of image {image_id} as packed"
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
