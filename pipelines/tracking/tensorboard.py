"""TensorBoard's event files of a run, a copy of what its MLflow run has: the same names, steps and values.

An event file only grows, and one that a kill cuts off is not continued. So a point is written once MLflow has it, and
only if no event file has it; the first request for a metric brings what MLflow has of it, and so completes the files.
"""

import logging
import os
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from google.protobuf.message import DecodeError
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from pipelines.errors import UserError
from pipelines.storage import Location
from pipelines.tracking.runs import TrackedRun, require_reachable
from pipelines.tracking.unsent import one_line

logger = logging.getLogger(__name__)

_PREFIX = "events.out.tfevents."  # TensorBoard reads files of such names, in their order


class EventFiles:
    """The event files in `tensorboard/` of a run's folder. One process at a time writes them.

    What fails is a warning, after which nothing more is written: the next process adds what is missing.
    """

    def __init__(self, run: Location) -> None:
        """Prepare to write; files are read and written at the first `add`.

        Args:
            run: the training run's folder, on a local disk.
        """
        self._folder = Path(run.path) / "tensorboard"
        self._steps: dict[str, set[int]] | None = None
        """The steps that the files have, by metric."""
        self._writer: RecordWriter | None = None
        self._failed = False

    def add(self, points: Sequence[Metric]) -> None:
        """Write the points that no file has."""
        if self._failed:
            return
        try:
            self._add(points)
        except Exception as error:  # neither the training nor MLflow may suffer
            self._failed = True
            self.close()
            logger.warning(
                "TensorBoard's files in %s are not written now: %s. What is missing is added when the run ends or "
                "resumes.",
                self._folder,
                one_line(error),
            )

    def close(self) -> None:
        """Close the file that is written."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None

    def _add(self, points: Sequence[Metric]) -> None:
        if self._steps is None:
            self._steps = _steps_in(self._folder)
        steps = self._steps
        fresh = sorted((point for point in points if point.step not in steps[point.key]), key=attrgetter("step"))
        for step, group in groupby(fresh, attrgetter("step")):
            of_step = {point.key: point for point in group}
            self._write(
                Event(
                    wall_time=min(point.timestamp for point in of_step.values()) / 1000,
                    step=step,
                    summary=Summary(
                        value=[Summary.Value(tag=key, simple_value=point.value) for key, point in of_step.items()]
                    ),
                )
            )
            for key in of_step:
                steps[key].add(step)
        if fresh and self._writer is not None:
            self._writer.flush()

    def _write(self, event: Event) -> None:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(self._folder / _next_name(self._folder)))
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._writer.write(event.SerializeToString())


def complete(run: TrackedRun, folder: Location) -> None:
    """Write all that the MLflow run has and the event files of the training run's folder lack; warn if that fails."""
    try:
        require_reachable(run.uri)  # the client itself would try for minutes
        client, files = MlflowClient(run.uri), EventFiles(folder)
        for metric in sorted(client.get_run(run.run_id).data.metrics):
            files.add(client.get_metric_history(run.run_id, metric))
        files.close()
    except (UserError, MlflowException) as error:
        logger.warning("TensorBoard's files in %s may lack the last points: %s", folder, one_line(error))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))


def _next_name(folder: Path) -> str:
    """Return a name that comes after those of the existing files, even if the clock is behind."""
    times = [file.name.removeprefix(_PREFIX).partition(".")[0] for file in _files(folder)]
    latest = max((int(text) for text in times if text.isdecimal()), default=0)
    return f"{_PREFIX}{max(int(time.time()), latest + 1):010d}.{socket.gethostname()}.{os.getpid()}"


def _steps_in(folder: Path) -> dict[str, set[int]]:
    """Return the steps that the event files have, by metric."""
    steps: dict[str, set[int]] = defaultdict(set)
    for file in _files(folder):
        for event in _events(file.read_bytes()):
            for value in event.summary.value:
                steps[value.tag].add(event.step)
    return steps


def _events(content: bytes) -> Iterator[Event]:
    """Yield the events of a file up to one that was cut off, where TensorBoard stops too.

    Each is a record of TensorFlow: its length (8 bytes) and the length's checksum (4), the event, its checksum (4).
    """
    start = 0
    while len(content) >= start + 12:
        header = content[start : start + 8]
        (length,), (checksum,) = struct.unpack("<Q", header), struct.unpack_from("<I", content, start + 8)
        end = start + 12 + length
        if checksum != masked_crc32c(header) or len(content) < end + 4:
            return
        try:
            yield Event.FromString(content[start + 12 : end])
        except DecodeError:  # zeros, after a loss of power
            return
        start = end + 4
