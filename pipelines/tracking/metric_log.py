"""Sends metrics to MLflow in a thread, which keeps them while MLflow is away. Training never waits for it."""

import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlflow.entities import Metric
from mlflow.utils.time import get_current_time_millis

from pipelines.errors import StorageUnavailableError, UserError
from pipelines.storage import Location, patience
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.server import one_line
from pipelines.tracking.tensorboard import EventFiles
from pipelines.tracking.unsent import (
    POINTS_PER_CALL,
    Sender,
    Unsent,
    next_number,
    point_to_dict,
    read_points,
    write_points,
)

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between two tries
_WRITE_EVERY = 10.0  # seconds
_STORAGE_ERRORS = (UserError, StorageUnavailableError, OSError)
_jitter = random.SystemRandom()  # leaves the generators of the training alone


class MetricLog:
    """Logs metrics by step; points that the run already has are skipped.

    A run that resumes from a checkpoint repeats some steps, with the same result.

    While MLflow does not answer, the points stay in memory and are written to the run's folder every 10 seconds.
    Above half of `capacity` they are only there. What an earlier attempt left there is sent first.

    In the process of a MetricLog, MLflow's client does not retry: MLflow reads how often and how long to try from
    environment variables, at each request. $MLFLOW_HTTP_REQUEST_TIMEOUT is respected if it is set.
    """

    def __init__(
        self,
        run: TrackedRun,
        folder: Location,
        points: Sequence[dict[str, Any]] = (),
        capacity: int = 10_000,
        event_files: EventFiles | None = None,
    ) -> None:
        """Start the thread.

        Args:
            run: the MLflow run.
            folder: the training run's folder.
            points: what `in_memory` of an earlier log of this run returned.
            capacity: number of points held in memory at most.
            event_files: TensorBoard's, which get the points that MLflow has accepted.
        """
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._run, self._capacity = run, capacity
        self._event_files = event_files
        self._sender = Sender(run.uri, run.run_id, event_files.add if event_files else None)
        self._unsent = Unsent(folder)
        self._changed = threading.Condition()  # guards the next three
        self._points = [Metric(**point) for point in points]
        self._deadline: float | None = None
        self._loses = False
        # The rest belongs to the thread.
        self._pieces: list[Location] | None = None  # files that are complete; None: the folder was not listed yet
        self._number = 0  # of the next file, which holds the first `_num_written` of the points
        self._num_written = 0
        self._storage_fails = False
        self._num_kept = 0  # points sent since an outage began
        self._wait = 0.0  # seconds until the next try; 0: there is no outage
        self._rejected = False
        self._thread = threading.Thread(target=self._work, name="metric log", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queue the metrics of a step. If neither MLflow nor the run's folder accepts any more, warn and drop them."""
        now = get_current_time_millis()
        points = [Metric(key, value, now, step) for key, value in metrics.items()]
        with self._changed:
            lost = len(self._points) + len(points) > self._capacity
            first = lost and not self._loses
            if lost:
                self._loses = True
            else:
                self._points += points
            # Otherwise the thread has work, or waits for MLflow, and waking it would delay this thread.
            if len(self._points) == len(points) or self._is_crowded():
                self._changed.notify()
        if first:
            logger.warning("MLflow and the run's folder are too slow: metrics are lost from step %d on.", step)

    def in_memory(self) -> list[dict[str, Any]]:
        """Return the points that a kill would lose now, to be saved in a checkpoint."""
        with self._changed:
            return [point_to_dict(point) for point in self._points]

    def close(self, seconds: float = 60) -> None:
        """Try for at most `seconds` to send all points; write the others to the run's folder and warn."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds + 30)  # a request, or writing the file, may take some more
        if self._thread.is_alive():
            logger.warning("The last metrics of MLflow run %s may be lost: the storage hangs.", self._run.run_id)

    def _work(self) -> None:
        with patience(0):  # the training must not wait at its end
            while self._has_work():
                began = time.monotonic()
                try:
                    self._send_oldest()
                except Exception as error:  # logging must never end a training run
                    self._wait_for_mlflow(error, began)
            self._finish()
        if self._event_files is not None:
            self._event_files.close()

    def _has_work(self) -> bool:
        """Wait for points or for the end; return whether to send some."""
        with self._changed:
            if self._pieces == []:
                if self._wait and not self._points:
                    logger.info("MLflow accepts metrics again; the %d points kept meanwhile were sent.", self._num_kept)
                    self._wait = 0.0
                self._changed.wait_for(lambda: self._points or self._deadline is not None)
            if self._deadline is None:
                return True
            return time.monotonic() < self._deadline and (self._pieces != [] or bool(self._points))

    def _send_oldest(self) -> None:
        pieces = self._list_pieces()
        if self._is_crowded():
            self._write()
        if pieces:
            piece = pieces[0]
            self._send(read_points(piece))
            del pieces[0]
            with suppress(*_STORAGE_ERRORS):  # if it stays, the next command finds its points in MLflow and deletes it
                piece.delete()
            return
        with self._changed:
            batch = self._points[:POINTS_PER_CALL]
        self._send(batch)
        with self._changed:
            del self._points[: len(batch)]
        if 0 < self._num_written <= len(batch):
            with suppress(*_STORAGE_ERRORS):
                self._unsent.piece(self._number).delete()
        self._num_written = max(0, self._num_written - len(batch))

    def _send(self, points: list[Metric]) -> None:
        cause = self._sender.send(points)
        if cause and not self._rejected:
            self._rejected = True
            logger.warning("MLflow rejects metrics of run %s, which are dropped: %s", self._run.run_id, cause)
        if self._wait:
            self._num_kept += len(points)

    def _wait_for_mlflow(self, error: Exception, began: float) -> None:
        """Wait after a failed try; write the points to the run's folder meanwhile."""
        if not self._wait:
            logger.warning(
                "MLflow does not accept metrics of run %s now; they are kept and sent later: %s",
                self._run.run_id,
                one_line(error),
            )
            self._wait, self._num_kept, self._loses = _FIRST_WAIT, 0, False
            self._write_at = began + _WRITE_EVERY
        until = time.monotonic() + self._wait * _jitter.uniform(0.5, 1)
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        closing = self._deadline is not None
        while (now := time.monotonic()) < min(until, self._deadline or until):
            if now >= self._write_at or self._is_crowded():
                self._write()
                self._write_at = time.monotonic() + _WRITE_EVERY
            with self._changed:
                if self._deadline is not None and not closing:
                    return  # one more try at once
                self._changed.wait(min(until, self._write_at, self._deadline or until) - now)

    def _is_crowded(self) -> bool:
        """Return whether points should move to the run's folder now, so that there is room for others."""
        return len(self._points) > self._capacity // 2 and not self._storage_fails

    def _list_pieces(self) -> list[Location]:
        if self._pieces is None:
            self._pieces = self._unsent.pieces()
            self._number = next_number(self._pieces)
        return self._pieces

    def _write(self) -> bool:
        """Write the points to the run's folder, and forget them if they are many; return whether that was possible."""
        with self._changed:
            points = list(self._points)
        try:
            pieces = self._list_pieces()
            piece = self._unsent.piece(self._number)
            if points:
                write_points(piece, points)
        except _STORAGE_ERRORS as error:
            if not self._storage_fails:
                logger.warning("Metrics that MLflow does not accept stay in memory: %s", one_line(error))
            self._storage_fails = True
            return False
        self._storage_fails = False
        self._num_written = len(points)
        if len(points) > self._capacity // 2:
            pieces.append(piece)
            self._number += 1
            self._num_written = 0
            with self._changed:
                del self._points[: len(points)]
        return True

    def _finish(self) -> None:
        if not self._points and self._pieces == []:
            with suppress(*_STORAGE_ERRORS):
                self._unsent.tidy()
        elif self._write():  # or an earlier attempt's files are left
            logger.warning(
                "MLflow does not accept the last metrics of run %s. They are in %s; the next command on this run "
                "sends them.",
                self._run.run_id,
                self._unsent.folder,
            )
        else:
            logger.warning("The last %d points of MLflow run %s are lost.", len(self._points), self._run.run_id)
