"""Rate, remaining time and data-wait share of a training loop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.data.batch import PanopticBatch


class Meter:
    """Measures rate, time to go and the share of time spent waiting for data."""

    def __init__(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    def waiting_for(self, batches: Iterator[PanopticBatch], count: int) -> list[PanopticBatch]:
        """Take `count` micro-batches, and count the time as waiting for data."""
        start = time.perf_counter()
        taken = [next(batches) for _ in range(count)]
        self._waited += time.perf_counter() - start
        return taken

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of all rates."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def report(self, step: int, global_batch: int) -> dict[str, float]:
        """Return the figures since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rate = max(step - self._step, 1) / seconds
        figures = {
            "images_per_second": rate * global_batch,
            "data_wait_share": self._waited / seconds,
            "eta_seconds": (self._total - step) / rate,
        }
        self._step, self._since, self._waited = step, now, 0.0
        return figures
