"""Status and results of the trials of a sweep, stored in `<sweep>/trials.json`. Only the driver writes it."""

import dataclasses
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from maskformer.untrusted import MAX_JSON_BYTES, escaped, parse_json
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.storage import Location, patience
from pipelines.sweep import report
from pipelines.sweep.report import TrialRecord
from pipelines.sweep.trainable import StopRequests

logger = logging.getLogger(__name__)

_PATIENCE = 10.0
"""Seconds that housekeeping waits for the storage."""

_ENDED = ("finished", "stopped early", "failed")
_STATUSES = (*_ENDED, "waiting", "running")


class TrialStore:
    """The trials of a sweep by name."""

    def __init__(self, folder: Location, values: list[dict[str, Any]]) -> None:
        """Read the trials of the sweep in `folder`, or create one for each of `values` if it is new.

        Failed trials are tried again: the cause may have been fixed since.

        Raises:
            UserError: trials.json is damaged.
        """
        self.folder = folder
        self._file = folder / "trials.json"
        fresh = [TrialRecord(f"trial-{number:03d}", each, "waiting", []) for number, each in enumerate(values)]
        self._trials = {trial.name: trial for trial in (self._read() if self._file.exists() else fresh)}
        for trial in self.records:
            if trial.status in ("failed", "running"):
                self._trials[trial.name] = replace(trial, status="waiting", cause="")

    def _read(self) -> list[TrialRecord]:
        try:
            trials = [_trial(line) for line in parse_json(self._file.read_bytes(MAX_JSON_BYTES))]
            if len({trial.name for trial in trials}) < len(trials):
                raise ValueError("two trials have the same name")
            return trials
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._file} is not the trials.json of a sweep ({type(error).__name__}: {escaped(error, 200)}). "
                f"Restore it, or choose another --run.name."
            ) from error

    @property
    def records(self) -> list[TrialRecord]:
        """All trials."""
        return list(self._trials.values())

    @property
    def open(self) -> list[TrialRecord]:
        """The trials that have not ended."""
        return [trial for trial in self.records if trial.status not in _ENDED]

    @property
    def running(self) -> list[TrialRecord]:
        """The trials that are running."""
        return [trial for trial in self.records if trial.status == "running"]

    def add_result(self, name: str, step: int, pq: float) -> None:
        """Store a quick PQ. It replaces an earlier one of the same step, which is the same result computed again."""
        trial = self._trials[name]
        self._trials[name] = replace(trial, results=sorted({**dict(trial.results), step: pq}.items()))
        self.write()

    def set_status(self, name: str, status: str, cause: str = "") -> None:
        """Store the status of a trial."""
        self._trials[name] = replace(self._trials[name], status=status, cause=cause)
        self.write()

    def write(self) -> None:
        """Write trials.json. If that fails, the sweep continues; the next change writes the complete file again."""
        text = json.dumps([dataclasses.asdict(trial) for trial in self.records], indent=1)
        try:
            with patience(_PATIENCE):
                self._file.write_text(text)
        except (UserError, StorageUnavailableError, OSError) as error:
            logger.warning("trials.json is not up to date. %s", error)

    def prune(self, gigabytes: float) -> None:
        """Delete checkpoints of ended trials, except those of the best trial and of the next best within `gigabytes`.

        A failed trial keeps its checkpoints, to resume from.
        """
        ended = [trial for trial in report.ranking(self.records) if trial.status in ("finished", "stopped early")]
        kept = 0
        for rank, trial in enumerate(ended):
            checkpoints = self.folder / trial.name / "checkpoints"
            if _is_linked(checkpoints, self.folder):
                logger.warning("The checkpoints of %s were not deleted: a link leads to them.", trial.name)
                continue
            try:
                with patience(_PATIENCE):
                    size = checkpoints.size()
                    if rank == 0 or kept + size <= gigabytes * 1e9:
                        kept += size
                    elif size:
                        logger.info("Deleting the checkpoints of %s, %.2f GB.", trial.name, size / 1e9)
                        checkpoints.delete()
            except (UserError, StorageUnavailableError, OSError) as error:  # the sweep can continue
                logger.warning("The checkpoints of %s were not deleted. %s", trial.name, error)


def _is_linked(inside: Location, folder: Location) -> bool:
    """Return whether there is a link between a folder, which may be a stranger's, and a place in it."""
    if not folder.is_local:
        return False
    below = os.path.relpath(inside.path, folder.path)
    return os.path.realpath(inside.path) != os.path.join(os.path.realpath(folder.path), below)


def _trial(line: dict[str, Any]) -> TrialRecord:
    """Return the trial of an entry of trials.json, which may come from a stranger: folders are deleted by its name.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    trial = TrialRecord(**{**line, "results": [(step, pq) for step, pq in line["results"]]})
    if not isinstance(trial.name, str) or not re.fullmatch(r"trial-[0-9]{3,}", trial.name):
        raise ValueError(f"{trial.name!r} is not the name of a trial")
    if not isinstance(trial.values, dict) or not isinstance(trial.cause, str):
        raise TypeError(f"{trial.name} has no values or no cause")
    if trial.status not in _STATUSES:
        raise ValueError(f"{trial.name} has the status {trial.status!r}")
    if not all(type(step) is int and type(pq) in (int, float) for step, pq in trial.results):
        raise TypeError(f"{trial.name} has results that are not numbers")
    return trial


class Recorder(tune.Callback):
    """A Tune callback that stores the results and status of trials."""

    def __init__(self, store: TrialStore, stop_requests: StopRequests, keep_gigabytes: float) -> None:
        self._store, self._stop_requests, self._keep_gigabytes = store, stop_requests, keep_gigabytes

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._store.set_status(trial.config["name"], "running")

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        name = trial.config["name"]
        if "pq" in result:
            logger.info("%s  step %d  quick PQ %.1f", name, result["step"], 100 * result["pq"])
            self._store.add_result(name, result["step"], result["pq"])
        if "status" in result:
            status = result["status"]
            if status == "stopped":  # by ASHA, or because the sweep was stopped
                status = "stopped early" if name in self._stop_requests else "waiting"
            self._end(name, status, result["cause"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        # Tune's getters read from its storage, where the file arrives later. Its first line is a headline.
        file = Path(trial.error_file or "")
        lines = file.read_text().splitlines()[1:] if file.is_file() else []
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "unknown cause.")
        self._end(trial.config["name"], "failed", f"its process died: {reason}")

    def _end(self, name: str, status: str, cause: str) -> None:
        logger.info("%s  %s%s", name, status, f": {cause}" if cause else "")
        self._store.set_status(name, status, cause)
        self._store.prune(self._keep_gigabytes)
