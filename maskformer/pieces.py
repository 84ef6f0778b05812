"""Computing in pieces: how large they are, and the threads that compute them on a CPU."""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_CPU_PIECE = 96 * 1024
_DEVICE_PIECE = 16 * 1024 * 1024
_MOST_THREADS = 8

Task = TypeVar("Task")


def piece_size(device: torch.device) -> int:
    """Return the pixels to process at a time.

    About ten maps of this size fit into the cache of a CPU's core. A GPU prefers few large operations; they take up to
    1 GB of temporary memory.
    """
    return _CPU_PIECE if device.type == "cpu" else _DEVICE_PIECE


def for_each(compute: Callable[[Task], None], tasks: Sequence[Task], device: torch.device) -> None:
    """Compute the tasks, which must not depend on each other, on a CPU in as many threads as PyTorch uses.

    Threads that each work on a small piece of their own are faster than operations that share each piece. Nothing is
    recorded for autograd.
    """
    together = min(torch.get_num_threads(), _MOST_THREADS, len(tasks))
    if device.type != "cpu" or together < 2:
        with torch.no_grad():
            for task in tasks:
                compute(task)
        return
    rest = iter(tasks)  # each thread takes the next one
    inference = torch.is_inference_mode_enabled()

    def run() -> None:
        # Modes belong to the thread.
        with torch.inference_mode(inference), torch.no_grad():
            for task in rest:
                compute(task)

    running = [_pool().submit(run) for _ in range(together)]
    for future in running:
        future.exception()  # waits; no thread computes any more when an error is raised
    for future in running:
        future.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Start threads whose operations use one thread of PyTorch."""
    threads = torch.get_num_threads()
    started = threading.Barrier(_MOST_THREADS + 1)

    def start() -> None:
        torch.get_num_threads()  # at its first use, a thread takes the number of the process, so this comes first
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(_MOST_THREADS, "maskformer")
    for _ in range(_MOST_THREADS):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(threads)  # the others have changed what new threads start with
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has no threads
