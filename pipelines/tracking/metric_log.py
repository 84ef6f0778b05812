"""Sends metrics to MLflow in a thread. A slow or absent server may lose metrics, but never delays training."""

import contextlib
import logging
import queue
import threading
import time

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from pipelines.tracking.runs import TrackedRun

logger = logging.getLogger(__name__)


class MetricLog:
    """Logs metrics by step without blocking; steps that the run has already logged are skipped.

    A run that resumes from a checkpoint repeats some steps, with the same result.
    """

    def __init__(self, run: TrackedRun, capacity: int = 10_000) -> None:
        self._client, self._run_id = MlflowClient(run.uri), run.run_id
        self._queue: queue.Queue[list[Metric] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, name="metric log", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queue the metrics of a step; if the queue is full, warn and drop them."""
        now = get_current_time_millis()
        try:
            self._queue.put_nowait([Metric(key, value, now, step) for key, value in metrics.items()])
        except queue.Full:
            logger.warning("MLflow is too slow: the metrics of step %d are lost.", step)

    def close(self, seconds: float = 60) -> None:
        """Wait at most `seconds` until all queued metrics are sent; warn if some are left."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("MLflow is too slow: the last metrics of run %s may be lost.", self._run_id)

    def _work(self) -> None:
        last_logged: dict[str, int] = {}
        while (metrics := self._queue.get()) is not None:
            try:
                fresh = [m for m in metrics if m.step > self._last(m.key, last_logged)]
                self._client.log_batch(self._run_id, metrics=fresh)
            except Exception as error:  # logging must never end a training run
                logger.warning("MLflow did not accept the metrics of step %d: %s", metrics[0].step, error)

    def _last(self, key: str, last_logged: dict[str, int]) -> int:
        if key not in last_logged:
            history = self._client.get_metric_history(self._run_id, key)
            last_logged[key] = max((metric.step for metric in history), default=-1)
        return last_logged[key]
