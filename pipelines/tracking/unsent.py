"""What MLflow has not accepted yet, kept in the run's folder until it answers: metrics, and the run's status."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any

from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from maskformer.untrusted import MAX_JSON_BYTES, parse_json
from pipelines.errors import UserError
from pipelines.storage import Location
from pipelines.tracking.server import one_line

POINTS_PER_CALL = 1000
"""MLflow's limit for one request."""

_REJECTIONS = {ErrorCode.Name(INVALID_PARAMETER_VALUE), ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)}
_PIECE = re.compile(r"metrics_(\d+)\.jsonl")


def is_rejection(error: MlflowException) -> bool:
    """Return whether MLflow will answer the same again, such as for a deleted run.

    Other errors may pass: a proxy answers "not found" for a server that restarts, and a token can be renewed.
    """
    return error.error_code in _REJECTIONS


@dataclass(frozen=True)
class RunStatus:
    """A status of an MLflow run, as it was set at a moment."""

    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    tags: dict[str, str] = field(default_factory=dict)
    time: int = field(default_factory=get_current_time_millis)
    """Milliseconds since 1970; the end time of a run that ended."""

    def record(self, client: MlflowClient, run_id: str) -> None:
        """Set status and tags in MLflow; doing it again changes nothing."""
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in self.tags.items()])
        if self.status == "RUNNING":
            client.update_run(run_id, status=self.status)
        else:
            client.set_terminated(run_id, self.status, self.time)


class Unsent:
    """The files `unsent/metrics_000001.jsonl`, ... and `unsent/status.json` of a run's folder.

    Object stores cannot append to a file, so the metrics are in pieces, in the order they were logged.
    """

    def __init__(self, run: Location) -> None:
        self.folder = run / "unsent"

    def pieces(self) -> list[Location]:
        """List the files of metrics, oldest first."""
        return [self.folder / name for name in self.folder.names() if _PIECE.fullmatch(name)]

    def piece(self, number: int) -> Location:
        return self.folder / f"metrics_{number:06d}.jsonl"

    def add(self, points: Sequence[Metric]) -> None:
        """Write another file of metrics."""
        write_points(self.piece(next_number(self.pieces())), points)

    def read_status(self) -> RunStatus | None:
        try:
            return RunStatus(**parse_json((self.folder / "status.json").read_bytes(MAX_JSON_BYTES)))
        except FileNotFoundError:
            return None

    def write_status(self, status: RunStatus) -> None:
        (self.folder / "status.json").write_text(json.dumps(asdict(status)))

    def delete_status(self) -> None:
        (self.folder / "status.json").delete()

    def tidy(self) -> None:
        """Delete the folder, if nothing is kept in it."""
        if not any(name.endswith((".json", ".jsonl")) for name in self.folder.names()):
            self.folder.delete()


def next_number(pieces: Sequence[Location]) -> int:
    """Return the number of the file of metrics that comes after `pieces`."""
    matches = [_PIECE.fullmatch(piece.name) for piece in pieces]
    return max((int(match[1]) for match in matches if match), default=0) + 1


def write_points(piece: Location, points: Sequence[Metric]) -> None:
    """Write a file of metrics whole; an existing one is replaced."""
    piece.write_text("".join(f"{json.dumps(point_to_dict(point))}\n" for point in points))


def point_to_dict(point: Metric) -> dict[str, Any]:
    """Return the arguments of Metric."""
    return {"key": point.key, "step": point.step, "value": point.value, "timestamp": point.timestamp}


def read_points(piece: Location) -> list[Metric]:
    """Read a file of metrics; empty if another process has sent and deleted it.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return [Metric(**parse_json(line)) for line in piece.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise UserError(f"{piece} does not hold metrics ({error}). Correct or delete it.") from error


class Sender:
    """Sends metrics to an MLflow run; a point is sent unless the run has one of that metric and step already.

    That holds when a request was accepted and only its answer was lost: after an error, what the run has is asked anew.
    """

    def __init__(self, uri: str, run_id: str, accepted: Callable[[Sequence[Metric]], None] | None = None) -> None:
        """Prepare to send.

        Args:
            accepted: called with points that the run has, also those of before; a point may come several times.
        """
        self._uri, self._run_id = uri, run_id
        self._accepted = accepted or (lambda points: None)
        self._client: MlflowClient | None = None
        self._logged: dict[str, set[int]] = {}

    def send(self, points: Sequence[Metric]) -> str:
        """Send the points in their order.

        Returns:
            Why MLflow will never accept some of the points, if so. The others are sent.

        Raises:
            Exception: MLflow did not answer or cannot accept anything now, for whatever reason. Call again.
        """
        rejected = ""
        for start in range(0, len(points), POINTS_PER_CALL):
            rejected = self._send(points[start : start + POINTS_PER_CALL]) or rejected
        return rejected

    def _send(self, points: Sequence[Metric]) -> str:
        try:
            self._client = self._client or MlflowClient(self._uri)  # creates the tables of a new database
            fresh = [point for point in points if self._is_fresh(self._client, point)]
            self._client.log_batch(self._run_id, metrics=fresh)
            self._accepted(fresh)
            return ""
        except Exception as error:
            self._logged.clear()
            if not (isinstance(error, MlflowException) and is_rejection(error)):
                raise
            if points[0].step == points[-1].step:
                return one_line(error)
        # One bad point must not take the other steps with it.
        rejected = [self._send(list(group)) for _, group in groupby(points, attrgetter("step"))]
        return max(rejected)

    def _is_fresh(self, client: MlflowClient, point: Metric) -> bool:
        if point.key not in self._logged:
            history = client.get_metric_history(self._run_id, point.key)
            self._accepted(history)
            self._logged[point.key] = {logged.step for logged in history}
        steps = self._logged[point.key]
        if point.step in steps:
            return False
        steps.add(point.step)
        return True
