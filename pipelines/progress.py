"""Progress of long operations, with rate and remaining time: a bar on a terminal, log lines elsewhere."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

logger = logging.getLogger(__name__)

_FILE_ONLY = logging.getLogger("progress")
"""Not below `pipelines`, whose lines jobs show on the console."""

terminal: TextIO | None = None
"""Stream that progress bars are drawn on. Jobs set it when they run in a terminal; None writes log lines instead."""


def progress(items: Iterable[Item], total: int, what: str, seconds: float = 5.0) -> Iterator[Item]:
    """Yield `items` and report the count, the rate and the remaining time.

    Args:
        total: number of items.
        what: unit and operation, such as "images checked".
        seconds: least time between two log lines.
    """
    if terminal is not None:
        yield from tqdm(items, total=total, desc=what, file=terminal, leave=False, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            rate = done / (now - start)
            logger.info(
                "%d of %d %s, %.1f per second, about %.0f s left", done, total, what, rate, (total - done) / rate
            )


class StepProgress:
    """Progress of a training run: step, loss, images per second and time spent waiting for data."""

    def __init__(self) -> None:
        self._last_step = 0
        self._bar: Any = None

    def show(self, figures: dict[str, Any]) -> None:
        """Report the figures, unless those of the same step were reported last.

        Args:
            figures: `step`, `total`, `loss`, `images_per_second`, `data_wait_share` (0..1) and `eta_seconds`.
        """
        step, total = figures["step"], figures["total"]
        if step == self._last_step:
            return
        self._last_step = step
        text = f"loss {figures['loss']:.4f}  {figures['images_per_second']:.3g} images/s"
        text += f"  waiting for data {100 * figures['data_wait_share']:.0f} %"
        # With a bar the line goes to the log file only.
        lines = logger if terminal is None else _FILE_ONLY
        lines.info("step %d/%d  %s  %s left", step, total, text, _duration(figures["eta_seconds"]))
        if terminal is not None:
            with suppress(OSError, ValueError):  # a terminal that is gone must not end a training
                self._draw(step, total, text)

    def _draw(self, step: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, initial=step, desc="step", file=terminal, leave=False, dynamic_ncols=True)
        self._bar.n = step
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
