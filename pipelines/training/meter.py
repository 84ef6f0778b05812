"""Where the time of a training loop goes, and the rate and remaining time that follow from it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS: tuple[str, ...] = ("first_batch", "steps", "repeated", "data", "checkpoint", "evaluation")
"""Parts of an attempt's time: until its first batch, steps, steps that an earlier attempt had done, waiting for data,
waiting for a checkpoint, quick PQ."""


class Meter:
    """Divides the time since it was made among PARTS, without gaps; may be read from another thread."""

    def __init__(self, step: int, total_steps: int, reached: int) -> None:
        """Begin in the part `first_batch`.

        Args:
            step: the steps done before.
            reached: the most steps that an earlier attempt had done.
        """
        self._total, self._reached = total_steps, reached
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "first_batch", time.perf_counter()
        self._step, self._reported = step, self._rated()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block to a part, and the time after it to the part before."""
        before = self._part
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def stepping(self, step: int) -> None:
        """Count the time from here on to the steps; `step` of them are done."""
        self._switch("steps" if step >= self._reached else "repeated")

    @property
    def split(self) -> dict[str, float]:
        """Seconds by part until now."""
        seconds, part, since = dict(self._seconds), self._part, self._since
        seconds[part] += time.perf_counter() - since
        return {name: round(value, 3) for name, value in seconds.items()}

    def report(self, step: int, global_batch: int) -> dict[str, float]:
        """Return rate, share of data wait and remaining time, from the time since the last call.

        The quick PQ counts in none of them.
        """
        self._switch(self._part)
        rated = self._rated()
        seconds = max(sum(rated) - sum(self._reported), 1e-9)
        rate = max(step - self._step, 1) / seconds
        figures = {
            "images_per_second": rate * global_batch,
            "data_wait_share": (rated[0] - self._reported[0]) / seconds,
            "eta_seconds": (self._total - step) / rate,
        }
        self._step, self._reported = step, rated
        return figures

    def _switch(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def _rated(self) -> tuple[float, float]:
        """Return the seconds of waiting for data, and those of the other parts that count in a rate."""
        seconds = self._seconds
        waiting = seconds["data"] + seconds["first_batch"]
        return waiting, seconds["steps"] + seconds["repeated"] + seconds["checkpoint"]
