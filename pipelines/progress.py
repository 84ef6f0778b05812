"""Log lines that say how far a long loop is, how fast, and how long it will take."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


def progress(items: Iterable[Item], total: int, what: str, seconds: float = 5.0) -> Iterator[Item]:
    """Hand on `items`, logging count, rate and remaining time at most every `seconds`.

    Args:
        what: the work and its unit, such as "images checked".
    """
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
