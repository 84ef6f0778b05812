"""What has become of each trial of a sweep: `<sweep>/trials.json`, which the driver alone writes."""

import dataclasses
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from pipelines.errors import UserError
from pipelines.storage import Location
from pipelines.sweep import report
from pipelines.sweep.report import TrialRecord
from pipelines.sweep.trial import Orders

logger = logging.getLogger(__name__)

_ENDED = ("finished", "stopped early", "failed")


class Book:
    """The trials of a sweep by their names."""

    def __init__(self, folder: Location, values: list[dict[str, Any]]) -> None:
        """Open the book of the sweep in `folder`, or begin it with a trial for each of `values`.

        Trials that failed are opened again: what ended them may have been mended since.

        Raises:
            UserError: there is a book, and it cannot be read.
        """
        self.folder = folder
        self._place = folder / "trials.json"
        fresh = [TrialRecord(f"trial-{number:03d}", each, "waiting", []) for number, each in enumerate(values)]
        self._trials = {trial.name: trial for trial in (self._read() if self._place.exists() else fresh)}
        for trial in self.records:
            if trial.status in ("failed", "running"):
                self._trials[trial.name] = replace(trial, status="waiting", cause="")

    def _read(self) -> list[TrialRecord]:
        try:
            lines = json.loads(self._place.read_text())
            return [TrialRecord(**{**line, "results": [(s, pq) for s, pq in line["results"]]}) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._place} is not the trials.json of a sweep ({type(error).__name__}: {error}). Put the right one "
                f"back, or choose another --run.name."
            ) from error

    @property
    def records(self) -> list[TrialRecord]:
        return list(self._trials.values())

    @property
    def open(self) -> list[TrialRecord]:
        """Those that have not ended."""
        return [trial for trial in self.records if trial.status not in _ENDED]

    @property
    def running(self) -> list[TrialRecord]:
        return [trial for trial in self.records if trial.status == "running"]

    def add_result(self, name: str, step: int, pq: float) -> None:
        """Write down a quick PQ; one of the same step is the same result, computed again."""
        trial = self._trials[name]
        self._trials[name] = replace(trial, results=sorted({**dict(trial.results), step: pq}.items()))
        self.write()

    def set_status(self, name: str, status: str, cause: str = "") -> None:
        """Write down where a trial stands."""
        self._trials[name] = replace(self._trials[name], status=status, cause=cause)
        self.write()

    def write(self) -> None:
        """Write the book whole. If the storage refuses, the sweep goes on; the next change writes all of it."""
        text = json.dumps([dataclasses.asdict(trial) for trial in self.records], indent=1)
        try:
            self._place.write_text(text)
        except (UserError, OSError) as error:
            logger.warning("The book of trials is not up to date. %s", error)

    def prune(self, gigabytes: float) -> None:
        """Delete checkpoints of ended trials beyond `gigabytes`: the best's stay, and the next best while they fit.

        A failed trial keeps its own, to go on from.
        """
        ended = [trial for trial in report.ranking(self.records) if trial.status in ("finished", "stopped early")]
        kept = 0
        for place, trial in enumerate(ended):
            checkpoints = self.folder / trial.name / "checkpoints"
            try:
                size = checkpoints.size()
                if place == 0 or kept + size <= gigabytes * 1e9:
                    kept += size
                elif size:
                    logger.info("Deleting the checkpoints of %s, %.2f GB.", trial.name, size / 1e9)
                    checkpoints.delete()
            except (UserError, OSError) as error:  # no reason to end a sweep
                logger.warning("The checkpoints of %s are left. %s", trial.name, error)


class Recorder(tune.Callback):
    """What Tune calls: writes down how trials fare."""

    def __init__(self, book: Book, orders: Orders, keep_gigabytes: float) -> None:
        self._book, self._orders, self._keep_gigabytes = book, orders, keep_gigabytes

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._book.set_status(trial.config["trial"]["name"], "running")

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        name = trial.config["trial"]["name"]
        if "pq" in result:
            logger.info("%s  step %d  quick PQ %.1f", name, result["step"], 100 * result["pq"])
            self._book.add_result(name, result["step"], result["pq"])
        if "status" in result:
            status = result["status"]
            if status == "stopped":  # by ASHA, or with the whole sweep
                status = "stopped early" if self._orders.given_to(name) else "waiting"
            self._end(name, status, result["cause"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        # Tune's own getters look in its storage, where the file arrives only later. Its first line is a headline.
        place = Path(trial.error_file or "")
        lines = place.read_text().splitlines()[1:] if place.is_file() else []
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "no reason is known.")
        self._end(trial.config["trial"]["name"], "failed", f"its process died: {reason}")

    def _end(self, name: str, status: str, cause: str) -> None:
        logger.info("%s  %s%s", name, status, f": {cause}" if cause else "")
        self._book.set_status(name, status, cause)
        self._book.prune(self._keep_gigabytes)
