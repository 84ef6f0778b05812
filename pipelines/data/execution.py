"""How this project runs Ray Data: what an execution may use, how its loop waits, and which errors its tasks raise."""

import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import UserCodeException

from pipelines.errors import StorageRefusedError, StorageUnavailableError, UserError

_RAISED = (UserError, StorageRefusedError, StorageUnavailableError)
_OF_TASKS = {f"{kind.__module__}.{kind.__name__}": kind for kind in _RAISED}

_SHORTEST_WAIT, _LONGEST_WAIT = 0.005, 0.02
"""Seconds between two steps of an execution's loop, in the trainer's process, while it has outputs to look after."""

_IDLE_WAIT = 0.1
"""Seconds to wait at most for the first of the tasks to return something."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's <malloc.h>."""


def mapped(
    inputs: ray.data.Dataset,
    operator: Callable[[pa.Table], pa.Table],
    name: str,
    *,
    in_order: bool,
    task_cpus: float = 1.0,
    limits: ExecutionResources | None = None,
) -> ray.data.Dataset:
    """Return the dataset of `operator` applied to each block of `inputs`, in a Ray Data task each.

    Args:
        name: of the data set in Ray's dashboard.
        in_order: whether the outputs keep the order of the inputs.
        task_cpus: CPUs of a task.
        limits: what the tasks may use at a time; None: the whole cluster.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = inputs.map_batches(_in_worker(operator), batch_size=None, batch_format="pyarrow", num_cpus=task_cpus)
    dataset.set_name(name)
    context = dataset.context
    context.enable_progress_bars = False
    context.execution_options.preserve_order = in_order
    if limits is not None:
        context.execution_options.resource_limits = limits
    context.custom_execution_callback_classes = [_WaitForTasks]
    # By default each step of the loop waits 0.1 s, or until every task is done, before it starts new tasks, so CPUs are
    # idle. Ray has no setting for it.
    streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = 0.0
    return dataset


def outputs(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """Yield the blocks of a dataset as they come."""
    with original_errors():
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


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


def _in_worker(operator: Callable[[pa.Table], pa.Table]) -> Callable[[pa.Table], pa.Table]:
    def run(table: pa.Table) -> pa.Table:
        _keep_freed_memory()
        return operator(table)

    run.__name__ = run.__qualname__ = getattr(operator, "__name__", type(operator).__name__)  # Ray's dashboard shows it
    return run


@cache
def _keep_freed_memory() -> None:
    """Let this process keep the memory of freed images for the next ones, unless its environment has a setting for it.

    Otherwise glibc returns it after each image in a worker of Ray, and the next touches it anew, page by page.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:  # of the user, or of the driver for everything in a training run
        return
    with suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)


class _WaitForTasks(ExecutionCallback):
    """Makes the loop of an execution wait until a task returns something."""

    def __init__(self) -> None:
        self._returned: set[Any] = set()
        """Tasks that have returned something: they end, or their outputs wait for a slow consumer. Waiting for these
        would return at once, so the loop looks after them from time to time, less and less often."""
        self._wait = _SHORTEST_WAIT

    def on_execution_step(self, executor: Any) -> None:
        running = {task.get_waitable() for operator in executor._topology for task in operator.get_active_tasks()}
        self._returned &= running
        ready = []
        if computing := list(running - self._returned):
            ready, _ = ray.wait(computing, fetch_local=False, timeout=self._wait if self._returned else _IDLE_WAIT)
        else:
            time.sleep(self._wait)
        self._wait = _SHORTEST_WAIT if ready else min(2 * self._wait, _LONGEST_WAIT)
        self._returned.update(ready)
