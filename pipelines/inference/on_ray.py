"""The stages of a prediction on Ray Data: tasks read and write, a pool of actors has the model.

Pictures are compressed between the stages, and Ray limits how many of them are on their way, so memory does not grow
with their number.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from maskformer import Segmenter
from pipelines.cluster import checks
from pipelines.cluster.capacity import Capacity, Demand, require_fit
from pipelines.cluster.session import session
from pipelines.config.predict import PredictScaling
from pipelines.data.execution import mapped, outputs
from pipelines.inference.stages import ITEM, Read, Row, Segment, Write

_ITEMS_PER_EXECUTION = 16384
"""Each execution starts the actors anew; between two executions nothing is left in memory."""
_ITEMS_PER_TASK = 8


def run(items: Iterator[Row], segmenter: Segmenter, read: Read, write: Write, scaling: PredictScaling) -> Iterator[Row]:
    """Predict ITEM rows on the cluster, or on Ray on this machine; yield RECORD rows in any order.

    Raises:
        UserError: the workers do not fit on the cluster, or a file cannot be written.
        StorageUnavailableError: the storage did not answer.
    """
    with session():
        capacity = checks.capacity()
        device = _device(scaling, capacity)
        workers = scaling.workers or max(
            1, int(capacity.total("GPU") if device == "cuda" else capacity.total("CPU") // 2)
        )
        cpus = scaling.cpus_per_worker
        require_fit(
            capacity,
            Demand(
                workers=workers,
                per_worker={"CPU": cpus, **({"GPU": 1.0} if device == "cuda" else {})},
                data_cpus=cpus,
            ),
            "Use fewer --scaling.workers, a lower --scaling.cpus-per-worker, or a larger cluster.",
            what="The prediction",
        )
        model = ray.put(segmenter)
        while chunk := list(itertools.islice(items, _ITEMS_PER_EXECUTION)):
            size = max(1, min(_ITEMS_PER_TASK, len(chunk) // (4 * workers)))
            tables = [
                pa.Table.from_pylist(chunk[start : start + size], schema=ITEM) for start in range(0, len(chunk), size)
            ]
            pictures = mapped(ray.data.from_arrow(tables), read, "predict", in_order=False, task_cpus=cpus)  # pyright: ignore[reportArgumentType]  # a generator of tables is one too
            found = pictures.map_batches(
                _Model,  # pyright: ignore[reportArgumentType] -- Ray accepts a class; its annotations allow only functions
                fn_constructor_args=(model, device),
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=workers),
                num_cpus=cpus,
                num_gpus=1 if device == "cuda" else 0,
                max_restarts=-1,  # Ray's default; stated, it keeps Ray from reading in the actors (operator fusion)
            )
            for table in outputs(found.map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=cpus)):
                yield from table.to_pylist()


def _device(scaling: PredictScaling, capacity: Capacity) -> str:
    if scaling.device != "auto":
        return scaling.device
    return "cuda" if capacity.total("GPU") >= 1 else "cpu"


class _Model:
    """The actor."""

    def __init__(self, segmenter: Any, device: str) -> None:
        torch.set_num_threads(1)  # parallelism comes from the number of workers
        found: Any = ray.get(segmenter)
        found.model.to(device)
        self._segment = Segment(found)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._segment(table)
